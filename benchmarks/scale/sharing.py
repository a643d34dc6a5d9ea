"""`noisepolicy-bench sharing`: seconds of a short training run that shares two CPUs, or may use less than it sees.

Each run is the real command in a fresh process. The situations take turns, so a machine that drifts slows all alike:

- quiet: nothing else runs
- neighbour: one busy process on the same two CPUs
- one-cpu: bound to one of the two CPUs
- quota: in a control group with the time of one CPU, while both are seen
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from noisepolicy.control_groups import own_groups

_FLAGS = [
    "--num-iterations",
    "2",
    "--batch-size",
    "32",
    "--critic-warmup",
    "32",
    "--critic-updates",
    "6",
    "--eval-num-prompts",
    "0",
    "--device",
    "cpu",
]
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def run(situations: Sequence[str], spin_counts: Sequence[int], repetitions: int) -> dict[str, Any]:
    """Print a table and return its numbers.

    Args:
        situations: Names from the list above.
        spin_counts: Values of GOMP_SPINCOUNT to measure beside the command's own way of waiting. OpenMP's default is
            300000.
        repetitions: Number of runs of each situation and way of waiting.

    Raises:
        ValueError: if a number is out of range.
        RuntimeError: if there are fewer than two CPUs, no control group can be made, or a run fails.
    """
    if repetitions < 1 or min(spin_counts, default=0) < 0:
        raise ValueError(
            f"--repetitions must be positive and --spin-counts not negative, got {repetitions} and {list(spin_counts)}"
        )
    cpus = sorted(os.sched_getaffinity(0))[:2]
    if len(cpus) < 2:
        raise RuntimeError("two CPUs are needed, and this process may run on one")
    if "quota" in situations:
        with group_of_one_cpu():
            pass  # an error now rather than after minutes
    runs: dict[tuple[str, int | None], list[tuple[float, float]]] = {
        (name, way): [] for name in situations for way in (None, *spin_counts)
    }
    for _ in range(repetitions):
        for name, way in runs:
            runs[name, way].append(_measure(name, way, cpus))
    print("situation  | GOMP_SPINCOUNT | command, s | of quiet | training alone, s | of quiet")
    rows: list[dict[str, Any]] = []
    for (name, way), pairs in runs.items():
        command_s, training_s = map(statistics.median, zip(*pairs, strict=True))
        row = {"situation": name, "spin_count": way, "command_s": command_s, "training_s": training_s, "runs": pairs}
        rows.append(row)
        cells = ["the command's" if way is None else str(way)]
        quiet = next((row for row in rows if (row["situation"], row["spin_count"]) == ("quiet", way)), None)
        for part in ("command", "training"):
            row[f"{part}_of_quiet"] = row[f"{part}_s"] / quiet[f"{part}_s"] if quiet else None
            cells += [f"{row[f'{part}_s']:.2f}", f"{row[f'{part}_of_quiet']:.2f}x" if quiet else "-"]
        print(f"{name:10s} | {cells[0]:>14s} | {cells[1]:>10s} | {cells[2]:>8s} | {cells[3]:>17s} | {cells[4]:>8s}")
    return {"cpus": cpus, "sharing": rows}


def _measure(situation: str, spin_count: int | None, cpus: Sequence[int]) -> tuple[float, float]:
    """Measure the seconds of one run of the command, and of its training alone."""
    environment = {name: value for name, value in os.environ.items() if name not in _THREAD_VARIABLES}
    if spin_count is not None:
        environment["GOMP_SPINCOUNT"] = str(spin_count)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        group = stack.enter_context(group_of_one_cpu()) if situation == "quota" else None
        if situation == "neighbour":
            stack.enter_context(_busy_process(cpus))

        def enter() -> None:
            os.sched_setaffinity(0, cpus[:1] if situation == "one-cpu" else cpus)
            if group is not None:
                (group / "cgroup.procs").write_text(str(os.getpid()))

        command = [sys.executable, "-m", "noisepolicy.cli.train", *_FLAGS, "--output-dir", f"{folder}/run"]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, preexec_fn=enter)
        seconds = time.perf_counter() - start
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise RuntimeError(f"the run of {situation} failed: {last[0]}")
        return seconds, json.loads(Path(folder, "run", "summary.json").read_text("utf-8"))["train_seconds"]


@contextmanager
def _busy_process(cpus: Sequence[int]) -> Iterator[None]:
    command = [sys.executable, "-c", "while True: pass"]
    with subprocess.Popen(command, preexec_fn=lambda: os.sched_setaffinity(0, cpus)) as process:
        try:
            yield
        finally:
            process.kill()


@contextmanager
def group_of_one_cpu() -> Iterator[Path]:
    """Make a control group below this process's own that may use the time of one CPU; return its folder.

    Raises:
        RuntimeError: if no group can be made.
    """
    for top, own in own_groups():
        group = top / own / f"noisepolicy-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:  # a read-only file system, or another's group
            continue
        try:
            for name, limit in (("cpu.max", "100000 100000"), ("cpu.cfs_quota_us", "100000")):
                if (group / name).exists():
                    (group / name).write_text(limit)
                    yield group
                    return
        finally:
            group.rmdir()
    raise RuntimeError(
        "no control group with a CPU quota can be made here, which most containers do not allow; "
        "name the situations without quota: --situations quiet neighbour one-cpu"
    )
