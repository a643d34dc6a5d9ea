"""The commands as processes of their own that are spared their imports: see fork_server.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

FORK_SERVER = Path(__file__).with_name("fork_server.py")


class Launcher:
    """`fork_server.py` as a process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(FORK_SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert json.loads(self._process.stdout.readline()) == "ready"

    def start(self, module: str, arguments: list[str], folder: Path, output: Path, *, max_file_bytes: int = 0) -> int:
        """The process id of `noisepolicy-MODULE` in `folder`, which adds to the files `output`/stdout and stderr."""
        return self._ask(
            do="start",
            module=module,
            arguments=[str(argument) for argument in arguments],
            folder=str(folder),
            output=str(output),
            environment={**os.environ, "OMP_NUM_THREADS": "1"},
            max_file_bytes=max_file_bytes,
        )

    def wait(self, pid: int, timeout_s: float = 300.0) -> int | None:
        """The exit code, -N for signal N, or None while it runs."""
        return self._ask(do="wait", pid=pid, timeout_s=timeout_s)

    def run(self, module: str, *arguments: object, folder: Path, output: Path) -> subprocess.CompletedProcess:
        code = self.wait(self.start(module, arguments, folder, output))
        assert code is not None, f"noisepolicy-{module} did not end: {(output / 'stderr').read_text()}"
        texts = [(output / name).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(arguments, code, *texts)

    def _ask(self, **request):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()  # its runs are waited for, so none is left
        self._process.wait()
