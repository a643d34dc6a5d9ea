"""How many threads the commands compute with and how they wait: by made-up and real control groups, and by libgomp."""

import os
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from noisepolicy.benchmarks.scale.sharing import group_of_one_cpu
from noisepolicy.cli import threads

OWN = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SCRIPTS = Path(sys.executable).parent
CPUS = sorted(os.sched_getaffinity(0))
IMPORT = [sys.executable, "-c", "import noisepolicy.cli, torch; print(torch.get_num_threads())"]


def make_proc(folder, groups, files, *, root="/"):
    """A folder like /proc/self, of a process in `groups`, with each version mounted in a folder of `files`.

    `files` maps paths below v1/ and v2/, where the two versions are mounted, to the files' bytes.
    """
    (folder / "cgroup").write_text("".join(f"{line}\n" for line in groups))
    mount_point = str(folder).replace(" ", "\\040")
    (folder / "mountinfo").write_text(
        f"22 27 0:21 / /proc rw,relatime - proc proc rw\n"
        f"30 27 0:9 {root} {mount_point}/sets rw shared:4 - cgroup cgroup rw,cpuset\n"
        f"31 27 0:26 {root} {mount_point}/v1 rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
        f"32 27 0:27 {root} {mount_point}/v2 rw,nosuid - cgroup2 none rw,nsdelegate\n"
    )
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize(
    ("text", "quota"),
    [
        (b"100000 100000\n", 1),
        (b"50000 100000\n", 1),
        (b"150000 100000\n", 2),
        (b"200001 100000\n", 3),
        (b"1600000 100000\n", 16),
        (b"max 100000\n", None),
        (b"max\n", None),
        (b"", None),
        (b"\n", None),
        (b"100000\n", None),
        (b"-1 100000\n", None),
        (b"0 100000\n", None),
        (b"100000 0\n", None),
        (b"100000 -5\n", None),
        (b"1 2 3\n", None),
        (b"1.5 1\n", None),
        (b"no number\n", None),
        (b"\xff\xfe\0", None),
    ],
)
def test_limit_of_one_group(tmp_path, text, quota):
    assert threads.cpu_quota(make_proc(tmp_path, ["0::/job"], {"v2/job/cpu.max": text})) == quota


@pytest.mark.parametrize(
    ("quota_us", "period_us", "quota"),
    [
        (b"250000\n", b"100000\n", 3),
        (b"-1\n", b"100000\n", None),
        (b"20000\n", b"10000\n", 2),
        (b"", b"", None),
        (b"100000\n", b"", None),
        (b"100000\n", None, None),
        (b"max\n", b"100000\n", None),
    ],
)
def test_limit_of_one_group_of_version_1(tmp_path, quota_us, period_us, quota):
    files = {"v1/job/cpu.cfs_quota_us": quota_us, "v1/job/cpu.cfs_period_us": period_us}
    proc = make_proc(
        tmp_path, ["5:cpuset:/", "4:cpu,cpuacct:/job"], {name: data for name, data in files.items() if data is not None}
    )
    assert threads.cpu_quota(proc) == quota


@pytest.mark.parametrize(
    ("limits", "quota"),
    [
        ({"": None, "a": b"400000 100000", "a/b": b"max 100000", "a/b/c": b"800000 100000"}, 4),
        ({"": None, "a": b"max 100000", "a/b": None, "a/b/c": b"200000 100000"}, 2),
        ({"": b"300000 100000", "a": b"nonsense", "a/b": b"", "a/b/c": b"max 100000"}, 3),
        ({"": None, "a": None, "a/b": None, "a/b/c": None, "a/b/c/child": b"100000 100000", "z": b"1 1"}, None),
    ],
    ids=["above", "own", "top", "only others"],
)
def test_the_smallest_limit_from_the_group_up_holds(tmp_path, limits, quota):
    files = {f"v2/{path}/cpu.max": data for path, data in limits.items() if data is not None}
    assert threads.cpu_quota(make_proc(tmp_path, ["0::/a/b/c"], files)) == quota


def test_both_versions_count(tmp_path):
    files = {"v1/a/cpu.cfs_quota_us": b"300000", "v1/a/cpu.cfs_period_us": b"100000", "v2/b/cpu.max": b"500000 100000"}
    folder = tmp_path / "a folder"  # a blank is written as \040
    folder.mkdir()
    assert threads.cpu_quota(make_proc(folder, ["3:cpu:/a", "0::/b"], files)) == 3


@pytest.mark.parametrize(
    ("root", "path", "file"),
    [
        ("/docker/1f", "/docker/1f", "v2/cpu.max"),
        ("/docker/1f", "/docker/1f/job", "v2/job/cpu.max"),
        ("/docker/1f", "/somewhere/else", "v2/cpu.max"),
        ("/", "/../other", "v2/cpu.max"),
        ("/docker/1", "/docker/1f", "v2/cpu.max"),
    ],
)
def test_a_container_sees_a_part_of_the_tree(tmp_path, root, path, file):
    assert threads.cpu_quota(make_proc(tmp_path, [f"0::{path}"], {file: b"200000 100000"}, root=root)) == 2


@pytest.mark.parametrize("groups", [[], ["", "::", "x:y:z", "0::", "7", "0::no-slash", "1:cpuset:/a", "2:cpuacct:/a"]])
def test_a_process_in_no_group_has_no_limit(tmp_path, groups):
    files = dict.fromkeys(("v2/cpu.max", "v2/a/cpu.max", "sets/a/cpu.max", "v1/a/cpu.max"), b"100000 100000")
    assert threads.cpu_quota(make_proc(tmp_path, groups, files)) is None


def test_what_is_missing_or_cannot_be_read_is_no_limit(tmp_path):
    assert threads.cpu_quota(tmp_path / "missing") is None
    proc = make_proc(tmp_path, ["0::/job"], {"v2/job/cpu.max/file": b""})
    assert threads.cpu_quota(proc) is None
    (proc / "mountinfo").write_bytes(b"1 2\n - cgroup2\n\xff - cgroup2 none rw\n32 27 0:27 / - cgroup2 none rw\n")
    assert threads.cpu_quota(proc) is None


@pytest.mark.parametrize(
    ("quota", "given", "num_threads"),
    [
        (1, {}, "1"),
        (2, {}, None),
        (None, {}, None),
        (1, {"OMP_NUM_THREADS": "2"}, "2"),
        (1, {"OMP_NUM_THREADS": ""}, "1"),
    ],
)
def test_a_quota_below_the_cpus_limits_threads(monkeypatch, quota, given, num_threads):
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(os, "environ", dict(given))
    monkeypatch.delitem(sys.modules, "torch")
    threads.configure_threads()
    assert os.environ.get("OMP_NUM_THREADS") == num_threads


def test_nothing_is_set_once_torch_is_imported(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    threads.configure_threads()
    assert os.environ == {}


def start(command, *, cpus=CPUS, group=None, cwd=None, **settings):
    """Run a command without the settings of this process; return its output and what libgomp says that it read."""

    def enter():
        os.sched_setaffinity(0, cpus)
        if group:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    environment = {name: value for name, value in os.environ.items() if name not in OWN}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE"} | settings
    done = subprocess.run(
        [*map(str, command)], env=environment, cwd=cwd, capture_output=True, text=True, preexec_fn=enter, timeout=300
    )
    return done.stdout, re.findall(r"(\w+) = '([^']*)'", done.stderr)


@pytest.mark.parametrize(
    "command",
    [
        ["noisepolicy-train", "--config", "missing.yaml"],
        pytest.param(["noisepolicy-eval", "missing"], marks=pytest.mark.slow),
        pytest.param(["noisepolicy-generate", "missing", "a red circle"], marks=pytest.mark.mutants),
        pytest.param(["noisepolicy-export", "missing", "--output-dir", "here"], marks=pytest.mark.mutants),
        pytest.param(["noisepolicy-bench", "--list-backends"], marks=pytest.mark.mutants),
        pytest.param(["noisepolicy-reward-server", "--reward", "missing"], marks=pytest.mark.slow),
    ],
    ids=lambda command: command[0],
)
def test_threads_of_every_command_sleep_while_they_wait(tmp_path, command):
    _, read = start([SCRIPTS / command[0], *command[1:]], cwd=tmp_path)
    assert {("OMP_WAIT_POLICY", "PASSIVE"), ("GOMP_SPINCOUNT", "1000")} <= set(read)


@pytest.mark.slow
def test_processes_of_torchrun_have_a_thread_each(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    _, read = start([*command, "-m", "noisepolicy.cli.eval", "missing"], cwd=tmp_path)
    # Once for each copy of OpenMP that a process loads; some packages bring one of their own.
    assert read.count(("GOMP_SPINCOUNT", "1000")) == read.count(("OMP_NUM_THREADS", "1")) >= 2


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ("OMP_WAIT_POLICY", "ACTIVE")),
        ({"GOMP_SPINCOUNT": "7"}, ("GOMP_SPINCOUNT", "7")),
        ({"KMP_BLOCKTIME": "5"}, ("GOMP_SPINCOUNT", "300000")),
        ({"OMP_NUM_THREADS": "1"}, ("OMP_NUM_THREADS", "1")),
    ],
    ids=str,
)
def test_settings_of_the_user_stay(settings, expected):
    printed, read = start(IMPORT, **settings)
    assert expected in read
    assert int(printed) == int(settings.get("OMP_NUM_THREADS", printed))


def test_one_cpu_means_one_thread():
    assert start(IMPORT, cpus=CPUS[:1])[0] == "1\n"


@pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs")
def test_a_real_quota_of_one_cpu_means_one_thread():
    with ExitStack() as stack:
        try:
            group = stack.enter_context(group_of_one_cpu())
        except RuntimeError as error:
            pytest.skip(str(error))
        assert start(IMPORT, group=group)[0] == "1\n"
        assert start(IMPORT, group=group, OMP_NUM_THREADS="2")[0] == "2\n"
