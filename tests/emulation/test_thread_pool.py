"""The CPU kernels' threads under ThreadSanitizer, which is shown to see a fault."""

import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
FLAGS = ["-std=c++17", "-O1", "-g1", "-fsanitize=thread", "-pthread", "-DNOISEPOLICY_X86", f"-I{CSRC}", f"-I{CSRC}/cpu"]


def run(folder: Path, seconds: int, old: str = "", new: str = "") -> subprocess.CompletedProcess:
    """Exit code 124: it never ended."""
    text = (CSRC / "cpu" / "parallel.cpp").read_text("utf-8")
    assert old in text
    (folder / "parallel.cpp").write_text(text.replace(old, new, 1) if old else text, "utf-8")
    sources = [folder / "parallel.cpp", HERE / "thread_pool.cpp"]
    subprocess.run(["g++", *FLAGS, "-o", folder / "program", *sources], check=True)
    return subprocess.run(["timeout", str(seconds), folder / "program"], capture_output=True, text=True, check=False)


def test_no_race_and_every_element_once(tmp_path):
    done = run(tmp_path, 120)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("if (parts < 2 || !lock.try_lock())", "if (parts < 2)"),
        ("if (came_soon([this] { return unfinished_ == 0; })) return;", "return;"),
        ("next.fetch_add(piece, std::memory_order_relaxed)", "next.load()) < count && (next += piece"),
    ],
    ids=["callers share the pool", "caller does not wait", "pieces taken twice"],
)
def test_a_planted_bug_is_caught(tmp_path, old, new):
    done = run(tmp_path, 10, old, new)
    assert done.returncode != 0
