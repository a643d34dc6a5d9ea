"""Runs the commands in forks of one process that has imported everything; `Launcher` of commands.py talks to it.

Reads requests from stdin, one JSON a line, and answers in kind. A run is a process like any other, with its own exit
code, signals and limits, but for its imports. Several processes of a run have torchrun's own agent as their parent.
"""

import importlib
import json
import os
import pkgutil
import resource
import runpy
import signal
import sys
import threading
import time
import traceback
import uuid
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from tqdm import tqdm

import noisepolicy.cli.eval
import noisepolicy.cli.export
import noisepolicy.cli.generate
import noisepolicy.cli.reward_server
import noisepolicy.cli.train
import noisepolicy.evaluation
import noisepolicy.training
from noisepolicy.cli.failures import quiet_loading
from noisepolicy.frozen import FrozenDiffusersPipeline
from noisepolicy.worlds.shapes import model_folder


def start(program, arguments, folder, output, environment, max_file_bytes, num_processes, max_restarts):
    """Forks; the child's output is added to `output`/stdout and stderr."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 70
    try:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{output}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if max_file_bytes:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
        code = launch(program, arguments, num_processes, max_restarts) if num_processes else run(program, arguments)
    finally:
        leave(code)


def run(program, arguments):
    """Do as `noisepolicy-PROGRAM` does, or a script if `program` is the path of one; return the exit code."""
    try:
        if program.endswith(".py"):
            sys.argv = [program, *arguments]
            sys.path.insert(0, str(Path(program).parent))
            runpy.run_path(program, run_name="__main__")
            return 0
        sys.argv = [f"noisepolicy-{program}", *arguments]
        return importlib.import_module(f"noisepolicy.cli.{program}").main(arguments)
    except SystemExit as request:
        return request.code or 0
    except BaseException:
        traceback.print_exc()
        return 1


def launch(program, arguments, num_processes, max_restarts):
    """Do as `torchrun --standalone` does, but fork the processes; return its exit code."""
    config = LaunchConfig(
        1,
        1,
        num_processes,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max_restarts,
        start_method="fork",
    )
    try:
        elastic_launch(config, run_rank)(program, arguments)
    except (ChildFailedError, SignalException):
        return 1
    return 0


def run_rank(program, arguments):
    """Return to the agent only after a success: it waits for that, and takes an exit for a failure."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # those that the agent handles
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if code := run(program, arguments):
        leave(code)


def leave(code):
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


def serve():
    """Imports what the commands import when they run, then answers until stdin ends."""
    torch.set_num_threads(1)
    # tqdm's own lock is one semaphore of all forks: a run killed while it holds it would stop every later one.
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0  # and a thread could hold this one while we fork
    quiet_loading()
    for package in (noisepolicy.training, noisepolicy.evaluation):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    FrozenDiffusersPipeline.from_pretrained(model_folder())
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps({"start": start, "wait": wait}[request.pop("do")](**request)), flush=True)


if __name__ == "__main__":
    serve()
