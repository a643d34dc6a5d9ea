"""Runs of the real command that tests break: started, killed, resumed and compared with one that was left alone."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from noisepolicy.storage import read_tensors

from ..commands import Launcher

sys.path.insert(0, str(Path(__file__).parent))  # for stub_world

PROGRAM = Path(__file__).with_name("stub_train.py")
REWARD = ["--reward", "stub_world:left_or_right"]
SETTINGS = [
    "--model",
    "stub",
    "--prompts",
    "prompts.txt",
    *REWARD,
    "--device",
    "cpu",
    "--num-iterations",
    "8",
    "--batch-size",
    "8",
    "--group-size",
    "4",
    "--critic-warmup",
    "8",
    "--critic-batch-size",
    "8",
    "--critic-updates",
    "1",
    "--num-updates",
    "2",
    "--bands",
    "4",
    "--checkpoint-every",
    "2",
    "--sample-every",
    "4",
    "--eval-prompts",
    "prompts.txt",
    "--eval-num-prompts",
    "0",
    "--num-candidates",
    "2",
    "--num-inference-steps",
    "1",
]
PROMPTS = "a\nbb\nccc\ndddd\n"


class Run:
    """One run of the command; `path` is its run folder."""

    def __init__(self, launcher: Launcher, folder: Path) -> None:
        self.folder, self.path = folder, folder / "run"
        self._launcher = launcher
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "prompts.txt").exists():
            (folder / "prompts.txt").write_text(PROMPTS)

    def start(self, *arguments: str, max_file_bytes: int = 0) -> None:
        (self.folder / "stderr").unlink(missing_ok=True)
        self._process = self._launcher.start(
            PROGRAM, arguments, self.folder, self.folder, max_file_bytes=max_file_bytes
        )

    def start_new(self, *arguments: str) -> None:
        self.start(*SETTINGS, "--output-dir", "run", *arguments)

    def resume(self, **options: int) -> None:
        self.start("--resume", "run", *REWARD, **options)

    def start_again(self) -> None:
        """Goes on with it, or starts it where it did not come to having settings."""
        if (self.path / "config.yaml").exists():
            self.resume()
        else:
            self.start_new()

    def wait(self, timeout_s: float = 300.0) -> int | None:
        return self._process.wait(timeout_s)

    def finish(self) -> "Run":
        assert self.wait() == 0, self.stderr
        return self

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    @property
    def error(self) -> str:
        """The one line that says what is wrong."""
        assert "Traceback" not in self.stderr, self.stderr
        (line,) = [line for line in self.stderr.splitlines() if "error" in line]
        return line

    def num_iterations(self) -> int:
        path = self.path / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def wait_for_iteration(self, number: int) -> None:
        while self.num_iterations() < number:
            assert self.wait(0.002) is None, self.stderr

    def content(self) -> dict[str, bytes]:
        """Every file, but for the lock's holder."""
        return {
            str(path.relative_to(self.path)): path.read_bytes()
            for path in sorted(self.path.rglob("*"))
            if path.is_file() and path.name != "lock"
        }

    def assert_same(self, other: "Run", *, metrics: bool = True) -> None:
        """The same bits in what training left: policy, last checkpoint, history, metrics and evaluation."""
        for file in ("policy/policy.safetensors", "checkpoints/iteration_000008.safetensors"):
            mine, theirs = (read_tensors(run.path / file) for run in (self, other))
            assert mine.keys() == theirs.keys()
            for name in mine:
                assert torch.equal(mine[name], theirs[name]), (file, name)
        assert (self.path / "history" / "rows.bin").read_bytes() == (other.path / "history" / "rows.bin").read_bytes()
        if metrics:
            assert (self.path / "metrics.jsonl").read_text() == (other.path / "metrics.jsonl").read_text()
        sweeps = [json.loads((run.path / "summary.json").read_bytes())["sweep"] for run in (self, other)]
        assert sweeps[0] == sweeps[1]
        assert (self.path / "report.html").exists()
        assert not list(self.path.rglob("*.tmp"))


@pytest.fixture
def make_run(commands, tmp_path):
    """`make_run(name)`: a run that is not started yet, in a folder of its own."""
    return lambda name="one": Run(commands, tmp_path / name)


@pytest.fixture(scope="session")
def whole_run(commands, tmp_path_factory):
    """A run that nothing happened to."""
    run = Run(commands, tmp_path_factory.mktemp("whole"))
    run.start_new()
    return run.finish()


@pytest.fixture(scope="session")
def _stopped_run(commands, tmp_path_factory):
    run = Run(commands, tmp_path_factory.mktemp("stopped"))
    run.start_new()
    run.wait_for_iteration(4)
    run.kill(signal.SIGTERM)
    assert run.wait() == 143, run.stderr
    return run


@pytest.fixture
def stopped_run(_stopped_run, commands, tmp_path):
    """A copy of a run that was stopped half-way and has two checkpoints."""
    shutil.copytree(_stopped_run.folder, tmp_path / "copy")
    run = Run(commands, tmp_path / "copy")
    settings = run.path / "config.yaml"
    settings.write_text(settings.read_text().replace(str(_stopped_run.folder), str(run.folder)))
    return run
