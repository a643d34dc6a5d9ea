"""The jobs of `noisepolicy-bench algorithms`: one method, one seed, from the first image to its final sweep.

A job leaves a JSON file when it is done. One that is killed goes on from its last checkpoint; a search, which takes
minutes, starts again.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from noisepolicy.benchmarks.algorithms.methods import (
    CURVE,
    GUIDANCE_SCALE,
    NUM_INFERENCE_STEPS,
    SEARCH_CURVE,
    Method,
    Scale,
)
from noisepolicy.benchmarks.timing import measure as measure_time
from noisepolicy.evaluation.statistics import bootstrap_mean_ci95, expected_best_of
from noisepolicy.evaluation.sweep import Results, measure
from noisepolicy.frozen import FrozenModel, PromptEmbeds
from noisepolicy.frozen.loading import load_pipeline
from noisepolicy.ops import gaussian_kl
from noisepolicy.policies import NoisePolicy, TablePolicy
from noisepolicy.storage import write_json
from noisepolicy.training.config import TrainConfig
from noisepolicy.training.rollout import stream_seed
from noisepolicy.training.run import Run, resume
from noisepolicy.training.search import search_states
from noisepolicy.training.task import Task
from noisepolicy.worlds.shapes import model_folder

_BEST_OF = (2, 4, 8, 16)
_POPULATION = 40
"""Images of a caption between two states of a search."""


@dataclass
class World:
    """A frozen model, its reward and captions, and its results without any method."""

    task: Task
    scale: Scale
    embeds: PromptEmbeds
    """Embeddings of the held-out captions."""
    base: dict[int, Results]
    """Results without any method, by denoising steps."""
    device: torch.device

    def prompts(self, method: Method) -> list[str]:
        """Captions that the method is measured on."""
        if not method.is_per_prompt:
            return self.task.eval_prompts[: self.scale.num_prompts]
        return self.task.eval_prompts[: self.scale.num_searched]

    def measure(self, policy: NoisePolicy | None, frozen: FrozenModel, prompts: list[str], steps: int) -> Results:
        return measure(
            policy,
            frozen,
            self.task.reward,
            prompts,
            self.embeds[: len(prompts)],
            num_inference_steps=steps,
            group_size=self.scale.group_size,
            guidance_scale=GUIDANCE_SCALE,
            seed=stream_seed(0, "evaluation"),
        )


def make_world(task: Task, scale: Scale, device: torch.device) -> World:
    prompts = task.eval_prompts[: scale.num_prompts]
    world = World(task, scale, task.frozen.encode(prompts), {}, device)
    for steps in scale.step_counts:
        world.base[steps] = world.measure(None, task.frozen, prompts, steps)
    return world


def describe_base(world: World) -> list[dict[str, Any]]:
    """Measure the model without any method, by denoising steps, with best-of-n."""
    rows = []
    for steps, results in world.base.items():
        rewards = results.metrics["reward"]
        best_of = {n: expected_best_of(rewards, n) for n in _BEST_OF if n <= rewards.shape[1]}
        rows.append(
            {
                "num_inference_steps": steps,
                **results.summary(),
                "best_of": best_of,
                "ms_per_image": _time(None, world, steps),
            }
        )
    return rows


def run_job(method: Method, seed: int, world: World, folder: Path, config: TrainConfig) -> dict[str, Any]:
    """Return the job's result, made now or read from its file.

    Args:
        folder: Folder of all jobs.
        config: Settings of all methods: model and engine.

    Raises:
        ValueError: if the result was made with other settings, or the job starts from a method that has not run.
    """
    settings = json.loads(
        json.dumps(
            {
                "method": dataclasses.asdict(method),
                "scale": dataclasses.asdict(world.scale),
                "denoiser": config.model.engine,
                "denoiser_dtype": config.model.engine_dtype,
                "device": world.device.type,
            }
        )
    )
    run_folder = folder / f"{method.name}-seed{seed}"
    path, settings_path = folder / f"{method.name}-seed{seed}.json", run_folder / "settings.json"
    if settings_path.exists() and json.loads(settings_path.read_text("utf-8")) != settings:
        raise ValueError(f"{run_folder} was made with other settings; remove it, or give another --output")
    if path.exists():
        return json.loads(path.read_text("utf-8"))
    run_folder.mkdir(parents=True, exist_ok=True)
    write_json(settings_path, settings)
    runners: dict[str, Callable[..., Iterator[_Point]]] = {
        "policy": _train,
        "find": _train,
        "ddpo": _train_ddpo,
        "cross_entropy": _search,
        "random_search": _search,
    }
    curve_path = run_folder / "curve.json"
    curve = json.loads(curve_path.read_text("utf-8")) if curve_path.exists() else []
    measured = curve[-1]["images"] if curve else 0
    prompts, last = world.prompts(method), None
    base_reward = world.base[NUM_INFERENCE_STEPS].metrics["reward"][: len(prompts)].mean().item()
    for point in runners[method.kind](method, seed, world, run_folder, config, measured):
        last = point
        if point.images <= measured:
            continue
        policy, frozen = point.make()
        results = world.measure(policy, frozen, prompts, NUM_INFERENCE_STEPS)
        row = {
            "images": point.images,
            "seconds": point.seconds,
            "base_reward": base_reward,
            **results.summary(),
        }
        curve.append(row)
        write_json(curve_path, curve)
        print(f"{method.name:16s} seed {seed}  {point.images:6d} images  reward {row['reward']:.3f}", flush=True)
    policy, frozen = last.make()
    is_gaussian = policy is not None and method.kind != "random_search"
    result = {
        "method": method.name,
        "seed": seed,
        "images": last.images,
        "seconds": last.seconds,
        "curve": curve,
        "sweep": _sweep(policy, frozen, world, prompts),
        "kl_to_prior": _kl(policy, world.embeds[: len(prompts)]) if is_gaussian else None,
        # A tuned model is as fast as the base model on the same engine.
        "ms_per_image": _time(policy, world, NUM_INFERENCE_STEPS),
    }
    write_json(path, result)
    return result


@dataclass
class _Point:
    """A point of a method's curve."""

    images: int
    seconds: float
    """Seconds of training, without measuring; for a search, seconds per caption."""
    make: Callable[[], tuple[NoisePolicy | None, FrozenModel]]
    """The maker of the images: a policy, or the prior's noise; and the model."""


def _due(curve: tuple[int, ...], before: int, now: int, end: int) -> bool:
    return any(before < point <= now for point in curve) or (before < end <= now)


def _train(
    method: Method,
    seed: int,
    world: World,
    folder: Path,
    config: TrainConfig,
    measured: int,
) -> Iterator[_Point]:
    settings: dict[str, Any] = dict(method.settings, seed=seed, output_dir=folder, eval_num_prompts=0)
    if method.kind == "find":
        settings |= {"algorithm": "find"}
        if method.starts_from is not None:
            settings["init_policy"] = folder.parent / f"{method.starts_from}-seed{seed}"
    task, prompts = world.task, world.prompts(method)
    trained_on = task.train_prompts if method.kind == "policy" else prompts
    config = config.replace(**settings)
    recipe = config.resolved(len(trained_on))
    per_prompt = len(prompts) if method.is_per_prompt else 1
    total = max(
        round(method.images * world.scale.share), 2 * recipe.group_size if method.is_per_prompt else world.scale.least
    )
    config = config.replace(num_iterations=max(total * per_prompt // recipe.batch_size, 1))
    if (folder / "config.yaml").exists():
        run = resume(folder, model=task.frozen, reward=task.reward)
    else:
        run = Run(task.frozen, reward=task.reward, prompts=trained_on, config=config)
    curve = SEARCH_CURVE if method.is_per_prompt else CURVE
    end, before = run.config.num_iterations * recipe.batch_size // per_prompt, measured

    def point() -> _Point:
        return _Point(
            run.images_trained // per_prompt,
            run.train_seconds / per_prompt,
            lambda: (run.policy, task.frozen),
        )

    if _due(curve, before, point().images, end) or run.iteration == run.config.num_iterations:
        before = point().images
        yield point()
    for _ in run:
        if _due(curve, before, point().images, end):
            before = point().images
            yield point()


def _train_ddpo(
    method: Method,
    seed: int,
    world: World,
    folder: Path,
    config: TrainConfig,
    measured: int,
) -> Iterator[_Point]:
    from noisepolicy.benchmarks.algorithms.ddpo import Ddpo

    ddpo = Ddpo(load_pipeline(model_folder()).to(world.device), world.task.reward, world.task.train_prompts, seed=seed)
    checkpoint, times = folder / "ddpo.safetensors", folder / "seconds.json"
    seconds = 0.0
    if checkpoint.exists():
        ddpo.load(checkpoint)
        seconds = json.loads(times.read_text("utf-8"))
    total = max(round(method.images * world.scale.share), world.scale.least)
    before = measured
    while True:
        if _due(CURVE, before, ddpo.images, total) or ddpo.images >= total:
            write_json(times, seconds)
            ddpo.save(checkpoint)
            before = ddpo.images
            yield _Point(ddpo.images, seconds, lambda: (None, ddpo.frozen()))
        if ddpo.images >= total:
            return
        start = time.perf_counter()
        ddpo.iterate()
        seconds += time.perf_counter() - start


def _search(
    method: Method,
    seed: int,
    world: World,
    folder: Path,
    config: TrainConfig,
    measured: int,
) -> Iterator[_Point]:
    prompts, frozen = world.prompts(method), world.task.frozen
    embeds = world.embeds[: len(prompts)].prompt_embeds
    table = TablePolicy(latent_shape=frozen.latent_shape, prompt_shape=tuple(embeds.shape[1:]), prompts=prompts)
    table.learn_keys(embeds)
    table.to(world.device)
    states = search_states(
        frozen,
        world.task.reward,
        prompts,
        method="cem" if method.kind == "cross_entropy" else "random",
        budget=max(round(method.images * world.scale.share), _POPULATION),
        population_size=_POPULATION,
        num_inference_steps=NUM_INFERENCE_STEPS,
        guidance_scale=GUIDANCE_SCALE,
        seed=seed,
    )
    seconds, start = 0.0, time.perf_counter()
    for state in states:
        seconds += time.perf_counter() - start
        if method.kind == "cross_entropy":
            table.set_distribution(state.mean, state.log_std)
        else:  # one start; log-probs of a single point are none, but it can be drawn from
            table.set_distribution(state.latents, torch.full_like(state.latents, -20.0))
        yield _Point(state.num_images, seconds / len(prompts), lambda: (table, frozen))
        start = time.perf_counter()


def _sweep(policy: NoisePolicy | None, frozen: FrozenModel, world: World, prompts: list[str]) -> list[dict[str, Any]]:
    rows = []
    for steps in world.scale.step_counts:
        ours = world.measure(policy, frozen, prompts, steps)
        base = world.base[steps].metrics["reward"][: len(prompts)]
        gain = ours.metrics["reward"] - base
        rows.append(
            {
                "num_inference_steps": steps,
                **ours.summary(),
                "base_reward": base.mean().item(),
                "gain": gain.mean().item(),
                "gain_ci95": list(bootstrap_mean_ci95(gain)),
                "diversity_kept": sum(ours.diversity) / sum(world.base[steps].diversity[: len(prompts)]),
                "best_of": {n: expected_best_of(base, n) for n in _BEST_OF if n <= base.shape[1]},
                "reward_by_prompt": ours.metrics["reward"].mean(1).tolist(),
            }
        )
    return rows


@torch.no_grad()
def _kl(policy: NoisePolicy, embeds: PromptEmbeds) -> float:
    """Compute the KL to the prior in nats, averaged over prompts, before the critic chooses."""
    return gaussian_kl(*policy(embeds.prompt_embeds)).mean().item()


@torch.no_grad()
def _time(policy: NoisePolicy | None, world: World, steps: int) -> float:
    """Measure the milliseconds per image at inference, in batches of 32."""
    frozen = world.task.frozen
    embeds = world.embeds[torch.arange(2).repeat_interleave(16)]
    prior = torch.randn(len(embeds), *frozen.latent_shape, generator=torch.Generator().manual_seed(0))
    prior = prior.to(world.device)

    def make_images() -> None:
        latents = prior
        if policy is not None:
            latents = policy.choose(embeds.prompt_embeds, seed=0, num_inference_steps=steps)
        frozen.generate(latents, embeds, num_inference_steps=steps, guidance_scale=GUIDANCE_SCALE)

    timing = measure_time({"images": make_images}, world.device, use_graphs=False)["images"]
    return timing.median_us / 1e3 / len(embeds)
