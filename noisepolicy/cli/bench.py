"""`noisepolicy-bench`: measurements that print a table and end with one line of JSON."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from noisepolicy.cli.bench_arguments import parse_arguments
from noisepolicy.cli.failures import prepare, quiet_loading
from noisepolicy.storage import make_new_folder, write_json


def main(argv: list[str] | None = None) -> int:
    """Run the command. Exit codes: 0 done, 2 bad input, 130 interrupted, 1 failed or, with --compare, slower."""
    arguments = parse_arguments(list(sys.argv[1:] if argv is None else argv))
    prepare("noisepolicy-bench")
    code = 0
    try:
        if arguments.list_backends:
            _list_backends()
            return 0
        if arguments.command == "report":
            _report(arguments)
            return 0
        if arguments.command == "latency":
            result, code = _run_latency(arguments)
        elif arguments.command == "algorithms":
            result = _run_algorithms(arguments)
        else:
            from noisepolicy.benchmarks.machine import describe_machine

            result = {"machine": describe_machine(), **_run(arguments)}
        if arguments.json:
            write_json(arguments.json, result)
        if arguments.command == "kernels" and arguments.output:
            from noisepolicy.benchmarks.report import write_report

            write_report(arguments.output, result)
    except KeyboardInterrupt:
        print("\nnoisepolicy-bench: interrupted", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        print(f"noisepolicy-bench: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    print(json.dumps(result))
    return code


def _list_backends() -> None:
    import torch

    from noisepolicy.engines import available_engines
    from noisepolicy.ops import available_backends

    for name, reason in available_backends().items():
        print(f"{name:8s} {reason or _available(name)}")
    for place in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        print(f"engines on {place}")
        for name, reason in available_engines(torch.device(place)).items():
            print(f"  {name:12s} {reason or 'available'}")


def _report(arguments: argparse.Namespace) -> None:
    from noisepolicy.benchmarks.report import write_report

    path = arguments.output or arguments.result.with_suffix(".html")
    try:
        result = json.loads(arguments.result.read_text("utf-8"))
        if not isinstance(result, dict):
            raise ValueError("it holds no result of noisepolicy-bench")
        write_report(path, result)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"cannot make a report of {arguments.result} ({type(error).__name__}: {error})") from error
    print(f"report   {path}")


def _available(backend: str) -> str:
    if backend != "cpp":
        return "available"
    from noisepolicy import _C

    return f"available ({_C.instruction_set()})"


def _run_latency(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Return the result, and 1 if --compare found something slower."""
    if arguments.output is not None and arguments.output.exists() and not arguments.output.is_dir():
        raise ValueError(f"--output {arguments.output} is a file; give a folder")
    quiet_loading()
    from noisepolicy.benchmarks.latency import bench
    from noisepolicy.benchmarks.latency.compare import compare_reports, read_report
    from noisepolicy.benchmarks.report import write_report
    from noisepolicy.training.devices import make_accelerator

    old = read_report(arguments.compare) if arguments.compare else None
    result = bench.run(
        model=arguments.model,
        engines=arguments.engine,
        engine_dtypes=arguments.engine_dtype or (None,),
        batch_sizes=arguments.batch_sizes or bench.BATCH_SIZES,
        step_counts=arguments.steps or bench.STEP_COUNTS,
        dtype=arguments.dtype,
        device=make_accelerator(arguments.device).device,
        threads=arguments.threads,
        guidance_scale=arguments.guidance_scale,
        reward=arguments.reward,
        scheduler=arguments.scheduler,
        scheduler_options={"timestep_spacing": arguments.timestep_spacing} if arguments.timestep_spacing else {},
        skip=arguments.skip,
        seconds=arguments.seconds,
    )
    output = arguments.output or make_new_folder(Path("runs") / time.strftime("bench-%Y%m%d-%H%M%S"))
    write_json(output / "latency.json", result)
    write_report(output / "latency.html", result)
    print(f"\nnumbers  {output / 'latency.json'}\nreport   {output / 'latency.html'}")
    if old is None:
        return result, 0
    comparison = compare_reports(old, result)
    if comparison.num_compared == 0:
        raise ValueError(f"--compare {arguments.compare} has no row that was measured here")
    for warning in comparison.warnings:
        print(f"noisepolicy-bench: warning: {warning}", file=sys.stderr)
    count = f"{len(comparison.regressions)} of {comparison.num_compared}"
    print(*comparison.regressions, f"{count} figures are slower than in {arguments.compare}", sep="\n")
    result["regressions"] = comparison.regressions
    return result, 1 if comparison.regressions else 0


def _run_algorithms(arguments: argparse.Namespace) -> dict[str, Any]:
    quiet_loading()
    from noisepolicy.benchmarks.algorithms import bench
    from noisepolicy.benchmarks.algorithms.report import write_story
    from noisepolicy.benchmarks.machine import describe_machine
    from noisepolicy.benchmarks.report import write_report
    from noisepolicy.training.devices import make_accelerator

    device = make_accelerator(arguments.device).device
    result = bench.run(
        arguments.output,
        seeds=arguments.seeds[:1] if arguments.quick else arguments.seeds,
        methods=arguments.methods,
        is_quick=arguments.quick,
        engine=arguments.engine,
        engine_dtype=arguments.engine_dtype,
        is_ablation=arguments.ablations,
        device=device,
        workers=arguments.workers,
    )
    result = {"machine": describe_machine(device), **result}
    numbers = arguments.output / ("ablations.json" if arguments.ablations else "algorithms.json")
    write_json(numbers, result)
    write_report(numbers.with_suffix(".html"), result)
    write_story(numbers.with_suffix(".png"), result)
    print(f"\nnumbers  {numbers}\nreport   {numbers.with_suffix('.html')}")
    return result


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.command == "kernels":
        from noisepolicy.benchmarks.kernels import bench

        return bench.run(
            op_names=arguments.op or bench.OPS,
            backends=arguments.backend,
            dtypes=arguments.dtype,
            batches=arguments.batch or bench.BATCHES,
            dims=arguments.dim or bench.DIMS,
            threads=arguments.threads,
            device=arguments.device,
            use_compile=not arguments.no_compile,
        )
    if arguments.command == "scale":
        from noisepolicy.benchmarks.scale import bench

        return bench.run(arguments.processes, arguments.iterations, arguments.gradient_accumulation_steps)
    if arguments.command == "sharing":
        from noisepolicy.benchmarks.scale import sharing

        return sharing.run(arguments.situations, arguments.spin_counts, arguments.repetitions)
    if arguments.command == "copies":
        quiet_loading()
        from noisepolicy.benchmarks import copies

        return copies.run(arguments.run, arguments.steps, arguments.num_prompts, arguments.lora_steps)
    if arguments.command == "variety":
        quiet_loading()
        from noisepolicy.benchmarks import variety

        return variety.run(arguments.runs, arguments.num_prompts, arguments.output)
    if arguments.command == "votes":
        quiet_loading()
        from noisepolicy.benchmarks import votes

        return votes.run(arguments.tastes, arguments.num_prompts, arguments.num_voters)
    from noisepolicy.benchmarks.algorithms import training

    return training.run(arguments.output_dir, arguments.seeds, arguments.train_arguments, arguments.rewards)


if __name__ == "__main__":
    sys.exit(main())
