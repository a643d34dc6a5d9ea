"""The client over real sockets: our server, other people's, and servers that misbehave."""

import json
import os
import shutil
import ssl
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from noisepolicy.rewards import Reward, RewardError, load_reward
from noisepolicy.rewards.http_client import HttpReward

IMAGES = torch.rand(5, 3, 16, 24, generator=torch.Generator().manual_seed(0))
PROMPTS = [f"prompt {k}" for k in range(5)]
EXAMPLE = Path(__file__).parents[2] / "examples" / "reward_server_wrapper.py"

pytestmark = pytest.mark.filterwarnings("ignore:.*trying again")


def eight_bits(images: torch.Tensor) -> torch.Tensor:
    return (images * 255).round() / 255


def test_scores_travel(serve):
    server = serve("0.5*red + brightness")
    local = load_reward("0.5*red + brightness")
    metrics = load_reward(server.address).metrics(IMAGES, PROMPTS)
    assert set(metrics) == {"reward", "red", "brightness"}
    torch.testing.assert_close(metrics["reward"], local(eight_bits(IMAGES), PROMPTS), check_dtype=False)
    torch.testing.assert_close(
        load_reward(f"raw({server.address})")(IMAGES, PROMPTS), local(IMAGES, PROMPTS), check_dtype=False
    )
    # 40 images are three requests
    many = torch.rand(40, 3, 8, 8)
    torch.testing.assert_close(
        load_reward(server.address)(many, ["a"] * 40), local(eight_bits(many), ["a"] * 40), check_dtype=False
    )
    assert load_reward(server.address)(IMAGES[:0], []).shape == (0,)


def test_video_travels(serve):
    server = serve("frames(brightness)")
    video = torch.rand(3, 4, 3, 8, 8)
    for address in (server.address, f"raw({server.address})"):
        torch.testing.assert_close(
            load_reward(address)(video, PROMPTS[:3]), video.double().mean((1, 2, 3, 4)), atol=2e-3, rtol=0
        )


def test_the_example_wrapper_is_a_server(serve):
    server = serve(command=[sys.executable, str(EXAMPLE)])
    scores = load_reward(server.address)(torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)]), ["a", "b"])
    assert scores.tolist() == [0.0, 1.0]


SLOW_REWARD = """
import time
def slow(images, prompts):
    time.sleep(0.4)
    return images.mean((1, 2, 3))
"""


def test_server_killed_and_restarted_while_scoring(serve, tmp_path):
    (tmp_path / "slow_reward.py").write_text(SLOW_REWARD)
    server = serve("slow_reward:slow")
    reward = load_reward(f"raw({server.address})")
    images = torch.rand(64, 3, 8, 8)  # four requests of 0.4 s each

    def restart() -> None:
        time.sleep(0.6)  # in the middle of the second
        server.kill()
        time.sleep(0.3)
        server.start()

    restarting = threading.Thread(target=restart)
    restarting.start()
    try:
        torch.testing.assert_close(reward(images, ["a"] * 64), images.mean((1, 2, 3)), check_dtype=False)
    finally:
        restarting.join()
    assert server.log.read_text().count("Started server process") == 2


def test_server_that_stays_away(serve):
    server = serve("brightness")
    reward = Reward("remote", HttpReward(server.address, num_retries=1))
    server.kill()
    with pytest.raises(RewardError, match=r"cannot be reached \(.*refused\), 2 times"):
        reward(IMAGES, PROMPTS)
    with pytest.raises(ValueError, match=f"reward '{server.address}': .*cannot be reached"):
        load_reward(server.address)


def test_tokens(serve, monkeypatch):
    server = serve("brightness", token="right")
    monkeypatch.delenv("NOISEPOLICY_REWARD_TOKEN", raising=False)
    for wrong in (None, "wrong", "righ", "right2"):
        if wrong:
            monkeypatch.setenv("NOISEPOLICY_REWARD_TOKEN", wrong)
        with pytest.raises(ValueError, match="refuses the token"):
            load_reward(server.address)
    monkeypatch.setenv("NOISEPOLICY_REWARD_TOKEN", "right\nX: y")
    with pytest.raises(ValueError, match="must be printable ASCII") as error:
        load_reward(server.address)
    assert "right" not in str(error.value)
    monkeypatch.setenv("NOISEPOLICY_REWARD_TOKEN", "right")
    torch.testing.assert_close(
        load_reward(server.address)(IMAGES, PROMPTS), eight_bits(IMAGES).mean((1, 2, 3)), check_dtype=False
    )


def test_a_token_in_the_clear_is_warned_of(monkeypatch):
    with pytest.warns(UserWarning, match="sent unencrypted to noisepolicy.invalid"), pytest.raises(ValueError):
        HttpReward("http://noisepolicy.invalid", token="secret")


class Misbehaving(BaseHTTPRequestHandler):
    """Answers an empty request rightly, any other as `server.answer(handler)` says."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.num_requests += bool(request["prompts"])
        if request["prompts"]:
            self.server.answer(self)
        else:
            self.say(200, b'{"rewards": []}')

    def say(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def misbehaving():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving)
    server.num_requests = 0
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, b'{"rewards": [1.0]}', "1 values of reward for 5 prompts"),
        (200, b'{"rewards": [[1.0]]}', "reward is not a list of numbers"),
        (200, b'{"rewards": ["1", 2, 3, 4, 5]}', "reward is not a list of numbers"),
        (200, b'{"rewards": [true, 2, 3, 4, 5]}', "reward is not a list of numbers"),
        (200, b'{"scores": []}', "reward is not a list of numbers"),
        (200, b'{"rewards": [1, 2, 3, 4, 5], "metrics": {"strict": [1]}}', "1 values of strict for 5 prompts"),
        (200, b'{"rewards": [1, 2, 3, 4, NaN]}', "returned nan for prompt 'prompt 4'"),
        (200, b"<html>", "does not answer as a reward server: the body is not JSON"),
        (200, b" " * 2_000_000, "more than 1048576 bytes"),
        (302, b"", "answers with status 302"),
        (404, b"<html>", "answers with status 404$"),
        (400, b'{"error": "bad\\u001b[31m\\nline"}', r"answers with status 400: bad \[31m line"),
        (401, b"", "refuses the token"),
    ],
)
def test_wrong_answers_stop_the_run(misbehaving, status, body, message):
    misbehaving.answer = lambda handler: handler.say(status, body, Location="http://127.0.0.1:1/")
    with pytest.raises(RewardError, match=message) as error:
        load_reward(misbehaving.url)(IMAGES, PROMPTS)
    assert "\n" not in str(error.value)
    assert misbehaving.num_requests == 1  # not tried again


def test_a_refusal_of_a_large_body_is_heard(serve):
    server = serve("brightness", "--max-body-mb", "1")
    with pytest.raises(RewardError, match="status 413: the body may have 1048576 bytes"):
        load_reward(f"raw({server.address})")(torch.rand(4, 3, 512, 512), PROMPTS[:4])


def test_metrics_must_keep_their_names(misbehaving):
    answers = iter([b'{"rewards": [%s]}' % b",".join([b"1"] * 16), b'{"rewards": [1], "metrics": {"strict": [1]}}'])
    misbehaving.answer = lambda handler: handler.say(200, next(answers))
    with pytest.raises(RewardError, match="named other metrics"):
        load_reward(misbehaving.url)(torch.rand(17, 3, 8, 8), ["a"] * 17)


def test_unknown_encoding():
    with pytest.raises(ValueError, match="encoding 'jpeg'; choose from png, float32"):
        HttpReward("http://127.0.0.1:1", encoding="jpeg")


def test_passing_trouble_is_tried_again(misbehaving):
    answers = iter([(503, b""), (429, b"{}"), (200, b'{"rewards": [1, 2, 3, 4, 5]}')])
    misbehaving.answer = lambda handler: handler.say(*next(answers))
    assert load_reward(misbehaving.url)(IMAGES, PROMPTS).tolist() == [1, 2, 3, 4, 5]
    assert misbehaving.num_requests == 3


def test_slow_servers(misbehaving):
    def hang(handler: Misbehaving) -> None:
        time.sleep(2)

    def drip(handler: Misbehaving) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(20):
            handler.wfile.write(b" ")
            time.sleep(0.1)

    for answer in (hang, drip):
        misbehaving.answer = answer
        start = time.monotonic()
        with pytest.raises(RewardError, match=r"no answer within 0.4 s, 2 times"):
            Reward("slow", HttpReward(misbehaving.url, timeout_s=0.4, num_retries=1))(IMAGES, PROMPTS)
        assert time.monotonic() - start < 3


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
def test_certificates_are_verified(misbehaving, tmp_path, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "1",
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=DNS:localhost",
            "-keyout",
            str(key),
            "-out",
            str(certificate),
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    misbehaving.socket = context.wrap_socket(misbehaving.socket, server_side=True)
    misbehaving.answer = lambda handler: handler.say(200, b'{"rewards": [1, 2, 3, 4, 5]}')
    port = misbehaving.server_port
    with pytest.raises(ValueError, match="its certificate is not trusted"):
        load_reward(f"https://localhost:{port}")
    monkeypatch.setitem(os.environ, "SSL_CERT_FILE", str(certificate))
    assert load_reward(f"https://localhost:{port}")(IMAGES, PROMPTS).sum() == 15
    with pytest.raises(ValueError, match="its certificate is not trusted"):
        load_reward(f"https://127.0.0.1:{port}")  # another name than the certificate's
