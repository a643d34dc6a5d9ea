"""uvicorn's HTTP/1.1 without its patience for connections that ask nothing."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS_TIMEOUT_S = 10.0


class ImpatientProtocol(H11Protocol):
    """Closes a connection that has not sent the whole head of a request in ten seconds, or of the next one.

    uvicorn waits for a head without end and counts the connection meanwhile: as many as its limit, opened and left,
    and nobody else is served. The body has a limit of its own, in `http_server.py`.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_request_after(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        answered = self.cycle
        super().on_response_complete()
        self._expect_request_after(answered)

    def _expect_request_after(self, answered: Any) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(HEADERS_TIMEOUT_S, self._close_unless_asked, answered)

    def _close_unless_asked(self, answered: Any) -> None:
        # uvicorn makes a cycle when it has read a head.
        if self.cycle is answered and not self.transport.is_closing():
            self.transport.close()
