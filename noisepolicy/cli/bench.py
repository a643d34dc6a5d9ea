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
    commands.add_parser("rollout", help="images through the general path, against a loop written for one model")
    training = commands.add_parser("training", help="the default recipe on several seeds")
    training.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    training.add_argument("--output-dir", type=Path, default=Path("runs/bench"))
    training.add_argument("train_arguments", nargs="*", help="after --, flags for noisepolicy-train")
    _add_kernels(commands)
    arguments = parser.parse_args(argv)
    if arguments.list_backends:
        from noisepolicy.ops import available_backends

        for name, reason in available_backends().items():
            print(f"{name:8s} {reason or _available(name)}")
        return 0
    if arguments.command is None:
        parser.error("give a command: world, rollout, training or kernels")
    try:
        result = {"machine": _machine(), **_run(arguments)}
        if arguments.json:
            write_json(arguments.json, result)
        if arguments.command == "kernels" and arguments.output:
            from noisepolicy.benchmarks.kernel_report import write_report

            write_report(arguments.output, result)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"noisepolicy-bench: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    print(json.dumps(result))
    return 0


def _add_kernels(commands: Any) -> None:
    kernels = commands.add_parser("kernels", help="every op on every backend, against PyTorch and the machine's limit")
    kernels.add_argument("--op", nargs="+", help="some ops; default: all")
    kernels.add_argument("--backend", nargs="+", help="some backends; default: all that run on the device")
    kernels.add_argument(
        "--dtype", nargs="+", default=["float32"], help="of mean and log_std: float32 float16 bfloat16"
    )
    kernels.add_argument("--batch", type=int, nargs="+", help="default: 1 8 64")
    kernels.add_argument("--dim", type=int, nargs="+", help="elements of a row; default: 4096 16384 65536 262144")
    kernels.add_argument("--threads", type=int, default=1, help="default: 1")
    kernels.add_argument("--device", default="auto", help="auto, cpu or cuda")
    kernels.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    kernels.add_argument("--output", type=Path, metavar="REPORT.html", help="also write a report with plots")


def _available(backend: str) -> str:
    if backend != "cpp":
        return "available"
    from noisepolicy import _C

    return f"available ({_C.instruction_set()})"


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.command == "world":
        from noisepolicy.benchmarks import bench_world

        return bench_world.run(arguments.guidance_scale)
    if arguments.command == "rollout":
        from noisepolicy.benchmarks import bench_rollout

        return bench_rollout.run()
    if arguments.command == "kernels":
        from noisepolicy.benchmarks import bench_kernels

        return bench_kernels.run(
            op_names=arguments.op or bench_kernels.OPS,
            backends=arguments.backend,
            dtypes=arguments.dtype,
            batches=arguments.batch or bench_kernels.BATCHES,
            dims=arguments.dim or bench_kernels.DIMS,
            threads=arguments.threads,
            device=arguments.device,
            use_compile=not arguments.no_compile,
        )
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
