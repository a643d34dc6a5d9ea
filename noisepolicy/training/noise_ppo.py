"""Noise PPO: one policy for every prompt, with or without a reward critic.

`NoisePpo.learn` is what one iteration learns from its images, top to bottom: the reward's scale, the critic, the
policy. `run.py` calls it, `rollout.py` makes the images. Nothing is back-propagated through the frozen model or the
reward. Every process of a run holds the whole batch and makes the same update, a thousandth of the images' cost.
"""

import copy
import math
from collections.abc import Mapping
from itertools import pairwise, starmap
from pathlib import Path
from typing import Any

import torch

from noisepolicy.ops import gaussian_kl, gaussian_log_prob, ppo_clip_loss
from noisepolicy.policies import NoisePolicy
from noisepolicy.policies.base import make_policy
from noisepolicy.policies.critic import CriticShape, RewardCritic
from noisepolicy.policies.networks import averaged, plain_arithmetic
from noisepolicy.rewards.base import RewardScale
from noisepolicy.storage import load_optimizer_tensors, optimizer_tensors
from noisepolicy.training.checkpoint import with_prefix, without_prefix
from noisepolicy.training.config import TrainConfig
from noisepolicy.training.rollout import Rollout, draw_noise, stream_generator, stream_seed
from noisepolicy.training.rows import History, PromptStore
from noisepolicy.training.task import Task

_KL_COEF_RATE = 0.1
_DIVERSITY_COEF_RATE = 0.5
_NUM_BUDGET_PROMPTS = 256
_MAX_ADVANTAGE = 5.0  # one outlier must not outweigh the rest of the batch
_MAX_LOG_PROB_DRIFT = 1e-2
_MAX_ATTEMPTS = 10


class NoisePpo:
    """The learner of the algorithms `critic` and `ppo`.

    Args:
        config: Resolved settings.
        task: The frozen model, the reward and the prompts.
        prompts: Embeddings of the prompts met so far.
        history_folder: RUN/history, or None for a process that is not the main one.
        device: Device of the policy and the critic.
    """

    @plain_arithmetic()
    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        prompts: PromptStore,
        *,
        history_folder: Path | None,
        device: torch.device,
    ) -> None:
        self._config, self._prompts, self._num_prompts = config, prompts, len(task.train_prompts)
        self.policy = make_config_policy(config, task.frozen.latent_shape, prompts.shape)
        self.policy.to(device)
        self.average = copy.deepcopy(self.policy).eval().requires_grad_(False)
        self._policy_optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=config.learning_rate, weight_decay=1e-3, fused=True
        )
        self._scale = RewardScale(task.reward.weights, config.group_size, config.normalize_rewards)
        self._critic: RewardCritic | None = None
        self.critic_shape: CriticShape | None = None
        self._kl_coef, self._diversity_coef = config.kl_coef, config.diversity_coef
        if config.algorithm != "critic":
            return
        self.critic_shape = CriticShape(
            prompt_shape=self.policy.prompt_shape,
            action_shape=self.policy.action_shape,
            is_spectral=config.policy == "spectral",
            step_counts=config.num_inference_steps,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(config.seed, "critic weights"))
            self._critic = RewardCritic(self.critic_shape, size=config.critic.size).to(device)
        self._critic_optimizer = torch.optim.AdamW(
            self._critic.parameters(),
            lr=config.critic.learning_rate,
            weight_decay=config.critic.weight_decay,
            fused=True,
        )
        self._history = History(
            history_folder, self.policy.action_shape, self.critic_shape.sketch_shape, len(task.reward.weights), device
        )

    def draw_prompts(self, number: int) -> list[int]:
        """Return the prompts of iteration `number`, one per group."""
        generator = stream_generator(self._config.seed, "prompts", number)
        num_groups = self._config.batch_size // self._config.group_size
        return torch.randint(self._num_prompts, (num_groups,), generator=generator).tolist()

    def begin(self) -> None:
        """Do nothing: the run folder needs nothing from this learner before the first iteration."""

    def learn(self, rollout: Rollout, number: int) -> dict[str, Any]:
        """Learn from the images of iteration `number` and return its metrics."""
        config = self._config
        self._scale.update(rollout.parts)
        self._scale.warn_if_nothing_to_learn()
        metrics: dict[str, Any] = {"kl_coef": self._kl_coef, "diversity_coef": self._diversity_coef}
        if self._critic is not None:
            metrics |= self._learn_reward(rollout, number)
        if self._critic is not None and (number + 1) * config.batch_size < config.critic.warmup:
            return metrics | {"kl_to_prior": 0.0, "step_kl": 0.0}
        metrics |= self._update_policy(rollout, stream_generator(config.seed, "policy update", number))
        self._adapt_kl_coef(metrics["kl_to_prior"])
        if self._critic is not None:
            self._adapt_diversity_coef(metrics["diversity_kept"])
        averaged(self.average, self.policy, config.average_decay, number)
        return metrics

    def _learn_reward(self, rollout: Rollout, number: int) -> dict[str, float]:
        """Measure how well the critic predicts the batch, add the batch to the history, and train the critic."""
        self._critic.set_scale(self._scale.spread.center, self._scale.spread.total)
        reward = self._scale.standardise(rollout.parts)
        with torch.no_grad():
            embeds = self._prompts[rollout.prompt_row].prompt_embeds.float()
            foreseen = self._critic(embeds, rollout.action, rollout.step_index).mean(0)
        self._history.append(
            prompt_row=rollout.prompt_row,
            step_index=rollout.step_index,
            parts=rollout.parts,
            action=rollout.action,
            picture=rollout.picture,
        )
        self._critic.requires_grad_(True)
        loss = self._update_critic(stream_generator(self._config.seed, "critic", number))
        self._critic.requires_grad_(False)
        variance = reward.var().item()
        unexplained = ((foreseen - reward) ** 2).mean().item() / variance if variance else 1.0
        return {"critic_loss": loss, "critic_unexplained": unexplained}

    def _update_critic(self, generator: torch.Generator) -> float:
        """Train the critic on pictures and standardised rewards of the history.

        Returns:
            The rewards' mean squared error over the updates, in the reward's own units.
        """
        settings, total = self._config.critic, 0.0
        for _ in range(settings.updates):
            rows = self._history.draw(settings.batch_size, generator)
            loss, error = self._critic.loss(
                self._prompts[rows["prompt_row"]].prompt_embeds.float(),
                rows["action"],
                rows["step_index"],
                rows["picture"].float(),
                self._scale.standardise(rows["parts"]),
            )
            self._critic_optimizer.zero_grad()
            loss.backward()
            # Without it, one bad batch late in a run can undo the critic and the policy that follows it.
            torch.nn.utils.clip_grad_norm_(self._critic.parameters(), self._config.max_grad_norm)
            self._critic_optimizer.step()
            total = total + error
        return float(total) / settings.updates * self._scale.spread.total**2

    def _update_policy(self, rollout: Rollout, generator: torch.Generator) -> dict[str, float]:
        """Take clipped PPO steps on the batch and, with a critic, along its gradient on fresh samples of the policy.

            loss = ppo_clip_loss(advantages) - mean(critic.lower_bound)
                   - diversity_coef * difference of two sketches + kl_coef * KL(policy, prior)

        Rewards are in units of their spread between images of one prompt. The advantages are the rewards less the
        critic's prediction (a control variate, as in Q-Prop, arXiv 1611.02247), or the leave-one-out advantages of
        plain Noise PPO. Stops early when KL(old, new) passes its target, and is drawn back to it from more than twice
        as much, which a single step of a policy without a critic can come to.

        Args:
            generator: Generator of fresh prompts and noise.
        """
        config, policy, critic = self._config, self.policy, self._critic
        batch_embeds = self._prompts[rollout.prompt_row].prompt_embeds.float()
        with torch.no_grad():
            old_mean, old_log_std = policy(batch_embeds)
            # Taken anew by the op that the loss uses, so the first ratio is 1 (to the bit where the batch is one part);
            # float32 log-probs of hundreds of dimensions are exact to 1e-4 only.
            old_log_prob = gaussian_log_prob(rollout.action, old_mean, old_log_std)
            if (drift := (old_log_prob - rollout.log_prob).abs().max().item()) > _MAX_LOG_PROB_DRIFT:
                raise RuntimeError(
                    f"log-probs of the rollout and of its update differ by {drift:.3g}; the ratio would lie"
                )
            reward = self._scale.standardise(rollout.parts)
            if critic is None:
                advantages = leave_one_out(reward, config.group_size, self._scale.within_share)
            else:
                predicted = critic(batch_embeds, rollout.action, rollout.step_index).mean(0)
                advantages = residual(reward, predicted, self._scale.within_share)
        ppo_kl_coef = self._kl_coef if critic is None else 0.0
        # For memory: the graph of a part of the batch at a time. Slices are views, where indices would copy embeddings.
        batch, num_parts = len(rollout.reward), config.gradient_accumulation_steps
        parts = list(starmap(slice, pairwise(batch * number // num_parts for number in range(num_parts + 1))))
        start = [parameter.detach().clone() for parameter in policy.parameters()]
        for _ in range(config.num_updates):
            self._policy_optimizer.zero_grad()
            step_kl, clip_fraction = [], 0.0
            for rows in parts:
                mean, log_std = policy(batch_embeds[rows])
                with torch.no_grad():
                    before = old_mean[rows], old_log_std[rows] if old_log_std.ndim else old_log_std
                    step_kl.append(gaussian_kl(*before, mean, log_std))
                ppo_loss, stats = ppo_clip_loss(
                    rollout.action[rows],
                    mean,
                    log_std,
                    old_log_prob[rows],
                    advantages[rows],
                    clip_range=config.clip_range,
                    kl_coef=ppo_kl_coef,
                )
                share = (rows.stop - rows.start) / batch
                clip_fraction = clip_fraction + share * stats.clip_fraction
                (share * ppo_loss).backward()
            if torch.cat(step_kl).mean().item() > config.target_kl:
                break
            if critic is not None:
                self._critic_loss(generator).backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
            self._policy_optimizer.step()
        with torch.no_grad():
            mean, log_std = _draw_back(policy, start, batch_embeds, old_mean, old_log_std, config.target_kl)
            metrics = {
                "kl_to_prior": gaussian_kl(mean, log_std).mean().item(),
                "step_kl": gaussian_kl(old_mean, old_log_std, mean, log_std).mean().item(),
                "clip_fraction": float(clip_fraction),
            }
            if critic is not None:
                metrics["diversity_kept"] = _diversity_kept(mean, log_std, critic, batch_embeds, rollout, generator)
            return metrics

    def _critic_loss(self, generator: torch.Generator) -> torch.Tensor:
        """Compute the critic's term of the policy's loss, including KL and variety, on fresh samples of the policy."""
        config, policy = self._config, self.policy
        # Two samples of each prompt, to see how far apart their pictures are.
        count = config.critic.batch_size // 2
        rows = torch.randint(len(self._prompts), (count,), generator=generator).repeat(2)
        step_index = torch.randint(len(config.num_inference_steps), (count,), generator=generator).repeat(2)
        fresh = self._prompts[rows].prompt_embeds.float()
        mean, log_std = policy(fresh)
        action = mean + log_std.exp() * draw_noise(mean, generator)
        value, sketch = self._critic.lower_bound(fresh, action, step_index.to(mean.device))
        distance = _distance(*sketch.chunk(2))
        gain = value.mean() / self._scale.within_share if self._scale.within_share else 0.0
        return self._kl_coef * gaussian_kl(mean, log_std).mean() - gain - self._diversity_coef * distance.mean()

    @plain_arithmetic()
    def kept_policy(self) -> NoisePolicy:
        """The result of the run: the averaged policy within its KL budget on the first prompts met, with the critic."""
        kept = copy.deepcopy(self.average)
        rows = torch.arange(min(_NUM_BUDGET_PROMPTS, len(self._prompts)))
        kept.shrink_to(self._config.kl_budget, self._prompts[rows].prompt_embeds)
        if self._critic is not None and self._config.num_candidates > 1:
            kept.attach_critic(copy.deepcopy(self._critic), self._config.num_candidates)
        return kept

    def _adapt_kl_coef(self, kl_to_prior: float) -> None:
        """Raise the KL penalty while the policy is over its budget; below, let it fall back to its start."""
        excess = min(max(kl_to_prior / self._config.kl_training_budget - 1, -1.0), 1.0)
        self._kl_coef = max(self._kl_coef * (1 + _KL_COEF_RATE * excess), self._config.kl_coef)

    def _adapt_diversity_coef(self, diversity_kept: float) -> None:
        """Raise the worth of variety while the policy keeps less than its target; lower it above the target."""
        missing = min(max(self._config.diversity_target - diversity_kept, -0.2), 0.2)
        self._diversity_coef *= 1 + _DIVERSITY_COEF_RATE * missing

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return tensors and JSON values for a checkpoint, beside the weights of `policy` and `average`."""
        tensors = optimizer_tensors(self._policy_optimizer, "policy_optimizer")
        tensors |= with_prefix("reward_scale", self._scale.state())
        progress: dict[str, Any] = {"kl_coef": self._kl_coef, "diversity_coef": self._diversity_coef}
        if self._critic is not None:
            tensors |= with_prefix("critic", self._critic.state_dict())
            tensors |= optimizer_tensors(self._critic_optimizer, "critic_optimizer")
            progress["history"] = self._history.state()
        return tensors, progress

    def load_state(
        self, tensors: Mapping[str, torch.Tensor], progress: Mapping[str, Any], history_folder: Path
    ) -> None:
        """Restore what `state` returned; the history's rows are read from RUN/history."""
        load_optimizer_tensors(self._policy_optimizer, tensors, "policy_optimizer")
        self._scale.load_state(without_prefix("reward_scale", tensors))
        if self._critic is not None:
            self._critic.load_state_dict(without_prefix("critic", tensors))
            load_optimizer_tensors(self._critic_optimizer, tensors, "critic_optimizer")
            self._history.load_state(progress["history"], history_folder)
        self._kl_coef, self._diversity_coef = progress["kl_coef"], progress["diversity_coef"]


def make_config_policy(
    config: TrainConfig, latent_shape: tuple[int, ...], prompt_shape: tuple[int, int]
) -> NoisePolicy:
    """Make the untrained policy that `config` describes; its weights depend on the seed alone."""
    options: dict[str, Any] = {"std": config.std}
    if config.policy == "spectral":
        options["bands"] = config.bands
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(config.seed, "policy weights"))
        return make_policy(config.policy, latent_shape=latent_shape, prompt_shape=prompt_shape, **options)


def leave_one_out(rewards: torch.Tensor, group_size: int, spread: float) -> torch.Tensor:
    """Compute the advantages of plain Noise PPO, `(batch,)`: reward minus the mean of the others in its group.

    Args:
        rewards: Standardised rewards, `(batch,)`, groups adjacent.
        group_size: Images of one prompt, at least 2.
        spread: Spread of the rewards within a prompt; 0 makes the advantages 0.
    """
    groups = rewards.reshape(-1, group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return _in_spreads((groups - others).reshape(-1), spread)


def residual(rewards: torch.Tensor, predicted: torch.Tensor, spread: float) -> torch.Tensor:
    """Compute the advantages beside a critic, `(batch,)`: reward minus the prediction, centred over the batch.

    Args: as in `leave_one_out`.
    """
    difference = rewards - predicted
    return _in_spreads(difference - difference.mean(), spread)


def _in_spreads(advantages: torch.Tensor, spread: float) -> torch.Tensor:
    if not spread:
        return torch.zeros_like(advantages)
    return (advantages / spread).clamp(-_MAX_ADVANTAGE, _MAX_ADVANTAGE)


def _draw_back(
    policy: NoisePolicy,
    start: list[torch.Tensor],
    embeds: torch.Tensor,
    old_mean: torch.Tensor,
    old_log_std: torch.Tensor,
    target_kl: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move the weights back towards `start` until KL(old, new) is at most twice its target.

    KL is nearly quadratic in the distance, so one or two attempts suffice.

    Returns:
        mean and log_std of the resulting policy.
    """
    for _ in range(_MAX_ATTEMPTS):
        mean, log_std = policy(embeds)
        step_kl = gaussian_kl(old_mean, old_log_std, mean, log_std).mean().item()
        if not step_kl > 2 * target_kl:
            return mean, log_std
        for parameter, old in zip(policy.parameters(), start, strict=True):
            parameter.copy_(old.lerp(parameter, math.sqrt(target_kl / step_kl)))
    return policy(embeds)


def _diversity_kept(
    mean: torch.Tensor,
    log_std: torch.Tensor,
    critic: RewardCritic,
    embeds: torch.Tensor,
    rollout: Rollout,
    generator: torch.Generator,
) -> float:
    """Compute the distance of two pictures of a prompt, by their sketches, as a share of the prior's."""
    noise = [draw_noise(mean, generator) for _ in range(2)]
    pairs = ([mean + log_std.exp() * draw for draw in noise], noise)
    ours, prior = (
        _distance(*(critic.sketch(embeds, action, rollout.step_index) for action in pair)).mean() for pair in pairs
    )
    return (ours / prior).item()


def _distance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Compute the root mean square difference of two batches of sketches, `(batch,)`, for pixels in [0, 1]."""
    # Pictures are in [-1, 1] here; half the difference is that of pixels in [0, 1].
    return ((first - second) ** 2).flatten(1).mean(1).add(1e-12).sqrt() / 2
