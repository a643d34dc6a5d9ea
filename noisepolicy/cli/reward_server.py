"""`noisepolicy-reward-server`: a reward over HTTP, for training that runs elsewhere."""

import argparse
import ipaddress
import os
import sys

from noisepolicy.cli.failures import prepare, run_command

_MAX_WAITING = 16  # connections served at once; above it clients are told to come again
_TOKEN_VARIABLE = "NOISEPOLICY_REWARD_TOKEN"


def main(argv: list[str] | None = None) -> int:
    """Run the command. Exit codes: see `run_command`."""
    parser = argparse.ArgumentParser(
        prog="noisepolicy-reward-server",
        description="Serves a reward over HTTP. The bearer token, if any, is the environment variable "
        f"{_TOKEN_VARIABLE}. For other machines, put a proxy that speaks TLS before it.",
    )
    parser.add_argument("--reward", required=True, help="name, weighted sum or module:function, as for training")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="cpu", help="where the reward's models run, e.g. cuda")
    parser.add_argument("--max-body-mb", type=int, default=64, help="largest request, in MiB (default: 64)")
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    arguments = parser.parse_args(argv)
    prepare("noisepolicy-reward-server")
    return run_command("noisepolicy-reward-server", lambda: _serve(arguments), is_debug=arguments.debug)


def _serve(arguments: argparse.Namespace) -> None:
    token = os.environ.get(_TOKEN_VARIABLE)
    if token is None and not _is_loopback(arguments.host):
        raise ValueError(f"--host {arguments.host} lets other machines in: set a token in {_TOKEN_VARIABLE} first")
    if token is not None and (not token.isascii() or not token.isprintable() or not token.strip()):
        raise ValueError(f"{_TOKEN_VARIABLE} must be printable ASCII and not empty")
    if not 0 < arguments.port < 65_536:
        raise ValueError(f"--port {arguments.port} is not a port (1 to 65535)")
    if arguments.max_body_mb < 1:
        raise ValueError(f"--max-body-mb {arguments.max_body_mb} must be 1 or more")
    try:
        import uvicorn

        from noisepolicy.rewards.http_protocol import ImpatientProtocol
        from noisepolicy.rewards.http_server import make_app
    except ImportError as error:
        raise ValueError(f"serving needs {error.name}: pip install 'noisepolicy[server]'") from error
    from noisepolicy.rewards import load_reward

    reward = load_reward(arguments.reward, device=arguments.device)
    app = make_app(reward, token=token, max_body_bytes=arguments.max_body_mb * 1024 * 1024)
    uvicorn.run(
        app,
        host=arguments.host,
        port=arguments.port,
        http=ImpatientProtocol,
        ws="none",
        lifespan="off",
        limit_concurrency=_MAX_WAITING,
        proxy_headers=False,
        server_header=False,
        access_log=False,
        log_level="info",
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    sys.exit(main())
