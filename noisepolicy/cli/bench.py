"""`noisepolicy-bench`: measures, prints a table, and ends with one line of JSON."""

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from noisepolicy.storage import write_json


def main(argv: list[str] | None = None) -> int:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    parser = argparse.ArgumentParser(prog="noisepolicy-bench", description=__doc__)
    parser.add_argument("--list-backends", action="store_true", help="which op backends run here, and why not")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    commands = parser.add_subparsers(dest="command")
    world = commands.add_parser("world", help="the embedded model: scores by steps, best-of-n, images/s")
    world.add_argument("--guidance-scale", type=float, default=1.5)
    training = commands.add_parser("training", help="the default recipe on several seeds")
    training.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    training.add_argument("--output-dir", type=Path, default=Path("runs/bench"))
    training.add_argument("train_arguments", nargs="*", help="after --, flags for noisepolicy-train")
    arguments = parser.parse_args(argv)
    if arguments.list_backends:
        from noisepolicy.ops import available_backends

        for name, reason in available_backends().items():
            print(f"{name:8s} {reason or 'available'}")
        return 0
    if arguments.command is None:
        parser.error("give a command: world or training")
    result = {"machine": _machine(), **_run(arguments)}
    if arguments.json:
        write_json(arguments.json, result)
    print(json.dumps(result))
    return 0


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.command == "world":
        from noisepolicy.benchmarks import bench_world

        return bench_world.run(arguments.guidance_scale)
    from noisepolicy.benchmarks import bench_training

    return bench_training.run(arguments.output_dir, arguments.seeds, arguments.train_arguments)


def _machine() -> dict[str, Any]:
    import torch

    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {"processor": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}


if __name__ == "__main__":
    sys.exit(main())
