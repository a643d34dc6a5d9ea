"""Ctrl-C and SIGTERM: what is begun is brought to an end that can be gone on from; a second signal ends at once."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """Handlers for the duration of a `with` block.

    The first signal raises KeyboardInterrupt where it comes, or within `put_off` sets `received`. From then on the
    system's own handlers are in place, so a second one ends the process even where no Python runs.
    """

    received: int | None = None

    def __init__(self) -> None:
        self._is_put_off = False

    def __enter__(self) -> "Signals":
        # One that is ignored, as in a shell's background jobs, stays so.
        self._before = {number: signal.getsignal(number) for number in _SIGNALS}
        for number, handler in self._before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """130 for SIGINT and 143 for SIGTERM, as shells have it."""
        return 128 + (self.received or signal.SIGINT)

    @contextmanager
    def put_off(self) -> Iterator[None]:
        """A block that looks at `received` itself, where it can stop."""
        self._is_put_off = True
        try:
            yield
        finally:
            self._is_put_off = False

    def _handle(self, number: int, _: Any) -> None:
        self.received = number
        for other, handler in self._before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(other, signal.SIG_DFL)
        if not self._is_put_off:
            raise KeyboardInterrupt
        # Not by print, which the signal may have come in the midst of.
        os.write(2, b"\nstopping after this iteration; once more to stop at once\n")
