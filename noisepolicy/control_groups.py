"""Reads how much CPU time Linux's control groups let this process use."""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def cpu_quota(proc: Path = Path("/proc/self")) -> int | None:
    """Return how many CPUs the process's control groups let run at once, rounded up; None if they set no limit.

    The smallest limit of the process's own group and those above it holds. A limit of 1.5 CPUs counts as 2: two
    threads that sleep while they wait can use all of it, one thread cannot. A file that cannot be read sets no limit.

    Args:
        proc: the process's folder in /proc, with the files `cgroup` and `mountinfo`.
    """
    folders = [top / group for top, own in own_groups(proc) for group in (own, *own.parents)]
    return min((limit for folder in folders if (limit := _limit(folder)) is not None), default=None)


def own_groups(proc: Path = Path("/proc/self")) -> Iterator[tuple[Path, PurePosixPath]]:
    """Find the process's own control groups that can limit CPU time, of versions 1 and 2, where they are mounted.

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
    """Return the group's own limit: `cpu.max` of version 2, the two files of version 1."""
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
    """Return the path in a field of mountinfo, where blanks are written as \\040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
