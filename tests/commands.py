"""The commands as processes of their own that are spared their imports: see fork_server.py."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
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

    def start(
        self,
        program: str | Path,
        arguments: Iterable[object],
        folder: Path,
        output: Path,
        *,
        environment: Mapping[str, str] = os.environ,
        max_file_bytes: int = 0,
        num_processes: int = 0,
        max_restarts: int = 0,
    ) -> "Forked":
        """Start `noisepolicy-PROGRAM`, or a script, in `folder`. Its output is added to `output`/stdout and stderr.

        With `num_processes`, start torchrun's agent, which starts that many.
        """
        pid = self._ask(
            do="start",
            program=str(program),
            arguments=[str(argument) for argument in arguments],
            folder=str(folder),
            output=str(output),
            environment={**environment, "OMP_NUM_THREADS": "1"},
            max_file_bytes=max_file_bytes,
            num_processes=num_processes,
            max_restarts=max_restarts,
        )
        return Forked(self, pid)

    def wait(self, pid: int, timeout_s: float) -> int | None:
        """Return the exit code, -N for signal N, or None while the process runs."""
        return self._ask(do="wait", pid=pid, timeout_s=timeout_s)

    def run(
        self, program: str | Path, *arguments: object, folder: Path, output: Path, num_processes: int = 0
    ) -> subprocess.CompletedProcess:
        code = self.start(program, arguments, folder, output, num_processes=num_processes).wait()
        texts = [(output / name).read_text() for name in ("stdout", "stderr")]
        assert code is not None, f"{program} did not end: {texts}"
        return subprocess.CompletedProcess(arguments, code, *texts)

    def _ask(self, **request):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()  # its runs are waited for, so none is left
        self._process.wait()


class Forked:
    """A process of a `Launcher`, with what tests use of `subprocess.Popen`."""

    def __init__(self, launcher: Launcher, pid: int) -> None:
        self._launcher, self.pid, self.returncode = launcher, pid, None

    def wait(self, timeout_s: float = 300.0) -> int | None:
        if self.returncode is None:
            self.returncode = self._launcher.wait(self.pid, timeout_s)
        return self.returncode

    def poll(self) -> int | None:
        return self.wait(0.0)

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
