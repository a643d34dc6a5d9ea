"""`noisepolicy COMMAND ...`: all commands under one name; `noisepolicy train` is `noisepolicy-train`."""

import importlib
import sys

_COMMANDS = {
    "train": "train a policy",
    "generate": "make pictures with a policy",
    "eval": "measure a policy beside the base model",
    "export": "export a model and a policy to files that run without PyTorch",
    "demo": "open a page to try a policy",
    "vote": "open a page to vote on pairs of pictures, which are searched for by the votes",
    "reward-server": "serve a reward over HTTP",
    "bench": "measure kernels, latency and methods",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command that the first argument names."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in _COMMANDS:
        return importlib.import_module(f"noisepolicy.cli.{argv[0].replace('-', '_')}").main(argv[1:])
    lines = [f"  {name:15s} {text}" for name, text in _COMMANDS.items()]
    text = "\n".join(["usage: noisepolicy COMMAND ...", "", *lines, "", "noisepolicy COMMAND --help says more."])
    if argv and argv[0] in ("-h", "--help"):
        print(text)
        return 0
    print(text if not argv else f"noisepolicy: error: unknown command {argv[0]!r}\n{text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
