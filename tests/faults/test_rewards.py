"""Rewards that are slow, dead, restarted or lying, over real sockets, and numbers that are none."""

import contextlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from stub_world import left_or_right

from noisepolicy.rewards.wire import decode_request, encode_answer
from noisepolicy.training.checkpoint import whole_checkpoints

pytestmark = pytest.mark.slow


class RewardServer:
    """`stub_world:left_or_right` behind an address, until told to do otherwise."""

    def __init__(self) -> None:
        self.answer = lambda rewards: encode_answer({"reward": rewards})
        self.port = 0
        self.start()
        self.address = f"http://127.0.0.1:{self.port}/score"

    def start(self) -> None:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # the base class' name
                request = decode_request(self.rfile.read(int(self.headers["Content-Length"])))
                rewards = left_or_right(request.images, request.prompts) if len(request.prompts) else torch.zeros(0)
                body = server.answer(rewards)
                with contextlib.suppress(OSError):
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        ThreadingHTTPServer.allow_reuse_address = True
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server():
    server = RewardServer()
    yield server
    server.stop()


@pytest.fixture
def served_run(make_run, server):
    """A run in its fourth iteration or beyond, with float32 pictures sent: the rewards are the local ones' bits."""
    run = make_run()
    run.start_new("--reward", f"raw({server.address})", "--checkpoint-every", "1")
    run.wait_for_iteration(2)
    return run


def assert_same_training(run, whole):
    assert (run.path / "metrics.jsonl").read_text() == (whole.path / "metrics.jsonl").read_text()
    assert (run.path / "history" / "rows.bin").read_bytes() == (whole.path / "history" / "rows.bin").read_bytes()


def test_slow(served_run, server, whole_run):
    usual = server.answer
    server.answer = lambda rewards: time.sleep(0.2) or usual(rewards)
    assert_same_training(served_run.finish(), whole_run)


def test_restarted(served_run, server, whole_run):
    server.stop()
    time.sleep(0.1)
    server.start()
    assert_same_training(served_run.finish(), whole_run)


BAD_ANSWERS = {
    "too few scores": (lambda rewards: encode_answer({"reward": rewards[1:]}), "does not answer as a reward server"),
    "not a number": (lambda rewards: b'{"rewards": [' + b", ".join([b"NaN"] * len(rewards)) + b"]}", "127.0.0.1"),
    "no JSON": (lambda rewards: b"<html>", "does not answer as a reward server"),
    "dead": (None, "cannot be reached"),
}


@pytest.mark.parametrize("case", BAD_ANSWERS)
def test_lying_or_dead(served_run, server, whole_run, case):
    answer, message = BAD_ANSWERS[case]
    usual = server.answer
    if answer is None:
        server.stop()
    else:
        server.answer = answer
    assert served_run.wait() == 1, served_run.stderr
    assert message in served_run.error and "nothing is lost; go on with: " in served_run.error
    assert next(whole_checkpoints(served_run.path / "checkpoints")).progress["iteration"] >= 1
    server.answer = usual
    if answer is None:
        server.start()
    served_run.start("--resume", "run")
    assert_same_training(served_run.finish(), whole_run)


@pytest.mark.parametrize(
    ("file", "message"),
    [("nan-rewards", "returned nan for prompt"), ("nan-pictures", "returned nan for prompt")],
)
def test_not_a_number_from_the_reward_or_the_model(stopped_run, whole_run, file, message):
    (stopped_run.folder / file).touch()
    stopped_run.resume()
    assert stopped_run.wait() == 1 and message in stopped_run.error
    (stopped_run.folder / file).unlink()
    stopped_run.resume()
    stopped_run.finish().assert_same(whole_run)
