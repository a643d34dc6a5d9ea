"""A reward as a small web application, the other end of `http_client.py`.

Needs starlette. One request is scored at a time; others wait. Answers to bad requests say what was wrong with them and
nothing of this machine; what the reward raised goes to the log.
"""

import asyncio
import hmac
import json
import logging
from collections.abc import Mapping
from functools import partial

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from noisepolicy.rewards.base import Reward
from noisepolicy.rewards.wire import WireError, decode_request, encode_answer

_BODY_TIMEOUT_S = 60.0
_log = logging.getLogger("uvicorn.error")


class _RefusedError(Exception):
    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def make_app(reward: Reward, *, token: str | None, max_body_bytes: int) -> Starlette:
    """Make an application for POST requests at `/`; `token`, if given, must come as `Authorization: Bearer`."""
    turn = asyncio.Lock()

    async def score(request: Request) -> Response:
        try:
            _check_token(request, token)
            body = await asyncio.wait_for(_read_body(request, max_body_bytes), _BODY_TIMEOUT_S)
            async with turn:
                return Response(await asyncio.to_thread(_score, reward, body), media_type="application/json")
        except _RefusedError as error:
            return _refusal(error.status, str(error), {"WWW-Authenticate": "Bearer"} if error.status == 401 else None)
        except (asyncio.TimeoutError, TimeoutError):
            return _refusal(408, "the body came too slowly")
        except ClientDisconnect:
            return _refusal(400, "the connection was closed")

    return Starlette(
        routes=[Route("/", score, methods=["POST"])],
        exception_handlers={
            404: partial(_plain, reason="there is nothing here"),
            405: partial(_plain, reason="use POST"),
            Exception: partial(_plain, reason="the server failed; its log says why"),
        },
    )


def _check_token(request: Request, token: str | None) -> None:
    given = request.headers.get("authorization", "")
    if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        raise _RefusedError(401, "wrong or missing token")


async def _read_body(request: Request, max_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "0")
    body = bytearray()
    if not declared.isdecimal() or int(declared) > max_bytes:
        raise _RefusedError(413, f"the body may have {max_bytes} bytes")
    async for piece in request.stream():
        body += piece
        if len(body) > max_bytes:
            raise _RefusedError(413, f"the body may have {max_bytes} bytes")
    return bytes(body)


def _score(reward: Reward, body: bytes) -> bytes:
    try:
        request = decode_request(body)
    except WireError as error:
        raise _RefusedError(400, str(error)) from error
    if not request.prompts:
        return encode_answer({"reward": request.images.new_zeros(0)})
    try:
        return encode_answer(reward.metrics(request.images, request.prompts))
    except Exception as error:  # whatever the reward raises; the client must not see it
        _log.exception("the reward failed")
        raise _RefusedError(500, "the reward failed; the server's log says why") from error


def _refusal(status: int, reason: str, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps({"error": reason}), status_code=status, media_type="application/json", headers=headers)


async def _plain(request: Request, error: Exception, *, reason: str) -> Response:
    return _refusal(getattr(error, "status_code", 500), reason, getattr(error, "headers", None))
