"""Ctrl-C and SIGTERM: finish the iteration and save a checkpoint. A second signal quits at once."""

import os
import signal
import threading
from collections.abc import Sequence
from typing import Any


class Signals:
    """Signal handlers for the duration of a `with` block.

    The first signal raises KeyboardInterrupt, or sets `received` while `put_off` is held. After it other handlers are
    in place, so a second signal ends the work even where no Python runs.

    Args:
        numbers: Signals to handle.
        second: Handler of a second signal. Default: the system's, which ends the process.
    """

    received: int | None = None

    def __init__(self, numbers: Sequence[int] = (signal.SIGINT, signal.SIGTERM), second: Any = signal.SIG_DFL) -> None:
        self._numbers, self._second = numbers, second
        self.put_off = threading.Lock()
        """Held by work that cannot stop midway; the work checks `received` where it can stop."""
        self._before: dict[int, Any] = {}
        self._depth = 0

    @classmethod
    def of_python(cls) -> "Signals":
        """Make handlers for work inside a user's Python process: Ctrl-C alone, and none outside the main thread."""
        is_main = threading.current_thread() is threading.main_thread()
        return cls((signal.SIGINT,) if is_main else (), signal.default_int_handler)

    def __enter__(self) -> "Signals":
        self._depth += 1
        if self._depth > 1:  # a block within a block of the same handlers
            return self
        # One that is ignored, as in a shell's background jobs, stays so.
        self._before = {number: signal.getsignal(number) for number in self._numbers}
        for number, handler in self._before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """Exit code of the received signal: 130 for SIGINT and 143 for SIGTERM, as in shells."""
        return 128 + (self.received or signal.SIGINT)

    def _handle(self, number: int, _: Any) -> None:
        self.received = number
        for other, handler in self._before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(other, self._second)
        if not self.put_off.locked():
            raise KeyboardInterrupt
        # Not by print, which the signal may have come in the midst of.
        os.write(2, b"\nstopping after this iteration; once more to stop at once\n")
