"""Sets how many threads torch computes with on a CPU, and how they wait for one another.

OpenMP reads its environment variables once, when torch loads it, so this module is imported before torch. By default
OpenMP takes one thread for each CPU and lets threads spin for milliseconds while they wait. That is right on a machine
of one's own. Where another process holds a CPU, or a container may use less time than its CPUs offer, the spinning
threads take the time that the thread they wait for needs.
"""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# Some tens of microseconds, which bridges the gap between two operations and is little to lose where a thread waits for
# one that does not run. OpenMP's own default is 300000; 0 sleeps at once.
_SPIN_COUNT = "1000"


def configure_threads() -> None:
    """Set OpenMP's environment variables, except those that the user has set. Do nothing once torch is imported.

    Threads sleep after a short wait. There are no more of them than the control group's quota lets run; the CPUs that
    the process is bound to are counted by OpenMP itself.
    """
    if "torch" in sys.modules:
        return
    if not any(os.environ.get(name) for name in _WAITING):
        # libgomp, which torch's own builds bring, knows both. LLVM's and Intel's OpenMP know the first and never spin.
        os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": _SPIN_COUNT}
    quota = cpu_quota()
    if quota is not None and quota < len(os.sched_getaffinity(0)) and not os.environ.get("OMP_NUM_THREADS"):
        os.environ["OMP_NUM_THREADS"] = str(quota)


def cpu_quota(proc: Path = Path("/proc/self")) -> int | None:
    """Number of CPUs that the process's control groups let run at once, rounded up; None if they set no limit.

    Of the process's own group and those above it, the smallest limit holds. A limit of 1.5 CPUs counts as 2: two
    threads that sleep while they wait can use all of it, one thread cannot. What cannot be read is no limit.

    Args:
        proc: the process's folder in /proc, with the files `cgroup` and `mountinfo`.
    """
    folders = [top / group for top, own in own_groups(proc) for group in (own, *own.parents)]
    return min((limit for folder in folders if (limit := _limit(folder)) is not None), default=None)


def own_groups(proc: Path = Path("/proc/self")) -> Iterator[tuple[Path, PurePosixPath]]:
    """The process's own control groups that can limit CPU time, of version 1 and of version 2, where they are mounted.

    Yields:
        The folder of the highest group that can be seen, and the path from there to the process's own group.
    """
    paths = {}
    for number, controllers, path in re.findall(r"^(\d+):([^:\n]*):(/.*)$", _read(proc / "cgroup"), re.MULTILINE):
        if number == "0" and not controllers:
            paths["cgroup2"] = path
        elif "cpu" in controllers.split(","):
            paths["cgroup"] = path
    mounts = re.findall(
        r"^\S+ \S+ \S+ (/\S*) (/\S*) .*- (cgroup2?) \S+ (\S+)$", _read(proc / "mountinfo"), re.MULTILINE
    )
    for root, mount_point, kind, options in mounts:
        if kind not in paths or (kind == "cgroup" and "cpu" not in options.split(",")):
            continue
        path, top = PurePosixPath(paths[kind]), PurePosixPath(_unescape(root))
        inner = path.relative_to(top) if path.is_relative_to(top) else PurePosixPath()
        if ".." in inner.parts:  # the group lies outside what this container can see
            inner = PurePosixPath()
        yield Path(_unescape(mount_point)), inner


def _limit(folder: Path) -> int | None:
    """The group's own limit: `cpu.max` of version 2, the two files of version 1."""
    words = _read(folder / "cpu.max").split()
    words = words or [*_read(folder / "cpu.cfs_quota_us").split(), *_read(folder / "cpu.cfs_period_us").split()]
    try:
        quota, period = map(int, words)
    except ValueError:  # "max", or no files
        return None
    return -(-quota // period) if quota > 0 and period > 0 else None  # -1 is no limit in version 1


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="surrogateescape")
    except OSError:
        return ""


def _unescape(field: str) -> str:
    """The path in a field of mountinfo, where blanks are written as \\040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
