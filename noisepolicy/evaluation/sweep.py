"""The step sweep: base model and policy from the same seeds, at each number of denoising steps."""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from noisepolicy.evaluation.sampler_noise import sampler_noise_share
from noisepolicy.evaluation.statistics import bootstrap_mean_ci95, expected_best_of, mean_pairwise_distance
from noisepolicy.frozen import FrozenModel, PromptEmbeds
from noisepolicy.frozen.base import row_seeds
from noisepolicy.ops import gaussian_sample, num_counters
from noisepolicy.policies import NoisePolicy
from noisepolicy.rewards import Reward
from noisepolicy.rewards.registry import without_folders

_BEST_OF = (2, 4, 8)
_PROMPTS_AT_A_TIME = 16


@dataclass(frozen=True)
class Sweep:
    """An evaluation: base model and policy from the same seeds. It prints and displays as a table."""

    rows: list[dict[str, Any]]
    """One entry for each step count, as in the `sweep` of `summary.json`."""
    pairs: list["Pair"]
    """Pictures to show."""
    measured_on: str = "held-out prompts"
    """The prompts of the evaluation, in words."""

    def __str__(self) -> str:
        """Format the table: a line for each step count, and one for each further reward."""
        if not self.rows:
            return "nothing was evaluated"
        has_strict = self.rows[0]["base"]["strict"] is not None
        strict_head = "    strict        " if has_strict else ""
        lines = [
            f"{self.measured_on}, same seeds",
            f" steps   reward base -> policy   gain (95% interval)       {strict_head}diversity kept",
        ]
        for row in self.rows:
            base, policy = row["base"], row["policy"]
            strict = f"{base['strict']:.3f} -> {policy['strict']:.3f}    " if has_strict else ""
            lines.append(
                f"{row['num_inference_steps']:6d}   {base['reward']:.3f} -> {policy['reward']:.3f}"
                f"          {_gain_text(row)}   {strict}{_diversity_kept(row)}"
            )
            for other in (*row["parts"], *row["eval_rewards"]):
                sides = f"{other['base']:.3f} -> {other['policy']:.3f}"
                lines.append(f"         {sides}          {_gain_text(other)}   {without_folders(other['name'])}")
            if note := sampler_noise_text(row):
                lines.append(f"         {note}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Show the table in a notebook."""
        head = "<tr><th>steps</th><th>reward</th><th>base</th><th>policy</th><th>gain (95%)</th><th>diversity</th></tr>"
        lines = []
        for row in self.rows:
            sides = {side: row[side]["reward"] for side in ("base", "policy")}
            first = {**row, **sides, "name": "trained for"}
            for number, entry in enumerate((first, *row["parts"], *row["eval_rewards"])):
                cells = [
                    "" if number else str(row["num_inference_steps"]),
                    html.escape(without_folders(entry["name"])),
                    f"{entry['base']:.3f}",
                    f"{entry['policy']:.3f}",
                    _gain_text(entry),
                    "" if number else _diversity_kept(row),
                ]
                lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
            if note := sampler_noise_text(row):
                lines.append(f'<tr><td></td><td colspan="5">{note}</td></tr>')
        return f"<table>{head}{''.join(lines)}</table><p>{html.escape(self.measured_on)}, same seeds</p>"


def sampler_noise_text(row: dict[str, Any]) -> str:
    """Say how much of the reward the latents cannot decide; nothing for a sampler that draws no noise."""
    share = row.get("sampler_noise_share")
    if share is None:
        return ""
    return f"the sampler's own noise makes {share:.0%} of the reward's variance within a prompt; no start can change it"


@dataclass(frozen=True)
class Pair:
    """One caption at one step count, base and policy from the same seed. Images `(3, height, width)` in [0, 1]."""

    prompt: str
    num_inference_steps: int
    base_image: torch.Tensor
    policy_image: torch.Tensor
    base_metrics: dict[str, float]
    policy_metrics: dict[str, float]


def evaluate_sweep(
    policy: NoisePolicy,
    frozen: FrozenModel,
    reward: Reward,
    prompts: Sequence[str],
    *,
    step_counts: Sequence[int],
    group_size: int,
    guidance_scale: float,
    seed: int,
    eval_rewards: Sequence[Reward] = (),
    embeds: PromptEmbeds | None = None,
    num_shown: int = 10,
    on_progress: Callable[[int], None] = lambda num_images: None,
    rank: int = 0,
    num_ranks: int = 1,
    collect: Callable[[Any], list[Any] | None] = lambda value: [value],
    measured_on: str = "held-out prompts",
    variety: float = 0.0,
) -> Sweep:
    """Generate `len(prompts) * group_size` images with and without the policy at each step count.

    Args:
        eval_rewards: Further rewards to measure. Rewards that were not trained for show reward hacking.
        embeds: Embeddings of the prompts, if they are encoded already.
        seed: Seed of the evaluation's noise. A pair's noise depends on the seed and the pair's number alone.
        num_shown: Number of prompts whose first pair is kept for the report, at every step count.
        on_progress: Called with the number of images of each batch.
        rank: Rank of this process among `num_ranks`, which share the images.
        measured_on: The prompts, in words.
        variety: How much the policy's images of a prompt are to differ; see `NoisePolicy.latents`.
        collect: Returns the values of all processes in one of them, and None in the others, whose sweep is empty.
    """
    if embeds is None:
        embeds = frozen.encode(prompts)
    step_counts = list(dict.fromkeys(step_counts))
    parts = [
        _Part(steps, start is policy, begin)
        for steps in step_counts
        for start in (None, policy)
        for begin in range(0, len(prompts), _PROMPTS_AT_A_TIME)
    ]
    mine = sorted(parts, key=lambda part: part.num_inference_steps, reverse=True)[rank::num_ranks]
    starts = _Starts(policy, group_size, variety)
    made = {
        part: _measure_part(
            starts if part.has_policy else None,
            frozen,
            reward,
            prompts,
            embeds,
            begin=part.begin,
            num_inference_steps=part.num_inference_steps,
            group_size=group_size,
            guidance_scale=guidance_scale,
            seed=seed,
            eval_rewards=eval_rewards,
            on_progress=on_progress,
            num_shown=num_shown,
        )
        for part in sorted(mine, key=lambda part: (part.begin, part.has_policy))
    }
    shares = collect(made)
    if shares is None:
        return Sweep([], [])
    results = {part: result for share in shares for part, result in share.items()}
    others = [other.name for other in eval_rewards]
    rows, pairs = [], []
    for steps in step_counts:
        base, ours = (
            Results.join([results[part] for part in parts if part[:2] == (steps, has_policy)])
            for has_policy in (False, True)
        )
        row = summarise(steps, base, ours, others, list(reward.weights) if len(reward.weights) > 1 else [])
        settings = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "seed": seed}
        row |= {"variety": variety} if variety else {}
        rows.append(row | {"sampler_noise_share": sampler_noise_share(frozen, reward, prompts, embeds, **settings)})
        for shown in range(min(num_shown, len(prompts))):
            (base_image, base_metrics), (policy_image, policy_metrics) = (
                results.first_of(shown) for results in (base, ours)
            )
            if base_image.ndim in (3, 4) and base_image.shape[-3] == 3:  # else it is no picture to show
                pairs.append(Pair(prompts[shown], steps, base_image, policy_image, base_metrics, policy_metrics))
    return Sweep(rows, pairs, measured_on)


class _Part(NamedTuple):
    """A part that one process makes: some prompts, from `begin` on, at a step count, with the policy or without."""

    num_inference_steps: int
    has_policy: bool
    begin: int


def measure(
    policy: NoisePolicy | None,
    frozen: FrozenModel,
    reward: Reward,
    prompts: Sequence[str],
    embeds: PromptEmbeds,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    collect: Callable[[Any], list[Any] | None] = lambda value: [value],
    **settings: Any,
) -> "Results | None":
    """Make and score some images of each prompt, from the policy's starts or, without a policy, the prior's.

    Args:
        rank: Rank of this process among `num_ranks`, which share the images.
        collect: Returns the values of all processes in one of them, and None in the others, whose result is None.
        settings: `num_inference_steps`, `group_size`, `guidance_scale`, `seed` and perhaps `eval_rewards`, as in
            `evaluate_sweep`.
    """
    begins = range(0, len(prompts), _PROMPTS_AT_A_TIME)
    shares = collect(
        {
            begin: _measure_part(policy, frozen, reward, prompts, embeds, begin=begin, **settings)
            for begin in begins[rank::num_ranks]
        }
    )
    if shares is None:
        return None
    made = {begin: part for share in shares for begin, part in share.items()}
    return Results.join([made[begin] for begin in begins])


class _Starts:
    """A policy that keeps its last choice of starts for the step counts that its critic treats alike: choosing takes as
    long as a few denoising steps."""

    def __init__(self, policy: NoisePolicy, group_size: int, variety: float) -> None:
        self._policy, self._group_size, self._variety = policy, group_size, variety
        self._key: Any = None

    def choose(self, prompt_embeds: torch.Tensor, *, seed: int, offset: int, num_inference_steps: int) -> torch.Tensor:
        critic = self._policy.critic
        key = (seed, offset, critic and critic.shape.nearest_step_index(num_inference_steps))
        if key != self._key:
            # With variety, the images of a prompt are chosen as one set, and each prompt's on their own.
            size = self._group_size if self._variety else len(prompt_embeds)
            stride = size * num_counters(self._policy.latent_shape)
            sets = [
                self._policy.choose(
                    rows,
                    seed=seed,
                    offset=offset + number * stride,
                    num_inference_steps=num_inference_steps,
                    variety=self._variety,
                )
                for number, rows in enumerate(prompt_embeds.split(size))
            ]
            self._latents = torch.cat(sets)
            self._key = key
        return self._latents


@torch.no_grad()
def _measure_part(
    policy: NoisePolicy | _Starts | None,
    frozen: FrozenModel,
    reward: Reward,
    prompts: Sequence[str],
    embeds: PromptEmbeds,
    *,
    begin: int,
    num_inference_steps: int,
    group_size: int,
    guidance_scale: float,
    seed: int,
    eval_rewards: Sequence[Reward] = (),
    on_progress: Callable[[int], None] = lambda num_images: None,
    num_shown: int = 0,
) -> "Results":
    chunk = slice(begin, min(begin + _PROMPTS_AT_A_TIME, len(prompts)))
    chunk_embeds = _repeat(embeds[chunk], group_size)
    offset = begin * group_size * num_counters(frozen.latent_shape)
    if policy is None:
        prior = torch.zeros(len(chunk_embeds), *frozen.latent_shape, device=chunk_embeds.prompt_embeds.device)
        latents, _ = gaussian_sample(prior, prior.new_zeros(()), seed=seed, offset=offset)
    else:
        latents = policy.choose(
            chunk_embeds.prompt_embeds, seed=seed, offset=offset, num_inference_steps=num_inference_steps
        )
    chunk_prompts = [prompt for prompt in prompts[chunk] for _ in range(group_size)]
    first = begin * group_size
    images = frozen.generate(
        latents,
        chunk_embeds,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        seeds=row_seeds(seed, range(first, first + len(latents))),
    )
    # By position: further rewards may have the same name, or that of something that the reward tells.
    others = {eval_key(number): other(images, chunk_prompts) for number, other in enumerate(eval_rewards)}
    metrics = {**reward.metrics(images, chunk_prompts), **others}
    groups = images.reshape(-1, group_size, *images.shape[1:]).float().cpu()
    on_progress(len(chunk_embeds))
    return Results(
        {name: values.reshape(-1, group_size).cpu() for name, values in metrics.items()},
        [mean_pairwise_distance(group[None]) for group in groups],
        list(groups[: max(0, num_shown - begin), 0].clone()),
    )


@dataclass
class Results:
    """Results of one side of a comparison, prompt by prompt."""

    metrics: dict[str, torch.Tensor]
    """Values of each metric, `(prompts, images)`."""
    diversity: list[float]
    """Root mean square difference of two images of each prompt, for pixels in [0, 1]."""
    first_images: list[torch.Tensor]
    """First image of each prompt that is shown."""

    @classmethod
    def join(cls, parts: Sequence["Results"]) -> "Results":
        """Join the results of several parts, in order."""
        return cls(
            {
                name: torch.cat([part.metrics[name] for part in parts])
                for name in parts[0].metrics
                if all(name in part.metrics for part in parts)  # a reward may not tell the same of every batch
            },
            [value for part in parts for value in part.diversity],
            [image for part in parts for image in part.first_images],
        )

    def first_of(self, prompt: int) -> tuple[torch.Tensor, dict[str, float]]:
        """Return a prompt's first image and its metrics."""
        return self.first_images[prompt], {name: values[prompt, 0].item() for name, values in self.metrics.items()}

    def summary(self) -> dict[str, float | None]:
        """Return the mean of each metric and of the diversity."""
        strict = self.metrics.get("strict")
        return {
            "reward": self.metrics["reward"].mean().item(),
            "strict": None if strict is None else strict.mean().item(),
            "diversity": sum(self.diversity) / len(self.diversity),
        }


def measured_on(config: dict[str, Any], variety: float = 0.0) -> str:
    """Describe a run's evaluation in words; FIND is evaluated on the prompts it was trained on."""
    prompts = "the prompts it was made for" if config["algorithm"] == "find" else "held-out prompts"
    return f"{prompts} at variety {variety:g}" if variety else prompts


def _repeat(embeds: PromptEmbeds, count: int) -> PromptEmbeds:
    return embeds[torch.arange(len(embeds)).repeat_interleave(count)]


def summarise(
    num_inference_steps: int, base: Results, policy: Results, others: Sequence[str], parts: Sequence[str] = ()
) -> dict[str, Any]:
    """Make an entry of `Sweep.rows`.

    Args:
        others: Names of the rewards that were not trained for.
        parts: Names of the parts of the reward, if it is a weighted sum of several.
    """
    base_rewards = base.metrics["reward"]
    return {
        "num_inference_steps": num_inference_steps,
        "num_pairs": base_rewards.numel(),
        "base": base.summary(),
        "policy": policy.summary(),
        **_gain(base, policy, "reward"),
        "parts": [_compare(base, policy, name) for name in parts],
        "eval_rewards": [
            _compare(base, policy, eval_key(number)) | {"name": name} for number, name in enumerate(others)
        ],
        "best_of_n": [
            {"n": n, "reward": expected_best_of(base_rewards, n), "num_images": base_rewards.numel()}
            for n in _BEST_OF
            if n <= base_rewards.shape[1]
        ],
    }


def eval_key(number: int) -> str:
    """Return the name among `Results.metrics` of a further reward, by its position."""
    return f"eval_rewards/{number}"


def _compare(base: Results, policy: Results, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "base": base.metrics[name].mean().item(),
        "policy": policy.metrics[name].mean().item(),
        **_gain(base, policy, name),
    }


def _gain(base: Results, policy: Results, name: str) -> dict[str, Any]:
    difference = policy.metrics[name] - base.metrics[name]
    return {"gain": difference.mean().item(), "gain_ci95": list(bootstrap_mean_ci95(difference))}


def _gain_text(row: dict[str, Any]) -> str:
    low, high = row["gain_ci95"]
    return f"{row['gain']:+.3f} ({low:+.3f}, {high:+.3f})"


def _diversity_kept(row: dict[str, Any]) -> str:
    base, policy = row["base"]["diversity"], row["policy"]["diversity"]
    return f"{policy / base:.0%}" if base else "-"
