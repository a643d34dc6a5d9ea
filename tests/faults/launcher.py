"""Starts `noisepolicy-train` on the stub model in forks of one process that has imported everything; see `Launcher`.

Reads requests from stdin, one JSON a line, and answers in kind. A run is a process like any other, but for the ten
seconds of imports that it is spared.
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch

import noisepolicy.evaluation.report
import noisepolicy.training.find
import noisepolicy.training.run
import noisepolicy.training.task
from noisepolicy.cli.failures import quiet_loading
from noisepolicy.cli.train import main
from noisepolicy.rewards import http_client

sys.path.insert(0, str(Path(__file__).parent))
from stub_world import StubModel


def start(arguments, folder, max_file_bytes):
    """Forks; the child's output goes to `folder`/stdout and stderr."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if max_file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    code = 70
    try:
        code = main(arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid, timeout_s):
    """The exit code, -N for signal N, or None while it runs."""
    deadline = time.monotonic() + timeout_s
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.002)


if __name__ == "__main__":
    torch.set_num_threads(1)
    quiet_loading()
    noisepolicy.training.task.load_model = lambda *_, **__: StubModel()
    http_client._FIRST_WAIT_S = 0.02
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps({"start": start, "wait": wait}[request.pop("do")](**request)), flush=True)
