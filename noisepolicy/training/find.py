"""FIND (Chen et al., ACM MM 2024, arXiv 2407.19453): a free mean and std for each prompt, many prompts at once.

Denoising is a Markov decision process of one step: the state is the prompt, the action the initial noise, the reward
the picture's. Each iteration draws a group of pictures for every prompt, calibrates the reward (a network predicts what
the current distribution is worth; the advantage is what a picture got beyond it), and takes a few clipped steps on new
and historical samples together. Every ratio is against the distribution that its sample was drawn from.

Started from a policy with a critic (`--init-policy`), the critic takes the calibrator's place: it foresees the reward
of each noise, and its own gradient is followed beside the clipped term.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from noisepolicy.ops import gaussian_kl, gaussian_log_prob, ppo_clip_loss
from noisepolicy.policies import NoisePolicy, TablePolicy
from noisepolicy.policies.critic import RewardCritic
from noisepolicy.policies.prompt_reader import PromptReader
from noisepolicy.storage import load_optimizer_tensors, optimizer_tensors
from noisepolicy.training.checkpoint import with_prefix, without_prefix
from noisepolicy.training.config import TrainConfig
from noisepolicy.training.loop import TrainingLoop
from noisepolicy.training.replay import Replay
from noisepolicy.training.rollout import Rollout
from noisepolicy.training.run_folder import RunFolder
from noisepolicy.training.seeding import stream_generator, stream_seed
from noisepolicy.training.task import Task

_CALIBRATOR_UPDATES = 20
_CALIBRATOR_LEARNING_RATE = 3e-3
_CRITIC_SAMPLES = 8  # of a row, for the critic's gradient


class RewardCalibrator(nn.Module):
    """FIND's dynamic reward calibration: the expected reward of a distribution over the noise, and a prompt."""

    def __init__(self, prompt_shape: tuple[int, int], action_size: int, hidden_width: int = 64) -> None:
        super().__init__()
        self.prompt = PromptReader(prompt_shape, token_width=16, hidden_width=hidden_width)
        self.distribution = nn.Linear(2 * action_size, hidden_width)
        self.out = nn.Linear(2 * hidden_width, 1)
        self.register_buffer("center", torch.zeros(()))
        self.register_buffer("spread", torch.ones(()))

    def measure(self, reward: torch.Tensor) -> None:
        """Takes the scale of the rewards from the first of them."""
        self.center.copy_(reward.mean())
        self.spread.copy_(reward.std().clamp(min=1e-6))

    def forward(self, prompt_embeds: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
        """`(batch,)` from `(batch, tokens, width)` and two of `(batch, *action_shape)`."""
        place = torch.cat([mean, log_std.expand_as(mean)], 1).flatten(1)
        value = self.out(torch.cat([self.prompt(prompt_embeds), F.silu(self.distribution(place))], 1))[:, 0]
        return self.center + self.spread * value


class FindTrainer(TrainingLoop):
    """`TrainingLoop` of the algorithm `find`. Row i of the table is prompt i of the task.

    Raises:
        ValueError: if a batch holds more groups than there are prompts, or the policy to start from does not fit.
    """

    policy: TablePolicy

    def __init__(self, config: TrainConfig, task: Task, run: RunFolder, accelerator: Accelerator) -> None:
        super().__init__(config, task, run, accelerator)
        config, device, num_prompts = self.config, accelerator.device, len(task.train_prompts)
        if config.batch_size // config.group_size > num_prompts:
            raise ValueError(
                f"--batch-size {config.batch_size} is more than a group of {config.group_size} for each of "
                f"{num_prompts} prompts"
            )
        self.prompts.add(range(num_prompts))
        embeds = self.prompts[torch.arange(num_prompts)].prompt_embeds
        self._critic: RewardCritic | None = None
        self.policy = self._make_policy(embeds).to(device)
        self.average = self._start_average()
        self._replay = Replay(num_prompts, config.replay * config.group_size, self.policy.action_shape, device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(config.seed, "calibrator weights"))
            self._calibrator = RewardCalibrator(self.prompt_shape, math.prod(self.policy.action_shape)).to(device)
        self._calibrator_optimizer = torch.optim.AdamW(
            self._calibrator.parameters(), lr=_CALIBRATOR_LEARNING_RATE, fused=True
        )

    def kept_policy(self) -> NoisePolicy:
        """A copy of the averaged table within its KL budget, with the critic it started from, if any, to choose."""
        kept = copy.deepcopy(self.average)
        kept.shrink_to(self.config.kl_budget, self.prompts[torch.arange(len(self.prompts))].prompt_embeds)
        if self._critic is not None and self.config.num_candidates > 1:
            kept.attach_critic(copy.deepcopy(self._critic), self.config.num_candidates)
        return kept

    def _make_policy(self, embeds: torch.Tensor) -> TablePolicy:
        config, start = self.config, None
        bands, std = (config.bands if config.policy == "spectral" else None), config.std
        if config.init_policy is not None:
            start = NoisePolicy.from_pretrained(config.init_policy).to(embeds.device)
            if (start.latent_shape, start.prompt_shape) != (self.task.frozen.latent_shape, self.prompt_shape):
                raise ValueError(
                    f"--init-policy {config.init_policy} is for latents {start.latent_shape} and prompt embeddings "
                    f"{start.prompt_shape}; this model has {self.task.frozen.latent_shape} and {self.prompt_shape}"
                )
            bands, std, self._critic = start.config.get("bands"), start.config["std"], start.critic
        policy = TablePolicy(
            latent_shape=self.task.frozen.latent_shape, prompt_shape=self.prompt_shape,
            prompts=self.task.train_prompts, bands=bands, std=std,
        ).to(embeds.device)  # fmt: skip
        policy.learn_keys(embeds)
        if start is not None:
            with torch.no_grad():
                mean, log_std = start(embeds)
                policy.set_distribution(mean, log_std)
        return policy

    def _draw_prompts(self, number: int) -> list[int]:
        """The next of the prompts, round and round."""
        count = self.config.batch_size // self.config.group_size
        return [index % len(self.task.train_prompts) for index in range(number * count, (number + 1) * count)]

    def _iterate(self) -> dict[str, Any]:
        config, number = self.config, self.iteration
        rollout = self._roll_out(number)
        with self._clock.phase("policy"):
            group = config.group_size
            prompt = rollout.prompt_row[::group].to(rollout.reward.device)
            self._replay.append(
                prompt,
                action=rollout.action.unflatten(0, (-1, group)),
                log_prob=rollout.log_prob.unflatten(0, (-1, group)),
                reward=rollout.reward.unflatten(0, (-1, group)),
                step_index=rollout.step_index.unflatten(0, (-1, group)),
            )
            metrics = {
                "iteration": number + 1,
                "images": (number + 1) * config.batch_size,
                "reward": rollout.reward.mean().item(),
                "reward_std": rollout.reward.std().item(),
                "calibration_error": self._calibrate(prompt, rollout),
            }
            metrics |= self._update(prompt, stream_generator(config.seed, "policy update", number))
            self._average_weights()
        return metrics

    def _calibrate(self, prompt: torch.Tensor, rollout: Rollout) -> float:
        """Teaches the calibrator what the current distributions are worth; returns its relative error before."""
        reward = rollout.reward.unflatten(0, (-1, self.config.group_size))
        if self.iteration == 0:
            self._calibrator.measure(reward)
        embeds = self.prompts[prompt].prompt_embeds.float()
        with torch.no_grad():
            mean, log_std = self.policy.distribution(prompt)
        error = None
        for _ in range(_CALIBRATOR_UPDATES):
            loss = F.mse_loss(self._calibrator(embeds, mean, log_std), reward.mean(1)) / self._calibrator.spread**2
            error = loss.item() if error is None else error
            self._calibrator_optimizer.zero_grad()
            loss.backward()
            self._calibrator_optimizer.step()
        return error

    def _update(self, prompt: torch.Tensor, generator: torch.Generator) -> dict[str, float]:
        """A few natural-gradient steps on the prompts' rows; a row whose KL from where it was passes its target rests.

        The loss of a row, with a critic between brackets, in units of the spread of its rewards:

            ppo_clip_loss(advantages of its samples in the trust region) [- mean critic.lower_bound] + kl_coef KL(prior)
        """
        config = self.config
        samples, is_filled = self._replay.of(prompt)
        embeds = self.prompts[prompt].prompt_embeds.float()
        capacity = is_filled.shape[1]
        with torch.no_grad():
            old_mean, old_log_std = self.policy.distribution(prompt)
            spread = _spread(samples["reward"], is_filled)
            advantages = (samples["reward"] - self._foreseen(embeds, samples, old_mean, old_log_std)) / spread
        action, old_log_prob = samples["action"].flatten(0, 1), samples["log_prob"].flatten()
        for _ in range(config.num_updates):
            mean, log_std = self.policy.distribution(prompt)
            with torch.no_grad():
                is_live = gaussian_kl(old_mean, old_log_std, mean, log_std) <= config.target_kl
            if not is_live.any():
                break
            means, log_stds = (_repeat(value, capacity) for value in (mean, log_std))
            with torch.no_grad():
                log_ratio = gaussian_log_prob(action, means, log_stds) - old_log_prob
                is_used = is_filled & (log_ratio.abs() <= config.max_log_ratio).view_as(is_filled)
                weight = is_used * (capacity / is_used.sum(1, keepdim=True).clamp(min=1))
            loss, stats = ppo_clip_loss(
                action, means, log_stds, old_log_prob, (advantages * weight).flatten(), clip_range=config.clip_range
            )
            # A mean over prompts: times their number it is each row's own.
            loss = len(prompt) * loss + config.kl_coef * (gaussian_kl(mean, log_std) / spread[:, 0]).sum()
            if self._critic is not None:
                loss = loss - (self._promise(embeds, mean, log_std, generator) / spread[:, 0]).sum()
            self.policy.zero_grad()
            loss.backward()
            self.policy.natural_step(prompt[is_live], config.learning_rate)
        with torch.no_grad():
            mean, log_std = self.policy.distribution(prompt)
            return {
                "kl_to_prior": gaussian_kl(mean, log_std).mean().item(),
                "step_kl": gaussian_kl(old_mean, old_log_std, mean, log_std).mean().item(),
                "clip_fraction": stats.clip_fraction.item(),
                "used_fraction": (is_used.sum() / is_filled.sum()).item(),
            }

    def _foreseen(
        self, embeds: torch.Tensor, samples: Mapping[str, torch.Tensor], mean: torch.Tensor, log_std: torch.Tensor
    ) -> torch.Tensor:
        """The reward to expect: of each sample's own noise by the critic, or of the distribution by the calibrator."""
        if self._critic is None:
            return self._calibrator(embeds, mean, log_std)[:, None]
        count = samples["reward"].shape[1]
        values = self._critic(
            embeds.repeat_interleave(count, 0), samples["action"].flatten(0, 1), samples["step_index"].flatten()
        )
        return values.mean(0).unflatten(0, (-1, count))

    def _promise(
        self, embeds: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """The critic's lower bound of the rows' rewards, over fresh noise; `(prompts,)`, with gradient."""
        means, log_stds = (_repeat(value, _CRITIC_SAMPLES) for value in (mean, log_std))
        noise = torch.randn(means.shape, generator=generator).to(means.device)
        count = len(self.config.num_inference_steps)
        step_index = (torch.arange(len(means)) % count).to(means.device)
        values, _ = self._critic.lower_bound(
            embeds.repeat_interleave(_CRITIC_SAMPLES, 0), means + log_stds.exp() * noise, step_index
        )
        return values.unflatten(0, (-1, _CRITIC_SAMPLES)).mean(1)

    def _state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        tensors = with_prefix("replay", self._replay.state())
        tensors |= with_prefix("calibrator", self._calibrator.state_dict())
        tensors |= optimizer_tensors(self._calibrator_optimizer, "calibrator_optimizer")
        return tensors, {}

    def _load_state(self, tensors: Mapping[str, torch.Tensor], progress: Mapping[str, Any]) -> None:
        self._replay.load_state(without_prefix("replay", tensors))
        self._calibrator.load_state_dict(without_prefix("calibrator", tensors))
        load_optimizer_tensors(self._calibrator_optimizer, tensors, "calibrator_optimizer")


def _repeat(value: torch.Tensor, count: int) -> torch.Tensor:
    """Each row `count` times, for a row's samples lie together."""
    return value if value.ndim == 0 else value.repeat_interleave(count, 0)


def _spread(reward: torch.Tensor, is_filled: torch.Tensor) -> torch.Tensor:
    """Standard deviation of each row's filled places, `(prompts, 1)`, not zero."""
    count = is_filled.sum(1, keepdim=True)
    center = (reward * is_filled).sum(1, keepdim=True) / count
    variance = (((reward - center) ** 2) * is_filled).sum(1, keepdim=True) / count
    return variance.sqrt().clamp(min=1e-6)
