"""Launchers (torchrun, `accelerate launch`): their settings, the meeting of processes, and the one that prints."""

import os
import socket
import sys
import time
import warnings
from contextlib import suppress
from datetime import timedelta
from typing import Any

_HEAD_START_S = 1.0
_CONNECT_S = 5.0
_ADDRESS = "noisepolicy/store"


def rank() -> int:
    """Return this process's rank, 0 for a process alone."""
    return int(os.environ.get("RANK", 0))


def num_ranks() -> int:
    """Return the number of processes that were launched together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def launch_id() -> str | None:
    """Return torchrun's name of this launch, the same after each restart; None if it has no name of its own."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if name == "none" else name


def is_restart() -> bool:
    """Tell whether torchrun says that it started these processes before; it may not know of a machine that was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def silence_all_but_the_first() -> None:
    """Let only rank 0 print and warn. Errors are not silenced, see `may_report_error`."""
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
        warnings.simplefilter("ignore")


def join_processes(timeout_s: float) -> None:
    """Start torch.distributed, by gloo, for torchrun's processes; Accelerate starts it for other launchers.

    torchrun's store outlives a restart and keeps the addresses of dead processes. So rank 0 makes a new store, and
    writes its address to torchrun's.

    Raises:
        RuntimeError: if the other processes do not come in time.
    """
    import torch.distributed as dist

    if num_ranks() == 1 or dist.is_initialized() or not _has_launcher_store():
        return
    limit = timedelta(seconds=timeout_s)
    lent = _launcher_store()
    if rank() == 0:
        store = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=limit)
        lent.set(_ADDRESS, f"{_own_address()} {store.port}")
    else:
        store = _find_store(lent, time.monotonic() + timeout_s)
        store.set_timeout(limit)
    dist.init_process_group("gloo", store=store, rank=rank(), world_size=num_ranks(), timeout=limit)


def may_report_error() -> bool:
    """Tell whether this process should report its error: the first that asks may, or rank 0 if it asks soon.

    After one process has failed, most others fail too, at the same thing or at its absence.
    """
    if num_ranks() == 1:
        return True
    if rank() > 0:
        time.sleep(_HEAD_START_S)
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store

    try:
        if _has_launcher_store():
            lent = _launcher_store()
            attempt = [os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")]
            attempt += [lent.get(_ADDRESS).decode()] if lent.check([_ADDRESS]) else []
            return lent.add(f"noisepolicy/error/{attempt}", 1) == 1
        if dist.is_initialized():
            return _get_default_store().add("noisepolicy/error", 1) == 1
    except RuntimeError:  # whoever keeps the store is gone
        return rank() <= 1
    return True


def leave(code: int) -> None:
    """End one process of several, after an error at once, since the others may hang. A process alone returns."""
    if num_ranks() == 1:
        return
    import torch.distributed as dist

    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if dist.is_initialized():
        dist.destroy_process_group()


def _has_launcher_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _launcher_store() -> Any:
    import torch.distributed as dist

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_CONNECT_S))


def _own_address() -> str:
    """Return this machine's address as others see it, by the connection to the launcher's store."""
    with socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))) as connection:
        return connection.getsockname()[0]


def _find_store(lent: Any, deadline: float) -> Any:
    """Connect to rank 0's store, once its address is not that of an earlier start."""
    import torch.distributed as dist

    while True:
        with suppress(OSError, RuntimeError):  # nobody is there yet
            if lent.check([_ADDRESS]):
                address, port = lent.get(_ADDRESS).decode().split()
                # Where nobody listens, a TCPStore would wait and print warnings.
                socket.create_connection((address, int(port)), timeout=_CONNECT_S).close()
                limit = timedelta(seconds=_CONNECT_S)
                return dist.TCPStore(address, int(port), is_master=False, timeout=limit)
        if time.monotonic() > deadline:
            raise RuntimeError("rank 0 did not start in time")
        time.sleep(0.1)
