"""The server against its own OpenAPI document: what schemathesis makes of it, valid and not; and what that found."""

import base64
import http.client
import json
import socket
from pathlib import Path

import pytest
import torch
import yaml

from noisepolicy.rewards.wire import WireError, decode_answer, decode_request

DOCUMENT = Path(__file__).parents[2] / "docs" / "reward_server.openapi.yaml"
TOKEN = "a-token"


@pytest.mark.slow
@pytest.mark.parametrize("is_valid", [True, False])
def test_schemathesis(serve, soak, is_valid):
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings
    from schemathesis import checks

    server = serve("brightness", token=TOKEN)
    operation = schemathesis.openapi.from_path(DOCUMENT)["/"]["POST"]
    mode = schemathesis.GenerationMode.POSITIVE if is_valid else schemathesis.GenerationMode.NEGATIVE
    wanted = [
        checks.not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
        checks.response_headers_conformance,
    ]
    if not is_valid:
        wanted.append(checks.negative_data_rejection)
    num_examples = 20_000 if soak else 40

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=num_examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def check(case):
        response = case.call_and_validate(
            base_url=server.address, headers={"Authorization": f"Bearer {TOKEN}"}, checks=wanted
        )
        assert "Traceback" not in response.text and "/noisepolicy" not in response.text

    check()
    assert "Traceback" not in server.log.read_text()


def test_the_documents_examples_are_answered():
    document = yaml.safe_load(DOCUMENT.read_text())
    examples = document["paths"]["/"]["post"]["requestBody"]["content"]["application/json"]["examples"]
    for name, example in examples.items():
        request = decode_request(json.dumps(example["value"]).encode())
        assert len(request.images) == len(request.prompts) == (name != "empty")


LONG = "9" * 4000
FLOATS = {"prompts": ["a"], "encoding": "float32", "images": base64.b64encode(bytes(192)).decode()}
FINDINGS = {
    "half of a surrogate pair": (b'{"prompts": ["\\ud800"], "images": ["AAAA"]}', "surrogate"),
    "numbers too long to be printed": (
        json.dumps({**FLOATS, "shape": [0, 0, 3, 1, 1]})
        .replace("[0, 0, 3", f"[{'9' * 4000}, {'9' * 4000}, 3")
        .encode(),
        "list of sizes",
    ),
    "no pixels": (json.dumps({**FLOATS, "images": "", "shape": [1, 3, 0, 4]}).encode(), "must have pixels"),
    "no frames": (json.dumps({**FLOATS, "images": "", "shape": [1, 0, 3, 4, 4]}).encode(), "must have pixels"),
}


@pytest.mark.parametrize("name", FINDINGS)
def test_requests_that_were_not_refused(name):
    body, reason = FINDINGS[name]
    with pytest.raises(WireError, match=reason):
        decode_request(body)


def test_an_answer_whose_number_is_too_large():
    with pytest.raises(WireError, match="too large"):
        decode_answer(b'{"rewards": [1' + b"0" * 400 + b"]}", 1)
    assert torch.isinf(decode_answer(b'{"rewards": [1e400]}', 1)["reward"]).all()  # which `Reward` refuses


def test_refusals_have_the_headers_that_http_asks_for(serve):
    server = serve("brightness", token=TOKEN)
    for method, status, header, value in (("POST", 401, "www-authenticate", "Bearer"), ("GET", 405, "allow", "POST")):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        connection.request(method, "/", b"{}")
        response = connection.getresponse()
        assert (response.status, response.getheader(header)) == (status, value)
        connection.close()


@pytest.mark.slow
def test_connections_that_ask_nothing_do_not_lock_others_out(serve):
    server = serve("brightness")
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(40)]
    for number, connection in enumerate(idle):
        connection.sendall(b"POST / HTTP/1.1\r\nHost: " if number % 2 else b"")
        connection.settimeout(60)
    assert all(connection.recv(1) == b"" for connection in idle), "closed by the server"
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("POST", "/", b'{"prompts": [], "images": []}')
    assert connection.getresponse().status == 200
