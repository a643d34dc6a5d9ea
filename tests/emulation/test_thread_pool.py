"""The CPU kernels' threads under ThreadSanitizer, which is shown to see a fault, and the time they spin away."""

import os
import subprocess
from pathlib import Path

import pytest

from ..sampling import everyday

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
FLAGS = ["-std=c++17", "-g1", "-pthread", "-DNOISEPOLICY_X86", f"-I{CSRC}", f"-I{CSRC}/cpu"]
CAN_SPIN = "const bool can_spin = num_helpers < num_cpus();"
SPIN = "std::chrono::microseconds(40)"


def build(folder: Path, program: str, *flags: str, old: str = "", new: str = "") -> Path:
    """Compile the pool with a program that uses it, after `old` is replaced by `new` in the pool."""
    text = (CSRC / "cpu" / "parallel.cpp").read_text("utf-8")
    assert old in text
    (folder / "parallel.cpp").write_text(text.replace(old, new, 1) if old else text, "utf-8")
    sources = [folder / "parallel.cpp", HERE / program]
    subprocess.run(["g++", *FLAGS, *flags, "-o", folder / "program", *sources], check=True)
    return folder / "program"


def run(folder: Path, seconds: int, old: str = "", new: str = "") -> subprocess.CompletedProcess:
    """Exit code 124: it never ended."""
    program = build(folder, "thread_pool.cpp", "-O1", "-fsanitize=thread", old=old, new=new)
    return subprocess.run(["timeout", str(seconds), program], capture_output=True, text=True, check=False)


def used_us(folder: Path, num_threads: int, cpus: set[int], old: str = "", new: str = "") -> float:
    """Microseconds of processor time that a call of no work takes with its waiting, on these CPUs."""
    program = build(folder, "thread_pool_waiting.cpp", "-O2", old=old, new=new)
    done = subprocess.run(
        [program, str(num_threads)], capture_output=True, check=True, preexec_fn=lambda: os.sched_setaffinity(0, cpus)
    )
    return float(done.stdout)


def test_no_race_and_every_element_once(tmp_path):
    done = run(tmp_path, 120)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize(
    ("old", "new"),
    everyday(
        [
            ("if (parts < 2 || !lock.try_lock())", "if (parts < 2)"),
            ("if (can_spin && came_soon([this] { return unfinished_ == 0; })) return;", "return;"),
            ("next.fetch_add(piece, std::memory_order_relaxed)", "next.load()) < count && (next += piece"),
        ],
        1,
    ),
    ids=["callers share the pool", "caller does not wait", "pieces taken twice"],
)
def test_a_planted_bug_is_caught(tmp_path, old, new):
    done = run(tmp_path, 10, old, new)
    assert done.returncode != 0


def test_more_threads_than_cpus_do_not_spin(tmp_path):
    one_cpu = {min(os.sched_getaffinity(0))}
    spinning = used_us(tmp_path, 4, one_cpu, CAN_SPIN, "const bool can_spin = true;")
    assert used_us(tmp_path, 4, one_cpu) < spinning / 2


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_threads_spin_for_a_moment_only(tmp_path):
    two_cpus = set(sorted(os.sched_getaffinity(0))[:2])
    spinning = used_us(tmp_path, 2, two_cpus, SPIN, "std::chrono::milliseconds(4)")
    assert used_us(tmp_path, 2, two_cpus) < spinning / 4
