"""Failures of the commands: one clear line on stderr, an exit code, and a traceback only with --debug."""

import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable

from tqdm import tqdm

from noisepolicy.training.launch import leave, may_report_error, rank, silence_all_but_the_first

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def prepare(command: str) -> None:
    """Silence the libraries and make warnings one line each. Call this before heavy imports."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    # diffusers imports torchao if it is installed, which says what it cannot do on this machine.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)

    def show(message: Warning | str, category: type[Warning], *_: object) -> None:
        if category is UserWarning:
            tqdm.write(f"{command}: warning: {message}", file=sys.stderr)  # above a progress bar, not at its end

    warnings.showwarning = show


def quiet_loading() -> None:
    """Import the libraries and turn off their own progress bars."""
    from diffusers.utils.logging import disable_progress_bar as disable_diffusers_bar
    from transformers.utils.logging import disable_progress_bar as disable_transformers_bar

    disable_diffusers_bar()
    disable_transformers_bar()


def report_failure(command: str, error: Exception, *, is_debug: bool, hint: str = "", rank: int = 0) -> None:
    """Print one line: what is wrong, in which process if it is not the first, and `hint`, what to do now."""
    if is_debug:
        traceback.print_exception(error)
    message = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        message = f"no space left on the disk ({error.strerror})"
    # Another process's progress bar may stand on the line.
    start, place = ("\n", f"rank {rank}: ") if rank else ("", "")
    print(f"{start}{command}: error: {place}{message}{hint}", file=sys.stderr)


def run_command(command: str, body: Callable[[], None], *, is_debug: bool) -> int:
    """Run a command's work; of several processes, only one reports errors.

    Exit codes: 0 done, 2 bad input, 1 failed on the way, 130 interrupted.
    """
    silence_all_but_the_first()
    code = 0
    try:
        body()
    except KeyboardInterrupt:
        print(f"\n{command}: interrupted", file=sys.stderr)
        code = 130
    except (ValueError, RuntimeError, OSError) as error:
        if may_report_error():
            report_failure(command, error, is_debug=is_debug, rank=rank())
        code = 2 if isinstance(error, ValueError) else 1
    leave(code)
    return code
