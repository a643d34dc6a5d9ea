"""`noisepolicy-bench`: where the time of a rollout goes, by engine, batch and step count, and what to speed up next.

Baselines are diffusers' own, as it loads them, called in the same rounds: its denoiser with the inputs its pipeline
hands it, and its pipeline's call from embeddings to images. Everything is compared with them before it is timed. An
engine named `eager` is this package's path around the same PyTorch modules.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from noisepolicy.benchmarks.kernels import bench as kernels
from noisepolicy.benchmarks.latency.cases import EMBEDDED, Engine, ModelSpec, choose_engines, engine_name
from noisepolicy.benchmarks.latency.engines import LatencyBench
from noisepolicy.benchmarks.latency.overhead import time_overhead
from noisepolicy.benchmarks.latency.training import time_training
from noisepolicy.benchmarks.machine import describe_machine
from noisepolicy.ops import available_backends

BATCH_SIZES, STEP_COUNTS = (1, 4, 16, 64), (1, 2, 4, 8)
PARTS = ("kernels", "denoiser", "rollout", "general", "training")
_TRAINED_STEPS = 2


def run(
    *,
    model: str = EMBEDDED,
    engines: Sequence[str] | None = None,
    engine_dtypes: Sequence[str | None] = (None,),
    batch_sizes: Sequence[int] = BATCH_SIZES,
    step_counts: Sequence[int] = STEP_COUNTS,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    threads: int | None = None,
    guidance_scale: float = 1.5,
    reward: str | None = None,
    scheduler: str | None = None,
    scheduler_options: Mapping[str, Any] | None = None,
    skip: Sequence[str] = (),
    seconds: float = 1.0,
) -> dict[str, Any]:
    """Print tables and return their numbers.

    Args:
        model: `"shapes"`, the embedded model, or a folder or hub id.
        engines: Engines. Default: every one that runs here, on a CPU without torch.compile.
        engine_dtypes: Data types of engines other than eager. Default: the model's own.
        batch_sizes: Numbers of rows handed to the denoiser. Rollouts take the smallest and the largest.
        step_counts: Step counts of the rollouts.
        dtype: Data type of the model.
        threads: Number of threads. Default: one on a CPU, and PyTorch's own number beside a GPU.
        reward: Reward whose time is measured. Default: the embedded model's own, and none for other models.
        scheduler, scheduler_options: See `frozen.loading.load_pipeline`.
        skip: Some of `PARTS`.
        seconds: Seconds for each figure; slow ones take a few calls.

    Raises:
        ValueError: for a name or a size that is not one, or an engine that does not run here.
        RuntimeError: if an engine fails or computes something else.
    """
    for name, values in (("--batch-sizes", batch_sizes), ("--steps", step_counts), ("--threads", [threads or 1])):
        if not values or min(values) < 1:
            raise ValueError(f"{name} must be positive, got {list(values)}")
    if not seconds > 0:
        raise ValueError(f"--seconds must be positive, got {seconds}")
    if unknown := set(skip) - set(PARTS):
        raise ValueError(f"unknown --skip {min(unknown)!r}; choose from {', '.join(PARTS)}")
    device = torch.device(device)
    names, reasons = choose_engines(engines, device)
    spec = ModelSpec(model, dtype, device, scheduler, scheduler_options)
    threads_before = torch.get_num_threads()
    if threads or device.type == "cpu":
        torch.set_num_threads(threads or 1)
    try:
        result: dict[str, Any] = {
            "machine": describe_machine(device),
            "model": model,
            "guidance_scale": guidance_scale,
            "backends": {"ops": available_backends(), "denoisers": reasons},
            "kernels": [],
            "denoiser": [],
            "rollout": [],
            "general": None,
            "training": [],
        }
        _print_machine(result)
        bench = LatencyBench(spec, sorted(set(batch_sizes)), guidance_scale, reward, seconds)
        if "kernels" not in skip:
            result["kernels"] = _time_kernels(device)
        for name in names:
            for engine_dtype in engine_dtypes if name != "eager" else [None]:
                try:
                    bench.add(name, engine_dtype)
                except ValueError as error:
                    if engines is not None:
                        raise
                    reasons[name] = f"not measured in {engine_dtype or dtype}: {error}"
                    print(f"{name}: {reasons[name]}")
        result["setup_seconds"] = {engine.label: engine.setup_seconds for engine in bench.engines}
        if "denoiser" not in skip:
            result["denoiser"] = bench.time_denoiser()
        if "rollout" not in skip:
            result["rollout"] = bench.time_rollouts(sorted(set(step_counts)))
        result["other_jobs"] = bench.timer.other_jobs()
        if "general" not in skip:
            result["general"] = time_overhead(spec, min(batch_sizes), guidance_scale, seconds)
        if "training" not in skip:
            result["training"] = _time_training(bench.engines, spec)
        result["next_gain"] = next_gain(result["rollout"], result["training"])
        print(f"\nthe next gain: {result['next_gain']}", flush=True)
    finally:
        torch.set_num_threads(threads_before)
    return result


def next_gain(rollout: Sequence[Mapping[str, Any]], training: Sequence[Mapping[str, Any]]) -> str:
    """Say in one line which part takes longest with the fastest engine, and what halving it would bring."""
    lines = []
    if rollout:
        batch = max(row["batch"] for row in rollout)
        steps = min({row["num_inference_steps"] for row in rollout}, key=lambda count: abs(count - _TRAINED_STEPS))
        rows = [row for row in rollout if (row["batch"], row["num_inference_steps"]) == (batch, steps)]
        best = min(rows, key=lambda row: row["median_ms"])
        images = "1 image" if batch == 1 else f"{batch} images"
        counted = "1 step" if steps == 1 else f"{steps} steps"
        lines.append(f"a rollout of {images} at {counted} on {engine_name(best)}: {_largest(best['split_ms'])}")
    if training:
        best = min(training, key=lambda row: row["iteration_ms"])
        lines.append(f"an iteration of training on {engine_name(best)}: {_largest(best['split_ms'])}")
    return "; ".join(lines) or "nothing was measured that tells"


def _largest(split_ms: Mapping[str, float | None]) -> str:
    parts = {name.replace("_", " "): value for name, value in split_ms.items() if value is not None}
    name = max(parts, key=parts.__getitem__)
    share = parts[name] / sum(parts.values())
    return f"{name} has {share:.0%}, and halving it would make the whole {1 / (1 - share / 2):.2f}x faster"


def _time_kernels(device: torch.device) -> list[dict[str, Any]]:
    print("\nkernels, in short (`noisepolicy-bench kernels` measures more)")
    return kernels.run(
        batches=(8,), dims=(16_384,), threads=torch.get_num_threads(), device=device.type, use_compile=False
    )["results"]


def _time_training(engines: Sequence[Engine], spec: ModelSpec) -> list[dict[str, Any]]:
    if spec.model != EMBEDDED:
        print("\ntraining is measured on the embedded model only")
        return []
    return time_training(engines, spec)


def _print_machine(result: Mapping[str, Any]) -> None:
    machine = result["machine"]
    print(
        f"{machine['gpu'] or machine['processor']}; {machine['cores']} cores, {machine['threads']} "
        f"thread{'' if machine['threads'] == 1 else 's'}, {machine['memory_gb']} GB; kernels "
        f"{machine['instruction_set'] or 'not compiled'}; "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    )
    for kind, reasons in result["backends"].items():
        for name, reason in reasons.items():
            print(f"  {kind.removesuffix('s'):8s} {name:12s} {reason or 'available'}")
