"""A reward behind an address: http:// or https://, the protocol of docs/rewards.md.

Needs the standard library alone. Certificates are verified, redirects and proxies are not followed, and the bearer
token, if any, is read from the environment so that it is in no run folder.
"""

import contextlib
import http.client
import json
import os
import ssl
import time
import warnings
from collections.abc import Sequence
from urllib.parse import urlsplit

import torch

from noisepolicy.rewards.base import RewardError
from noisepolicy.rewards.wire import ENCODINGS, MAX_IMAGES, MAX_PIXELS, WireError, decode_answer, encode_request

TOKEN_VARIABLE = "NOISEPOLICY_REWARD_TOKEN"
_MAX_ANSWER_BYTES = 1024 * 1024
_MAX_BATCH = 16
_PIXELS_A_REQUEST = {"png": MAX_PIXELS, "float32": MAX_PIXELS // 4}  # keeps a request below 64 MiB
_PASSING = (429, 502, 503, 504)  # states of a server that may be gone at the next attempt
_FIRST_WAIT_S = 0.5
_CONNECT_TIMEOUT_S = 10.0
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class HttpReward:
    """Scores by POST requests, a few images each.

    Args:
        address: `http://host:port/path` or https; without user, password or fragment.
        encoding: `png` (8 bits) or `float32` (exact, larger).
        timeout_s: longest silence of the server, and longest time in which it may send the body of an answer.
        num_retries: after a refused or broken connection, a timeout, or status 429, 502, 503 or 504; the wait between
            doubles from half a second.
        token: bearer token; by default that of the environment variable NOISEPOLICY_REWARD_TOKEN.

    Raises:
        ValueError: if the address is malformed, or no reward server answers an empty request there.
    """

    def __init__(
        self,
        address: str,
        *,
        encoding: str = "png",
        timeout_s: float = 300.0,
        num_retries: int = 6,
        token: str | None = None,
    ) -> None:
        if encoding not in ENCODINGS:
            raise ValueError(f"encoding {encoding!r}; choose from {', '.join(ENCODINGS)}")
        self._address = address
        self._encoding = encoding
        self._timeout_s = timeout_s
        self._num_retries = num_retries
        self._token = os.environ.get(TOKEN_VARIABLE) if token is None else token
        self._parse(address)
        try:
            self._request(torch.zeros(0, 3, 1, 1), [], num_retries=0)
        except RewardError as error:
            raise ValueError(f"{error}") from error

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Return the rewards, `(batch,)`."""
        return self.metrics(images, prompts)["reward"]

    def metrics(self, images: torch.Tensor, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return `reward` and the server's further values.

        Raises:
            RewardError: if the server cannot be reached, refuses, or answers something else.
        """
        if images.ndim not in (4, 5) or len(images) != len(prompts):
            raise ValueError(f"images of shape {tuple(images.shape)} with {len(prompts)} prompts")
        num_frames = images.shape[1] if images.ndim == 5 else 1
        pixels = num_frames * images.shape[-2] * images.shape[-1]
        batch = max(1, min(_MAX_BATCH, MAX_IMAGES // num_frames, _PIXELS_A_REQUEST[self._encoding] // max(pixels, 1)))
        results = [
            self._request(images[start : start + batch], prompts[start : start + batch], num_retries=self._num_retries)
            for start in range(0, len(prompts), batch)
        ]
        if not results:
            return {"reward": torch.zeros(0)}
        if any(result.keys() != results[0].keys() for result in results):
            raise RewardError(f"{self._address} named other metrics from one request to the next")
        return {name: torch.cat([result[name] for result in results]) for name in results[0]}

    def _parse(self, address: str) -> None:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.fragment:
            raise ValueError(f"{address!r} is not an address like http://host:port/path (no user, no fragment)")
        self._is_tls, self._host, self._port = parts.scheme == "https", parts.hostname, parts.port
        self._path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if not self._path.isascii() or " " in self._path:
            raise ValueError(f"{address!r} has characters that must be percent-encoded")
        if self._token and not (self._token.isascii() and self._token.isprintable()):
            raise ValueError(f"the token in {TOKEN_VARIABLE} must be printable ASCII")
        if self._token and not self._is_tls and self._host not in LOOPBACK:
            warnings.warn(f"the token is sent unencrypted to {self._host}; use https", UserWarning, stacklevel=3)

    def _request(self, images: torch.Tensor, prompts: Sequence[str], *, num_retries: int) -> dict[str, torch.Tensor]:
        body = encode_request(images, prompts, self._encoding)
        for attempt in range(num_retries + 1):
            try:
                status, answer = self._post(body)
            except ssl.SSLCertVerificationError as error:
                raise RewardError(
                    f"{self._address}: its certificate is not trusted ({error.verify_message})"
                ) from error
            except TimeoutError:
                trouble = f"no answer within {self._timeout_s:g} s"
            except (OSError, http.client.HTTPException) as error:
                trouble = f"cannot be reached ({' '.join(str(error).split()) or type(error).__name__})"
            else:
                if status == 200:
                    return self._decode(answer, len(prompts))
                trouble = _refusal(status, answer)
                if status not in _PASSING:
                    raise RewardError(f"{self._address} {trouble}")
            if attempt < num_retries:
                warnings.warn(f"{self._address}: {trouble}; trying again", UserWarning, stacklevel=2)
                time.sleep(_FIRST_WAIT_S * 2**attempt)
        raise RewardError(f"{self._address}: {trouble}" + (f", {num_retries + 1} times" if num_retries else ""))

    def _decode(self, answer: bytes, num_prompts: int) -> dict[str, torch.Tensor]:
        try:
            return decode_answer(answer, num_prompts)
        except WireError as error:
            raise RewardError(f"{self._address} does not answer as a reward server: {error}") from error

    def _post(self, body: bytes) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        connection = self._connect()
        try:
            # A server that refuses a large body answers and closes before it is all sent; its answer says why.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request("POST", self._path, body, headers)
            response = connection.getresponse()
            deadline = time.monotonic() + self._timeout_s
            answer = bytearray()
            while piece := response.read1(65_536):
                answer += piece
                if len(answer) > _MAX_ANSWER_BYTES:
                    raise RewardError(f"{self._address} answers with more than {_MAX_ANSWER_BYTES} bytes")
                if time.monotonic() > deadline:
                    raise TimeoutError
            return response.status, bytes(answer)
        finally:
            connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        if self._is_tls:
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                self._host, self._port, timeout=_CONNECT_TIMEOUT_S, context=ssl.create_default_context()
            )
        else:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=_CONNECT_TIMEOUT_S)
        try:
            connection.connect()
        except TimeoutError as error:
            raise ConnectionError(f"no connection within {_CONNECT_TIMEOUT_S:g} s") from error
        connection.sock.settimeout(self._timeout_s)
        return connection


class RawHttpReward(HttpReward):
    """`HttpReward` with float32 images."""

    def __init__(self, address: str) -> None:
        super().__init__(address, encoding="float32")


def _refusal(status: int, answer: bytes) -> str:
    """Return the status and the server's explanation of it, cut short and on one line."""
    if status == 401:
        return f"refuses the token (status 401); set {TOKEN_VARIABLE}"
    try:
        message = json.loads(answer)
    except (ValueError, RecursionError):
        message = None
    reason = message.get("error") if isinstance(message, dict) else None
    shown = "".join(c if c.isprintable() else " " for c in reason)[:200] if isinstance(reason, str) else ""
    return f"answers with status {status}" + (f": {shown}" if shown else "")
