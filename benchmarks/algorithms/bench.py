"""`noisepolicy-bench algorithms`: ways to better pictures on the embedded models, by images and by seconds.

Every method has the same frozen model, reward, captions, denoising steps and guidance. Jobs that are finished in
the output folder are not made again, so the command can be stopped and repeated.
"""

import concurrent.futures
import multiprocessing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from noisepolicy.benchmarks.algorithms.jobs import World, describe_base, make_world, run_job
from noisepolicy.benchmarks.algorithms.methods import (
    ABLATIONS,
    FULL,
    METHODS,
    NUM_INFERENCE_STEPS,
    QUICK,
    Method,
    Scale,
)
from noisepolicy.training.config import TrainConfig
from noisepolicy.training.task import load_task

GAIN = 0.10
"""Gain in reward; methods are compared by the number of images they need for it."""


def run(
    output: Path,
    *,
    seeds: Sequence[int],
    methods: Sequence[str] | None,
    is_quick: bool,
    engine: str,
    engine_dtype: str | None,
    is_ablation: bool = False,
    device: torch.device | str = "cpu",
    workers: int = 1,
) -> dict[str, Any]:
    """Run every job that is not done, print the table, and return the result.

    Args:
        output: Folder of the jobs.
        methods: Names of methods. Default: all.
        is_quick: Do a twentieth of everything, to see whether it runs.
        engine, engine_dtype: Engine of the image model, as in `TrainConfig`.
        is_ablation: Measure the default recipe with one thing changed, in place of the methods.
        device: Device of all jobs.
        workers: Number of jobs side by side, each in a process of its own. The seconds of a job are then those of a
            shared machine.

    Raises:
        ValueError: for an unknown method, or one that starts from another which is left out and has not run.
    """
    if workers < 1:
        raise ValueError(f"--workers must be positive, got {workers}")
    chosen = _choose(methods, ABLATIONS if is_ablation else METHODS)
    scales = QUICK if is_quick else FULL
    jobs = output / ("jobs-quick" if is_quick else "jobs")
    for method in chosen:
        for seed in seeds:
            needed = jobs / f"{method.starts_from}-seed{seed}.json"
            if method.starts_from and method.starts_from not in [m.name for m in chosen] and not needed.exists():
                raise ValueError(f"{method.name} starts from {method.starts_from}, which has not run; name it too")
    models = list(dict.fromkeys(method.model for method in chosen))
    settings = {model: scales[model] for model in models}, torch.device(device), engine, engine_dtype
    if workers > 1:
        _run_side_by_side(chosen, seeds, jobs, settings, workers)
    worlds = _make_worlds(*settings)
    result: dict[str, Any] = {
        "quick": is_quick,
        "seeds": list(seeds),
        "denoiser": engine,
        "denoiser_dtype": engine_dtype,
        "workers": workers,
        "base": {model: describe_base(world) for model, (_, world) in worlds.items()},
        "methods": [],
    }
    for method in chosen:
        config, world = worlds[method.model]
        result["methods"].append(_summarise(method, [run_job(method, seed, world, jobs, config) for seed in seeds]))
    _print(result)
    return result


Worlds = Mapping[str, tuple[TrainConfig, World]]


def _make_worlds(scales: Mapping[str, Scale], device: torch.device, engine: str, engine_dtype: str | None) -> Worlds:
    worlds = {}
    for model, scale in scales.items():
        config = TrainConfig.of(model=model, eval_num_prompts=0)
        if model == "shapes":
            config = config.replace(engine=engine, engine_dtype=engine_dtype)
        worlds[model] = config, make_world(load_task(config, device), scale, device)
    return worlds


def _run_side_by_side(
    methods: Sequence[Method], seeds: Sequence[int], jobs: Path, settings: tuple[Any, ...], workers: int
) -> None:
    """Run every job in one of `workers` processes, the longest first, and after the job whose policy it starts from."""
    threads = max(torch.get_num_threads() // workers, 1)
    names = {method.name for method in methods}
    longest_first = sorted(((seed, method) for seed in seeds for method in methods), key=lambda job: -job[1].images)
    waiting = {(method.name, seed): method for seed, method in longest_first}
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, spawn, _start_worker, (threads, *settings)) as pool:
        running: dict[concurrent.futures.Future, tuple[str, int]] = {}
        while waiting or running:
            unfinished = {*waiting, *running.values()}
            for (name, seed), method in list(waiting.items()):
                if method.starts_from not in names or (method.starts_from, seed) not in unfinished:
                    del waiting[name, seed]
                    running[pool.submit(_run_in_worker, method, seed, jobs)] = name, seed
            done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                del running[future]
                future.result()


_worker_worlds: Worlds = {}


def _start_worker(threads: int, *settings: Any) -> None:
    torch.set_num_threads(threads)
    _worker_worlds.update(_make_worlds(*settings))


def _run_in_worker(method: Method, seed: int, jobs: Path) -> None:
    config, world = _worker_worlds[method.model]
    run_job(method, seed, world, jobs, config)


def _choose(names: Sequence[str] | None, methods: Sequence[Method]) -> list[Method]:
    known = {method.name: method for method in methods}
    if unknown := sorted(set(names or ()) - set(known)):
        raise ValueError(f"unknown method {unknown[0]!r}; choose from {', '.join(known)}")
    return [method for method in methods if names is None or method.name in names]


def images_to_gain(curve: Sequence[dict[str, Any]], gain: float = GAIN) -> float | None:
    """Return the images until the measured reward is `gain` over the base model's from the same seeds.

    The curve is interpolated between points. Before the first point nothing is known.
    """
    last = None
    for row in curve:
        if (missing := row["base_reward"] + gain - row["reward"]) <= 0:
            if last is None:
                return row["images"]
            share = -missing / (row["reward"] - last["reward"])
            return row["images"] - share * (row["images"] - last["images"])
        last = row
    return None


def _summarise(method: Method, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    columns = [list(column) for column in zip(*(run["sweep"] for run in runs), strict=True)]
    trained = next(column for column in columns if column[0]["num_inference_steps"] == NUM_INFERENCE_STEPS)
    for run, row in zip(runs, trained, strict=True):
        run["two"] = {**row, "percent_kept": 100 * row["diversity_kept"]}
        run["images_to_gain"] = images_to_gain(run["curve"])
    return {
        "name": method.name,
        "title": method.title,
        "kind": method.kind,
        "model": method.model,
        "is_per_prompt": method.is_per_prompt,
        "starts_from": method.starts_from,
        "runs": list(runs),
        "columns": columns,
        "lowest": min(row["gain_ci95"][0] for row in trained),
        "highest": max(row["gain_ci95"][1] for row in trained),
    }


def _print(result: dict[str, Any]) -> None:
    def each(values: Iterable[float | None], form: str) -> str:
        return " ".join("-" if value is None else format(value, form) for value in values)

    for model, base in result["base"].items():
        two = next(row for row in base if row["num_inference_steps"] == NUM_INFERENCE_STEPS)
        best = ", ".join(f"best of {n} {value:.3f}" for n, value in two["best_of"].items())
        steps = ", ".join(f"{row['reward']:.3f} in {row['ms_per_image']:.1f} ms" for row in base)
        print(
            f"\n{model}: base model at {', '.join(str(row['num_inference_steps']) for row in base)} steps: {steps}; "
            f"at {NUM_INFERENCE_STEPS}: {best}"
        )
        heads = f"{'reward':18s}{'images to +0.10':19s}{'variety kept':16s}{'nats':16s}"
        print(f"{'method':36s}  images seconds  {heads}ms/image")
        for method in (method for method in result["methods"] if method["model"] == model):
            runs, rows = method["runs"], [run["two"] for run in method["runs"]]
            nats = each((run["kl_to_prior"] for run in runs), ".0f")
            print(
                f"{method['title']:36s} {runs[0]['images']:7d} {mean(run['seconds'] for run in runs):7.0f}"
                f"  {each((row['reward'] for row in rows), '.3f'):18s}"
                f"{each((run['images_to_gain'] for run in runs), '.0f'):19s}"
                f"{each((row['diversity_kept'] for row in rows), '.0%'):16s}"
                f"{nats:16s}{mean(run['ms_per_image'] for run in runs):.1f}"
            )
