"""The server over a real socket: what it refuses, and what its answers do not tell."""

import base64
import http.client
import io
import json
import random
import re
import socket
import struct
import zlib

import pytest
import torch
from PIL import Image

from noisepolicy.rewards import RewardError, load_reward


def post(server, body: bytes, path: str = "/", method: str = "POST", **headers) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    assert "server" not in {name.lower() for name in response.headers}
    assert not any(trace in answer for trace in (b"Traceback", b'File "', b"/noisepolicy", b".py"))
    return response.status, json.loads(answer)


def png(width: int = 8, height: int = 8) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def crafted_png(width: int, height: int, *chunks: bytes) -> str:
    """A few bytes that claim to be so large."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0" * 100_000))
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + data + chunk(b"IEND", b"")).decode()


def jpeg() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    return base64.b64encode(buffer.getvalue()).decode()


def pixels(*shape: int, value: float = 0.5) -> dict:
    block = torch.full(shape, value).numpy().tobytes()
    return {"encoding": "float32", "shape": list(shape), "images": base64.b64encode(block).decode()}


GOOD = json.dumps({"prompts": ["a"], "images": [png()]}).encode()
BAD_BODIES = {
    "empty": (b"", "not JSON"),
    "binary": (b"\xff\xfe\x00", "not JSON"),
    "deep": (b"[" * 200_000, "not JSON"),
    "list": (b"[]", "not a JSON object"),
    "no prompts": ({"images": []}, "prompts must be a list of texts"),
    "odd prompt": ({"prompts": [1], "images": [png()]}, "prompts must be a list of texts"),
    "long prompt": ({"prompts": ["a" * 10_001], "images": [png()]}, "longer than 10000"),
    "fewer images": ({"prompts": ["a", "b"], "images": [png()]}, "1 images but 2 prompts"),
    "no images": ({"prompts": ["a"]}, "images must be a list"),
    "not base64": ({"prompts": ["a"], "images": ["%%%"]}, "not base64"),
    "not text": ({"prompts": ["a"], "images": [5]}, "must be base64 text"),
    "not png": ({"prompts": ["a"], "images": [jpeg()]}, "not a PNG"),
    "cut png": ({"prompts": ["a"], "images": [png(64, 64)[:80]]}, "damaged|not a PNG"),
    "two sizes": ({"prompts": ["a", "b"], "images": [png(), png(9, 8)]}, "must have one size"),
    "uneven video": ({"prompts": ["a", "b"], "images": [[png()], [png(), png()]]}, "same number of frames"),
    "empty video": ({"prompts": ["a"], "images": [[]]}, "same number of frames"),
    "too many": ({"prompts": ["a"] * 65, "images": [png()] * 65}, "65 images; a request may carry 64"),
    "bomb": ({"prompts": ["a"], "images": [crafted_png(60_000, 60_000)]}, "not a PNG, or too large"),
    "wide": ({"prompts": ["a"], "images": [crafted_png(9000, 9000)]}, "2048 a side"),
    "many large": ({"prompts": ["a"] * 3, "images": [crafted_png(2000, 2000)] * 3}, "8388608 pixels in all"),
    "text bomb": (
        {"prompts": ["a"], "images": [crafted_png(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 80_000_000)))]},
        "not a PNG, or too large",
    ),
    "encoding": ({"prompts": ["a"], "encoding": "pickle", "images": ""}, "encoding must be one of"),
    "shape": ({"prompts": ["a"], **pixels(1, 3, 4, 4), "shape": [1, 3, 4, 5]}, "192 bytes, their shape needs 240"),
    "negative": ({"prompts": ["a"], **pixels(1, 3, 4, 4), "shape": [-1, 3, -4, 4]}, "list of sizes"),
    "boolean": ({"prompts": ["a"], **pixels(1, 3, 4, 4), "shape": [True, 3, 4, 4]}, "list of sizes"),
    "channels": ({"prompts": ["a"], **pixels(1, 4, 4, 4)}, "shape must be"),
    "huge": ({"prompts": ["a"], **pixels(1, 3, 4, 4), "shape": [1, 3, 10**9, 10**9]}, "2048 a side"),
    "nan": ({"prompts": ["a"], **pixels(1, 3, 4, 4, value=float("nan"))}, r"must lie in \[0, 1\]"),
    "range": ({"prompts": ["a"], **pixels(1, 3, 4, 4, value=2.0)}, r"must lie in \[0, 1\]"),
}


def test_bad_bodies_are_refused(serve):
    server = serve("brightness", "--max-body-mb", "1")
    for name, (body, reason) in BAD_BODIES.items():
        status, answer = post(server, body if isinstance(body, bytes) else json.dumps(body).encode())
        assert status == 400, (name, status, answer)
        assert re.search(reason, answer["error"]), (name, answer)
    assert post(server, b" " * (1024 * 1024 + 1))[0] == 413
    assert post(server, iter([b" " * 600_000] * 2))[0] == 413  # chunked: no length is declared
    assert post(server, b"", method="GET") == (405, {"error": "use POST"})
    assert post(server, b"", path="/../../etc/passwd") == (404, {"error": "there is nothing here"})
    assert post(server, GOOD) == (200, {"rewards": [0.0]})


def test_damaged_pngs_never_break_the_server(serve):
    server = serve("brightness")
    good = base64.b64decode(png(16, 16))
    random.seed(0)
    for _ in range(200):
        data = bytearray(good)
        for _ in range(random.randint(1, 4)):
            data[random.randrange(8, len(data))] = random.randrange(256)
        body = json.dumps({"prompts": ["a"], "images": [base64.b64encode(data).decode()]}).encode()
        assert post(server, body)[0] in (200, 400)


def test_what_the_reward_raises_stays_at_the_server(serve, tmp_path):
    (tmp_path / "failing_reward.py").write_text(
        "def fail(images, prompts):\n    raise OSError('/secret/path is gone')\n"
    )
    server = serve("failing_reward:fail")
    status, answer = post(server, GOOD)
    assert status == 500 and answer == {"error": "the reward failed; the server's log says why"}
    assert "/secret/path is gone" in server.log.read_text()
    with pytest.raises(RewardError, match="status 500: the reward failed"):
        load_reward(server.address)(torch.zeros(1, 3, 8, 8), ["a"])


def test_a_body_that_comes_too_slowly_does_not_hold_up_others(serve):
    server = serve("brightness")
    with socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        assert post(server, GOOD) == (200, {"rewards": [0.0]})


def test_wrong_tokens(serve):
    server = serve("brightness", token="right")
    for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "right"}, {"Authorization": "Bearer r\xe9"}):
        assert post(server, GOOD, **given) == (401, {"error": "wrong or missing token"})
    assert post(server, GOOD, Authorization="Bearer right")[0] == 200
