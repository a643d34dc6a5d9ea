"""The command's own checks; what it answers is tested in tests/rewards/test_http.py."""

import os
import subprocess
import sys

import pytest


def run(*arguments: str, before: str = "pass", token: str | None = None) -> subprocess.CompletedProcess:
    code = f"import sys; {before}; from noisepolicy.cli.reward_server import main; sys.exit(main(sys.argv[1:]))"
    environment = {name: value for name, value in os.environ.items() if name != "NOISEPOLICY_REWARD_TOKEN"}
    if token is not None:
        environment["NOISEPOLICY_REWARD_TOKEN"] = token
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, env=environment
    )


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (["--reward", "pretty"], {}, "unknown reward 'pretty'; choose from"),
        (["--reward", "red", "--host", "0.0.0.0"], {}, "set a token in NOISEPOLICY_REWARD_TOKEN first"),
        (["--reward", "red", "--host", "example.org"], {}, "set a token in NOISEPOLICY_REWARD_TOKEN first"),
        (["--reward", "red"], {"token": ""}, "must be printable ASCII and not empty"),
        (["--reward", "red", "--port", "70000"], {}, "--port 70000 is not a port"),
        (["--reward", "red", "--max-body-mb", "0"], {}, "--max-body-mb 0 must be 1 or more"),
        (["--reward", "red"], {"before": "sys.modules['uvicorn'] = None"}, "pip install 'noisepolicy[server]'"),
        (["--reward", "red"], {"before": "sys.modules['starlette'] = None"}, "pip install 'noisepolicy[server]'"),
    ],
)
def test_bad_input_is_one_line(arguments, options, message):
    done = run(*arguments, **options)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("noisepolicy-reward-server: error: ") and message in done.stderr


def test_help_names_its_defaults():
    done = run("--help")
    assert done.returncode == 0 and "this machine only" in done.stdout and "TOKEN" in done.stdout
