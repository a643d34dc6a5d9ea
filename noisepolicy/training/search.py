"""Search for a good start of each prompt, with the reward at hand: best of n, and methods that learn on the way.

    found = noisepolicy.search(pipe, "a dog and a cat", "pickscore", method="zero-order", budget=40)
    found.images[0], found.rewards[0], found.latents

| method | draws the next images' noise from |
|---|---|
| `random` | the prior, or a policy: best of n |
| `zero-order` | a sphere around the best noise so far (Ma et al., arXiv 2501.09732) |
| `cem` | a Gaussian fitted to the best tenth of the last images (cross-entropy method, de Boer et al., 2005) |
| `find` | a Gaussian that FIND teaches from all images (`find.py`) |

Nothing is learned across prompts, so a new prompt costs a new search. A prompt's noise depends on the seed and on its
place in the list alone, not on the other prompts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch

from noisepolicy.frozen import FrozenModel, PromptEmbeds, as_frozen_model
from noisepolicy.ops import gaussian_sample, num_counters
from noisepolicy.policies import NoisePolicy, PolicySample
from noisepolicy.policies.networks import plain_arithmetic
from noisepolicy.rewards import Reward, load_reward
from noisepolicy.rewards.base import weigh
from noisepolicy.training.config import TrainConfig
from noisepolicy.training.find import Find
from noisepolicy.training.rollout import Rollout, stream_seed
from noisepolicy.training.rows import PromptStore
from noisepolicy.training.task import Task, as_reward

Method = Literal["random", "zero-order", "cem", "find"]

MAX_IMAGES = 2**20
"""Largest number of images of a prompt: as many rows of noise are set aside for each."""
_IMAGES_AT_A_TIME = 256
_RADIUS = 0.6  # of the sphere, as a share of the noise's own length
_MIN_STD = 0.05


@dataclass(frozen=True)
class SearchState:
    """A search after some of its images."""

    num_images: int
    """Number of images made so far for each prompt."""
    latents: torch.Tensor
    """The best start of each prompt so far, float32 `(prompts, *latent_shape)`."""
    best_reward: torch.Tensor
    """Rewards of these, float64 `(prompts,)`."""
    rewards: torch.Tensor
    """Rewards of the newest images, float64 `(prompts, images)`."""
    mean: torch.Tensor
    """Mean of the Gaussian that the next images are drawn from, float32 `(prompts, *action_shape)`."""
    log_std: torch.Tensor
    """Its log-std."""


@dataclass(frozen=True)
class Found:
    """Result of a search; one entry for each prompt."""

    images: Any
    """Pictures from the best starts: PIL images, or lists of frames; a tensor if the model makes something else."""
    rewards: list[float]
    """Rewards of the pictures."""
    starts: torch.Tensor
    """The best starts, float32 `(prompts, *latent_shape)`."""
    all_rewards: torch.Tensor
    """Rewards of all images of the search in the order they were made, float64 `(prompts, budget)`."""
    _pack: Callable[[torch.Tensor], torch.Tensor]

    @cached_property
    def latents(self) -> torch.Tensor:
        """The best starts in the form of the pipeline's `latents=`."""
        return self._pack(self.starts)


def search(
    model: Any,
    prompts: str | Sequence[str],
    reward: str | Reward | Callable[..., Any],
    *,
    method: Method = "random",
    budget: int = 16,
    population_size: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    policy: NoisePolicy | str | Path | None = None,
    seed: int = 0,
    **options: Any,
) -> Found:
    """Search for the start of each prompt whose image has the highest reward.

    Args:
        model: A diffusers pipeline, which is used as it is, or any `FrozenModel`.
        prompts: One prompt or several.
        reward: Text as in `--reward`, a function `reward(images, prompts)` or a `Reward`.
        method: "random", "zero-order", "cem" or "find".
        budget: Number of images of each prompt.
        population_size: Number of images of a prompt between two changes of what they are drawn from. Default: an
            eighth of the budget, from 4 to 40.
        num_inference_steps, guidance_scale: As the pipeline takes them. Default: the pipeline's own.
        policy: A policy, its folder or hub id, to search from in the place of the prior. "random" draws all images
            from it, "find" starts at its Gaussian, the others draw their first images from it.
        seed: Seed of the noise.
        options: Keyword arguments of `FrozenDiffusersPipeline`, such as `height`, for a pipeline.

    Raises:
        ValueError: if an argument is out of range, or the policy does not fit the model.
        RewardError: if the reward fails.
    """
    from tqdm.auto import tqdm

    import noisepolicy
    from noisepolicy.evaluation.figures import as_pictures

    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    is_pipeline = hasattr(model, "components")
    # A scheduler that draws noise draws the same for every image: the latents are what is searched for.
    frozen = as_frozen_model(model, **({"sampler_noise": "fixed"} if is_pipeline else {}), **options)
    own = frozen.call_defaults if is_pipeline else {}
    settings = {
        "num_inference_steps": num_inference_steps or own.get("num_inference_steps"),
        "guidance_scale": own.get("guidance_scale", 1.0) if guidance_scale is None else guidance_scale,
    }
    if settings["num_inference_steps"] is None:
        raise ValueError(f"num_inference_steps is missing: {type(model).__name__} has no default of its own")
    if isinstance(policy, str | Path):
        policy = noisepolicy.load(policy)
    device = frozen.device or torch.device("cpu")
    reward = load_reward(reward, device=device) if isinstance(reward, str) else as_reward(reward, "reward")
    states = search_states(
        frozen,
        reward,
        texts,
        method=method,
        budget=budget,
        population_size=population_size or min(max(budget // 8, 4), 40, budget),
        policy=policy,
        seed=seed,
        **settings,
    )
    rewards = []
    with tqdm(total=budget * len(texts), desc="searching", unit="image", disable=None) as progress:
        for state in states:
            rewards.append(state.rewards)
            progress.update(state.rewards.numel())

    def pack(starts: torch.Tensor) -> torch.Tensor:
        if not is_pipeline:
            return starts
        from noisepolicy.frozen.calling import PipelinePrompts

        sizes = ("height", "width", "num_frames", "max_sequence_length")
        return PipelinePrompts(model, **{name: options.get(name) for name in sizes}).pack(texts, starts)

    images = frozen.generate(state.latents, frozen.encode(texts), **settings)
    return Found(as_pictures(images), state.best_reward.tolist(), state.latents, torch.cat(rewards, 1), pack)


def search_states(
    frozen: FrozenModel,
    reward: Reward,
    prompts: Sequence[str],
    *,
    method: Method,
    budget: int,
    population_size: int,
    num_inference_steps: int,
    guidance_scale: float,
    seed: int,
    policy: NoisePolicy | None = None,
) -> Iterator[SearchState]:
    """Search, and yield the state after each population; see `search`.

    Raises:
        ValueError: at the first state, if an argument is out of range, or the policy does not fit the model.
    """
    if method not in get_args(Method):
        raise ValueError(f"unknown method {method!r}; choose from {', '.join(get_args(Method))}")
    if len(prompts) == 0:
        raise ValueError("there are no prompts to search for")
    if not 1 <= population_size <= budget <= MAX_IMAGES:
        raise ValueError(f"budget must be in [{population_size}, {MAX_IMAGES}] for a prompt, got {budget}")
    problem = _Problem(
        frozen, reward, prompts, frozen.encode(prompts), population_size, num_inference_steps, guidance_scale, seed
    )
    if policy is not None:
        problem.check_fits(policy)
        policy.to(problem.device)
    learner = _Find(problem, policy) if method == "find" else _Gaussian(problem, policy, method)
    latents = torch.zeros(len(prompts), *frozen.latent_shape, device=problem.device)
    best_reward = latents.new_full((len(prompts),), -torch.inf, dtype=torch.float64)
    for done in range(0, budget, population_size):
        drawn = learner.draw(done, min(population_size, budget - done))
        parts = problem.score(drawn)
        rewards = weigh(parts.flatten(0, 1), reward.weights).reshape(drawn.shape[:2])
        best_here, index = rewards.max(dim=1)
        is_better = (best_here > best_reward).reshape(-1, *[1] * (latents.ndim - 1))
        latents = torch.where(is_better, drawn[torch.arange(len(prompts), device=index.device), index], latents)
        best_reward = torch.maximum(best_reward, best_here)
        if drawn.shape[1] == population_size:
            learner.learn(drawn, parts, rewards, latents)
        yield SearchState(done + drawn.shape[1], latents, best_reward, rewards, *learner.distribution)


@dataclass(frozen=True)
class _Problem:
    frozen: FrozenModel
    reward: Reward
    prompts: Sequence[str]
    embeds: PromptEmbeds
    population_size: int
    num_inference_steps: int
    guidance_scale: float
    seed: int

    @property
    def device(self) -> torch.device:
        return self.embeds.prompt_embeds.device

    def rows(self, prompt: int, count: int) -> torch.Tensor:
        """Return the embeddings of one prompt, `count` times."""
        return self.embeds.prompt_embeds[prompt].expand(count, -1, -1)

    def draw(self, first_image: int, draw: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Stack what `draw(prompt, seed=, offset=)` returns for each prompt, `(prompts, images, *latent_shape)`.

        Image i of prompt p has noise row `p * MAX_IMAGES + i` of the seed's stream.
        """
        key, size = stream_seed(self.seed, "search noise"), num_counters(self.frozen.latent_shape)
        return torch.stack(
            [
                draw(prompt, seed=key, offset=(prompt * MAX_IMAGES + first_image) * size)
                for prompt in range(len(self.prompts))
            ]
        )

    def score(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the parts of the reward of the images from `latents`, float64 `(prompts, images, parts)`."""
        rows, parts = latents.flatten(0, 1), []
        for row in torch.arange(len(rows)).split(_IMAGES_AT_A_TIME):
            prompt = row // latents.shape[1]
            images = self.frozen.generate(
                rows[row],
                self.embeds[prompt],
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
            )
            parts.append(self.reward.parts(images, [self.prompts[i] for i in prompt.tolist()]))
        return torch.cat(parts).to(latents.device).reshape(*latents.shape[:2], -1)

    def check_fits(self, policy: NoisePolicy) -> None:
        """Raise `ValueError` if the policy was trained for other embeddings or channels than the model's."""
        shape = tuple(self.embeds.prompt_embeds.shape[1:])
        if policy.prompt_shape != shape:
            raise ValueError(f"the policy is for prompt embeddings {policy.prompt_shape}; this model gives {shape}")
        if policy.latent_shape[0] != self.frozen.latent_shape[0]:
            raise ValueError(
                f"the policy is for latents {policy.latent_shape}; this model has {self.frozen.latent_shape}"
            )


class _Gaussian:
    """The methods that draw from a Gaussian over all latents, `N(mean, exp(log_std)^2)`, at first the prior."""

    def __init__(self, problem: _Problem, policy: NoisePolicy | None, method: Method) -> None:
        self._problem, self._policy, self._method = problem, policy, method
        mean = torch.zeros(len(problem.prompts), *problem.frozen.latent_shape, device=problem.device)
        self.distribution = (mean, torch.zeros_like(mean))

    def draw(self, done: int, count: int) -> torch.Tensor:
        """Draw latents, float32 `(prompts, count, *latent_shape)`, after `done` for each prompt."""
        problem, policy = self._problem, self._policy
        if policy is not None and (done == 0 or self._method == "random"):
            options = {"num_inference_steps": problem.num_inference_steps, "latent_shape": problem.frozen.latent_shape}
            return problem.draw(
                done, lambda prompt, **noise: policy.choose(problem.rows(prompt, count), **noise, **options)
            )
        mean, log_std = (value.unsqueeze(1).expand(-1, count, *value.shape[1:]) for value in self.distribution)
        return problem.draw(done, lambda prompt, **noise: gaussian_sample(mean[prompt], log_std[prompt], **noise)[0])

    def learn(self, drawn: torch.Tensor, parts: torch.Tensor, rewards: torch.Tensor, best: torch.Tensor) -> None:
        """Move the Gaussian.

        Args:
            drawn: What `draw` returned last.
            parts: Parts of the rewards of its images, `(prompts, count, parts)`.
            rewards: Their weighted sums, `(prompts, count)`.
            best: The best latents of all so far, `(prompts, *latent_shape)`.
        """
        if self._method == "zero-order":
            # As loud as noise: the best is scaled down by what the step adds.
            self.distribution = ((1 - _RADIUS**2) ** 0.5 * best, torch.full_like(best, _RADIUS).log())
        elif self._method == "cem":
            count = drawn.shape[1]
            num_elites = min(max(count // 10, 4), -(-count // 2))
            order = rewards.argsort(dim=1, descending=True, stable=True)[:, :num_elites]
            elite = drawn[torch.arange(len(drawn), device=order.device)[:, None], order]
            # The elite's variance is divided by its number, not by one less: what its mean gains in power its spread
            # then loses, so the noise stays about as loud as the model expects.
            self.distribution = (elite.mean(1), elite.std(1, correction=0).clamp(min=_MIN_STD).log())


class _Find:
    """FIND's learner, with the methods of `_Gaussian`."""

    def __init__(self, problem: _Problem, policy: NoisePolicy | None) -> None:
        self._problem, self._number = problem, 0
        num_prompts, device = len(problem.prompts), problem.device
        config = TrainConfig().replace(
            algorithm="find",
            group_size=problem.population_size,
            batch_size=problem.population_size * num_prompts,
            num_inference_steps=(problem.num_inference_steps,),
            guidance_scale=problem.guidance_scale,
            seed=problem.seed,
        )
        task = Task(problem.frozen, problem.reward, [], problem.prompts, [])
        store = PromptStore(problem.frozen, problem.prompts, device)
        with TemporaryDirectory() as folder:
            if policy is not None:
                policy.save_pretrained(folder)
                config = config.replace(init_policy=Path(folder))
            self._learner = Find(
                config.resolved(num_prompts), task, store, start_copy=Path(folder) / "copy", device=device
            )

    @property
    def distribution(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-std of FIND's action, which is the latents, or the low frequencies of a policy it started at."""
        return self._learner.policy.distribution(torch.arange(len(self._problem.prompts), device=self._problem.device))

    @torch.no_grad()
    def draw(self, done: int, count: int) -> torch.Tensor:
        policy, samples = self._learner.policy, []

        def sample(prompt: int, **noise: int) -> torch.Tensor:
            samples.append(policy.sample(self._problem.rows(prompt, count), **noise))
            return samples[-1].latents

        drawn = self._problem.draw(done, sample)
        self._sample = PolicySample(*map(torch.cat, zip(*samples, strict=True)))
        return drawn

    def learn(self, drawn: torch.Tensor, parts: torch.Tensor, rewards: torch.Tensor, best: torch.Tensor) -> None:
        num_prompts, count = rewards.shape
        rollout = Rollout(
            prompt_row=torch.arange(num_prompts).repeat_interleave(count),
            step_index=torch.zeros(num_prompts * count, dtype=torch.int64, device=rewards.device),
            action=self._sample.action,
            log_prob=self._sample.log_prob,
            parts=parts.flatten(0, 1),
            reward=rewards.flatten(),
            picture=None,
        )
        with plain_arithmetic():
            self._learner.learn(rollout, self._number)
        self._number += 1
