"""Times the denoiser and whole rollouts on every engine, in turns with diffusers' own, after comparing their output."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from noisepolicy.benchmarks.latency.cases import (
    EMBEDDED,
    DiffusersBaseline,
    Engine,
    ModelSpec,
    check_output,
    coarser,
    load_engine,
)
from noisepolicy.benchmarks.machine import MemoryMeter
from noisepolicy.benchmarks.timing import Timer, Timing
from noisepolicy.frozen.base import PromptEmbeds
from noisepolicy.ops import gaussian_sample
from noisepolicy.policies import SpectralPolicy
from noisepolicy.policies.critic import CriticShape, RewardCritic
from noisepolicy.rewards import Reward, load_reward
from noisepolicy.training.config import TrainConfig

SPLIT = ("text_encoding", "policy", "denoiser", "scheduler", "vae", "reward")
"""The parts of a rollout; the scheduler is all of the loop that is neither denoiser nor VAE."""

_BASELINE = "diffusers"
_GPU_SPLIT_CALLS = 5
_RECIPE = TrainConfig()


class LatencyBench:
    """The baseline, the engines, and the inputs of every batch."""

    def __init__(
        self, spec: ModelSpec, batch_sizes: Sequence[int], guidance_scale: float, reward: str | None, seconds: float
    ) -> None:
        self.spec, self._batch_sizes, self._guidance, self._seconds = spec, batch_sizes, guidance_scale, seconds
        self._baseline = DiffusersBaseline(spec)
        self.engines: list[Engine] = []
        self._memory: dict[tuple[str, int], float | None] = {}
        self._difference: dict[tuple[str, int], float] = {}
        self._denoiser_inputs: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._expected: dict[int, torch.Tensor] = {}
        reward = reward or ("shapes" if spec.model == EMBEDDED else None)
        self._reward: Reward | None = load_reward(reward, device=spec.device) if reward else None
        self._around: dict[int, dict[str, float | None]] = {}
        self.timer = Timer(spec.device)

    @torch.no_grad()
    def add(self, backend: str, dtype: str | None) -> None:
        """Loads an engine, compares its prediction with the baseline's at every batch, and measures its memory."""
        engine = load_engine(self.spec, backend, dtype, rollout_batch_size=self._batch_sizes[-1])
        print(f"{engine.label}: ready after {engine.setup_seconds:.1f} s", flush=True)
        meter = MemoryMeter(self.spec.device)
        for batch in self._batch_sizes:
            args, kwargs = self._inputs(batch)
            if batch not in self._expected:
                self._expected[batch] = _tensor(self._baseline.denoiser(*args, **kwargs))
            output = _tensor(engine.frozen.denoiser(*args, **kwargs))
            who = f"the denoiser of {engine.label} at batch {batch}"
            self._difference[engine.label, batch] = check_output(
                who, output, self._expected[batch], coarser(engine.dtype, self.spec.dtype), is_image=False
            )
            self._memory[engine.label, batch] = meter.peak_mb(lambda a=args, k=kwargs: engine.frozen.denoiser(*a, **k))
        self.engines.append(engine)

    @torch.no_grad()
    def time_denoiser(self) -> list[dict[str, Any]]:
        """Time the denoiser: one result for each engine and batch, the number of rows handed to the denoiser."""
        print(
            f"\n{'denoiser':10s} {'dtype':8s} {'batch':>5s} {'median ms':>10s} {'p20':>8s} {'p95':>8s} "
            f"{'images/s':>9s} {'peak MB':>8s} | faster than diffusers eager"
        )
        rows = []
        for batch in self._batch_sizes:
            args, kwargs = self._inputs(batch)
            modules = {_BASELINE: self._baseline.denoiser}
            modules |= {engine.label: engine.frozen.denoiser for engine in self.engines}
            calls = {name: lambda m=module, a=args, k=kwargs: m(*a, **k) for name, module in modules.items()}
            timings = self._measure(calls)
            for engine in self.engines:
                row = {
                    **_row(engine, batch, timings),
                    "peak_memory_mb": self._memory[engine.label, batch],
                    "difference": self._difference[engine.label, batch],
                    "eager_ms": timings[_BASELINE].median_us / 1e3,
                }
                row["speedup_over_eager"] = row["eager_ms"] / row["median_ms"]
                rows.append(row)
                memory = "-" if row["peak_memory_mb"] is None else f"{row['peak_memory_mb']:.0f}"
                print(
                    f"{row['backend']:10s} {row['dtype']:8s} {batch:5d} {row['median_ms']:10.2f} {row['p20_ms']:8.2f} "
                    f"{row['p95_ms']:8.2f} {row['images_per_s']:9.1f} {memory:>8s} | {row['speedup_over_eager']:.2f}x",
                    flush=True,
                )
        return rows

    @torch.no_grad()
    def time_rollouts(self, step_counts: Sequence[int]) -> list[dict[str, Any]]:
        """Time embeddings to images, and the work before and after, at the smallest and largest batch."""
        print(
            f"\n{'rollout':10s} {'dtype':8s} {'batch':>5s} {'steps':>5s} {'median ms':>10s} {'p20':>8s} {'p95':>8s} | "
            + " ".join(f"{name:>13s}" for name in SPLIT)
            + " | loop, faster than diffusers"
        )
        rows = []
        for batch in dict.fromkeys((self._batch_sizes[0], self._batch_sizes[-1])):
            for steps in step_counts:
                rows += self._time_rollout(batch, steps)
        return rows

    def _time_rollout(self, batch: int, steps: int) -> list[dict[str, Any]]:
        prompts = self.spec.prompts(batch)
        embeds, latents = self._baseline.encode(prompts), self._latents(batch)
        settings = {"num_inference_steps": steps, "guidance_scale": self._guidance}
        costs: dict[str, float] = {}
        differences: dict[str, float] = {}

        def timed_once(name: str, model: Any) -> torch.Tensor:
            start = time.perf_counter()
            images = model.generate(latents, embeds, **settings)
            costs[name] = time.perf_counter() - start
            return images

        expected = timed_once(_BASELINE, self._baseline)
        calls: dict[str, Callable[[], Any]] = {_BASELINE: lambda: self._baseline.generate(latents, embeds, **settings)}
        shares: dict[str, list[tuple[float, float]]] = {}
        for engine in self.engines:
            images = timed_once(engine.label, engine.frozen)
            who = f"an image of {engine.label} (batch {batch}, steps {steps})"
            differences[engine.label] = check_output(
                who, images, expected, coarser(engine.dtype, self.spec.dtype), is_image=True
            )
            shares[engine.label] = []
            plain = lambda e=engine: e.frozen.generate(latents, embeds, **settings)  # noqa: E731
            recorded = lambda e=engine, p=plain: _recorded(e, p, shares[e.label])  # noqa: E731
            # On a GPU recording waits for the device, so it is kept out of what is timed.
            calls[engine.label] = recorded if self.spec.device.type == "cpu" else plain
            if self.spec.device.type != "cpu":
                for _ in range(_GPU_SPLIT_CALLS):
                    recorded()
        timings = self._measure(calls, known_costs=costs if self.spec.device.type == "cpu" else None)
        if batch not in self._around:
            self._around[batch] = self._time_around(prompts, embeds, expected)
        rows = []
        for engine in self.engines:
            row = {**_row(engine, batch, timings), "num_inference_steps": steps}
            denoiser, vae = (statistics.median(values) for values in zip(*shares[engine.label], strict=True))
            scheduler = max(1 - denoiser - vae, 0.0)
            inside = {"denoiser": denoiser, "scheduler": scheduler, "vae": vae}
            split = self._around[batch] | {name: share * row["median_ms"] for name, share in inside.items()}
            row["split_ms"] = {name: split[name] for name in SPLIT}
            row["diffusers_ms"] = timings[_BASELINE].median_us / 1e3
            row["speedup_over_diffusers"] = row["diffusers_ms"] / row["median_ms"]
            row["loop_overhead_fraction"] = scheduler
            row["difference"] = differences[engine.label]
            rows.append(row)
            _print_rollout(row)
        return rows

    def _time_around(self, prompts: list[str], embeds: PromptEmbeds, images: torch.Tensor) -> dict[str, float | None]:
        """Time what no engine changes, in milliseconds: text encoder, policy of the default recipe, reward."""
        policy = _default_policy(self._baseline.latent_shape, embeds).to(self.spec.device)
        calls: dict[str, Callable[[], Any]] = {
            "text_encoding": lambda: self.engines[0].frozen.encode(prompts),
            "policy": lambda: policy.choose(embeds.prompt_embeds, seed=0),
        }
        if self._reward is not None:
            calls["reward"] = lambda: self._reward(images, prompts)
        timings = self._measure(calls, seconds=self._seconds / 4)
        return {"reward": None} | {name: timing.median_us / 1e3 for name, timing in timings.items()}

    def _measure(self, calls: Mapping[str, Callable[[], Any]], **options: Any) -> dict[str, Timing]:
        return self.timer.measure(calls, **{"seconds": self._seconds, "use_graphs": False, **options})

    def _inputs(self, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return inputs of the denoiser, made once, so that every engine gets the same."""
        if batch not in self._denoiser_inputs:
            embeds = self._baseline.encode(self.spec.prompts(batch))
            self._denoiser_inputs[batch] = self._baseline.denoiser_call(self._latents(batch), embeds)
        return self._denoiser_inputs[batch]

    def _latents(self, batch: int) -> torch.Tensor:
        prior = torch.zeros(batch, *self._baseline.latent_shape, device=self.spec.device)
        return gaussian_sample(prior, prior.new_zeros(()), seed=0)[0]


def _recorded(engine: Engine, call: Callable[[], Any], shares: list[tuple[float, float]]) -> None:
    """Make a call and append the shares of denoiser and VAE."""
    with engine.frozen.record_phases() as phases:
        start = time.perf_counter()
        call()
        whole = time.perf_counter() - start
    shares.append((phases["denoiser"] / whole, phases["vae"] / whole))


def _row(engine: Engine, batch: int, timings: Mapping[str, Timing]) -> dict[str, Any]:
    timing = timings[engine.label]
    return {
        "backend": engine.backend,
        "dtype": engine.dtype,
        "batch": batch,
        "median_ms": timing.median_us / 1e3,
        "p20_ms": timing.p20_us / 1e3,
        "p95_ms": timing.p95_us / 1e3,
        "images_per_s": batch * 1e6 / timing.median_us,
    }


def _default_policy(latent_shape: tuple[int, ...], embeds: PromptEmbeds) -> SpectralPolicy:
    """Make an untrained policy; it takes as long as a trained one."""
    prompt_shape = tuple(embeds.prompt_embeds.shape[1:])
    policy = SpectralPolicy(latent_shape=latent_shape, prompt_shape=prompt_shape).eval()
    shape = CriticShape(prompt_shape, policy.action_shape, is_spectral=True, step_counts=(1,))
    policy.attach_critic(RewardCritic(shape, size=_RECIPE.critic.size), _RECIPE.num_candidates)
    return policy


def _tensor(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def _print_rollout(row: Mapping[str, Any]) -> None:
    parts = " ".join("-".rjust(13) if value is None else f"{value:13.2f}" for value in row["split_ms"].values())
    print(
        f"{row['backend']:10s} {row['dtype']:8s} {row['batch']:5d} {row['num_inference_steps']:5d} "
        f"{row['median_ms']:10.2f} {row['p20_ms']:8.2f} {row['p95_ms']:8.2f} | {parts} | "
        f"{row['loop_overhead_fraction']:.1%}, {row['speedup_over_diffusers']:.2f}x",
        flush=True,
    )
