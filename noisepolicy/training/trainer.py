"""Noise PPO: a policy for every prompt, with or without a reward critic.

Each iteration draws prompts, samples starting noise from the policy, lets the frozen model make the images, scores
them, adds them to the history, trains the critic on it and takes a few steps on the policy. Nothing is
back-propagated through the frozen model or the reward. Evaluation and reports are not here (see `evaluation`).
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator

from noisepolicy.policies import NoisePolicy
from noisepolicy.policies.base import make_policy
from noisepolicy.policies.critic import CriticShape, RewardCritic
from noisepolicy.policies.precision import plain_arithmetic
from noisepolicy.storage import load_optimizer_tensors, optimizer_tensors
from noisepolicy.training.checkpoint import with_prefix, without_prefix
from noisepolicy.training.config import TrainConfig
from noisepolicy.training.history import History
from noisepolicy.training.loop import TrainingLoop
from noisepolicy.training.reward_scale import RewardScale
from noisepolicy.training.rollout import Rollout
from noisepolicy.training.run_folder import RunFolder
from noisepolicy.training.seeding import stream_generator, stream_seed
from noisepolicy.training.task import Task
from noisepolicy.training.updates import update_critic, update_policy

_KL_COEF_RATE = 0.1
_DIVERSITY_COEF_RATE = 0.5
_NUM_BUDGET_PROMPTS = 256


class Trainer(TrainingLoop):
    """`TrainingLoop` of the algorithms `critic` and `ppo`."""

    @plain_arithmetic()
    def __init__(self, config: TrainConfig, task: Task, run: RunFolder, accelerator: Accelerator) -> None:
        super().__init__(config, task, run, accelerator)
        config, device = self.config, accelerator.device
        self.policy = make_config_policy(config, task.frozen.latent_shape, self.prompt_shape)
        self.policy.to(device)
        self.average = self._start_average()
        self._policy_optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=config.learning_rate, weight_decay=1e-3, fused=True
        )
        self._scale = RewardScale(task.reward.weights, config.group_size, config.normalize_rewards)
        self._critic: RewardCritic | None = None
        if config.algorithm == "critic":
            self.critic_shape = CriticShape(
                prompt_shape=self.policy.prompt_shape,
                action_shape=self.policy.action_shape,
                is_spectral=config.policy == "spectral",
                step_counts=config.num_inference_steps,
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(stream_seed(config.seed, "critic weights"))
                self._critic = RewardCritic(self.critic_shape, size=config.critic_size).to(device)
            self._critic_optimizer = torch.optim.AdamW(
                self._critic.parameters(),
                lr=config.critic_learning_rate,
                weight_decay=config.critic_weight_decay,
                fused=True,
            )
            self._history = History(
                run.history if accelerator.is_main_process else None,
                self.policy.action_shape,
                self.critic_shape.sketch_shape,
                len(task.reward.weights),
                device,
            )
        self._kl_coef, self._diversity_coef = config.kl_coef, config.diversity_coef

    def _iterate(self) -> dict[str, Any]:
        config, number = self.config, self.iteration
        rollout = self._roll_out(number)
        with self._clock.phase("policy"):
            self._scale.update(rollout.parts)
            self._scale.warn_if_nothing_to_learn()
            metrics: dict[str, Any] = {
                **self._batch_metrics(rollout),
                "kl_coef": self._kl_coef,
                "diversity_coef": self._diversity_coef,
            }
            if self._critic is not None:
                metrics |= self._learn_reward(rollout, number)
            if self._critic is None or (number + 1) * config.batch_size >= config.critic_warmup:
                metrics |= update_policy(
                    self.policy,
                    self._policy_optimizer,
                    self._critic,
                    rollout,
                    self.prompts,
                    self._scale,
                    config,
                    kl_coef=self._kl_coef,
                    diversity_coef=self._diversity_coef,
                    generator=stream_generator(config.seed, "policy update", number),
                )
                self._adapt_kl_coef(metrics["kl_to_prior"])
                if self._critic is not None:
                    self._adapt_diversity_coef(metrics["diversity_kept"])
                self._average_weights()
            else:
                metrics |= {"kl_to_prior": 0.0, "step_kl": 0.0}
        return metrics

    def _draw_prompts(self, number: int) -> list[int]:
        """The prompts of an iteration, one a group."""
        generator = stream_generator(self.config.seed, "prompts", number)
        num_groups = self.config.batch_size // self.config.group_size
        return torch.randint(len(self.task.train_prompts), (num_groups,), generator=generator).tolist()

    def _learn_reward(self, rollout: Rollout, number: int) -> dict[str, float]:
        """Adds the batch to the history and trains the critic; measures first how well it foresaw the batch."""
        self._critic.set_scale(self._scale.spread.center, self._scale.spread.total)
        reward = self._scale.standardise(rollout.parts)
        with torch.no_grad():
            embeds = self.prompts[rollout.prompt_row].prompt_embeds.float()
            foreseen = self._critic(embeds, rollout.action, rollout.step_index).mean(0)
        self._history.append(
            prompt_row=rollout.prompt_row,
            step_index=rollout.step_index,
            parts=rollout.parts,
            action=rollout.action,
            picture=rollout.picture,
        )
        self._critic.requires_grad_(True)
        loss = update_critic(
            self._critic,
            self._critic_optimizer,
            self._history,
            self.prompts,
            self._scale,
            num_updates=self.config.critic_updates,
            batch_size=self.config.critic_batch_size,
            max_grad_norm=self.config.max_grad_norm,
            generator=stream_generator(self.config.seed, "critic", number),
        )
        self._critic.requires_grad_(False)
        variance = reward.var().item()
        unexplained = ((foreseen - reward) ** 2).mean().item() / variance if variance else 1.0
        return {"critic_loss": loss, "critic_unexplained": unexplained}

    @plain_arithmetic()
    def kept_policy(self) -> NoisePolicy:
        """A copy of the averaged policy, scaled to the KL budget on the first prompts met, and the critic to choose."""
        kept = copy.deepcopy(self.average)
        rows = torch.arange(min(_NUM_BUDGET_PROMPTS, len(self.prompts)))
        kept.shrink_to(self.config.kl_budget, self.prompts[rows].prompt_embeds)
        if self._critic is not None and self.config.num_candidates > 1:
            kept.attach_critic(copy.deepcopy(self._critic), self.config.num_candidates)
        return kept

    def _adapt_kl_coef(self, kl_to_prior: float) -> None:
        """Raises the penalty while the policy is over its budget and lets it fall back to its start below."""
        excess = min(max(kl_to_prior / self.config.kl_training_budget - 1, -1.0), 1.0)
        self._kl_coef = max(self._kl_coef * (1 + _KL_COEF_RATE * excess), self.config.kl_coef)

    def _adapt_diversity_coef(self, diversity_kept: float) -> None:
        """Variety is worth more while the policy keeps less of it than asked, and less while it keeps more."""
        missing = min(max(self.config.diversity_target - diversity_kept, -0.2), 0.2)
        self._diversity_coef *= 1 + _DIVERSITY_COEF_RATE * missing

    def _state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        tensors = optimizer_tensors(self._policy_optimizer, "policy_optimizer")
        tensors |= with_prefix("reward_scale", self._scale.state())
        progress: dict[str, Any] = {"kl_coef": self._kl_coef, "diversity_coef": self._diversity_coef}
        if self._critic is not None:
            tensors |= with_prefix("critic", self._critic.state_dict())
            tensors |= optimizer_tensors(self._critic_optimizer, "critic_optimizer")
            progress["history"] = self._history.state()
        return tensors, progress

    def _load_state(self, tensors: Mapping[str, torch.Tensor], progress: Mapping[str, Any]) -> None:
        load_optimizer_tensors(self._policy_optimizer, tensors, "policy_optimizer")
        self._scale.load_state(without_prefix("reward_scale", tensors))
        if self._critic is not None:
            self._critic.load_state_dict(without_prefix("critic", tensors))
            load_optimizer_tensors(self._critic_optimizer, tensors, "critic_optimizer")
            self._history.load_state(progress["history"], self.run.history)
        self._kl_coef, self._diversity_coef = progress["kl_coef"], progress["diversity_coef"]


def make_config_policy(
    config: TrainConfig, latent_shape: tuple[int, ...], prompt_shape: tuple[int, int]
) -> NoisePolicy:
    """The untrained policy `config` describes; its weights depend on the seed alone."""
    options: dict[str, Any] = {"std": config.std}
    if config.policy == "spectral":
        options["bands"] = config.bands
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(config.seed, "policy weights"))
        return make_policy(config.policy, latent_shape=latent_shape, prompt_shape=prompt_shape, **options)
