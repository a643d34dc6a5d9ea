"""Noise PPO: the loop from prompts to a trained policy.

Each iteration draws prompts, samples starting noise from the policy, lets the frozen model make the images, scores
them, adds them to the history, trains the critic on it and takes a few steps on the policy. Nothing is
back-propagated through the frozen model or the reward. Evaluation and reports are not here (see `evaluation`).
"""

import copy
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator

from noisepolicy.policies import NoisePolicy
from noisepolicy.policies.base import make_policy
from noisepolicy.policies.critic import CriticShape, RewardCritic
from noisepolicy.storage import load_optimizer_tensors, optimizer_tensors
from noisepolicy.training.checkpoint import (
    load_newest_checkpoint,
    save_checkpoint,
    with_prefix,
    without_prefix,
)
from noisepolicy.training.config import TrainConfig
from noisepolicy.training.history import History
from noisepolicy.training.phases import PHASES, PhaseClock
from noisepolicy.training.prompt_store import PromptStore
from noisepolicy.training.rollout import Rollout, roll_out
from noisepolicy.training.run_folder import RunFolder
from noisepolicy.training.seeding import stream_generator, stream_seed
from noisepolicy.training.task import Task
from noisepolicy.training.updates import update_critic, update_policy

_KL_COEF_RATE = 0.1
_DIVERSITY_COEF_RATE = 0.5
_NUM_BUDGET_PROMPTS = 256


class Trainer:
    """Holds everything that changes in a run.

    `policy` makes the images and takes the gradient steps; `average` is the mean of its recent weights, and
    `kept_policy`, the average within its KL budget, is what the run is for. Iterations leave noise in the weights, the
    average loses it, and KL with it.

    Args:
        config: checked settings.
        task: the frozen model, the reward and the prompts.
        run: where checkpoints and metrics go.
        accelerator: device and processes.
    """

    def __init__(self, config: TrainConfig, task: Task, run: RunFolder, accelerator: Accelerator) -> None:
        self.config, self.task, self.run, self.accelerator = config, task, run, accelerator
        device = accelerator.device
        self._prompts = PromptStore(task.frozen, task.train_prompts, device)
        self._prompts.add([0])
        prompt_shape = tuple(self._prompts[torch.zeros(1, dtype=torch.int64)].prompt_embeds.shape[1:])
        self.policy = make_config_policy(config, task.frozen.latent_shape, prompt_shape)
        self.policy.to(device)
        self.average = copy.deepcopy(self.policy).eval().requires_grad_(False)
        self._policy_optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=config.learning_rate, weight_decay=1e-3, fused=True
        )
        self._critic: RewardCritic | None = None
        self._critic_shape: CriticShape | None = None
        if config.algorithm == "critic":
            self._critic_shape = CriticShape(
                prompt_shape=self.policy.prompt_shape,
                action_shape=self.policy.action_shape,
                is_spectral=config.policy == "spectral",
                step_counts=config.num_inference_steps,
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(stream_seed(config.seed, "critic weights"))
                self._critic = RewardCritic(self._critic_shape, size=config.critic_size).to(device)
            self._critic_optimizer = torch.optim.AdamW(
                self._critic.parameters(),
                lr=config.critic_learning_rate,
                weight_decay=config.critic_weight_decay,
                fused=True,
            )
            capacity = config.num_iterations * config.batch_size
            self._history = History(capacity, self.policy.action_shape, self._critic_shape.sketch_shape, device)
        self.iteration = 0
        self.train_seconds = 0.0
        self._kl_coef, self._diversity_coef = config.kl_coef, config.diversity_coef
        self._clock = PhaseClock(device)

    @property
    def images_trained(self) -> int:
        return self.iteration * self.config.batch_size

    @property
    def seconds(self) -> dict[str, float]:
        """Training time by phase; they sum to `train_seconds`."""
        phases = dict(self._clock.seconds)
        return {**phases, "other": max(self.train_seconds - sum(phases.values()), 0.0)}

    def encode_prompts(self, num_iterations: int | None = None) -> None:
        """Encodes the prompts of the first iterations, or of all, before they are asked for."""
        for number in range(self.config.num_iterations if num_iterations is None else num_iterations):
            self._prompts.add(self._draw_prompts(number))

    def train(self) -> Iterator[dict[str, Any]]:
        """Runs to the last iteration, yielding each one's metrics once they are written.

        Raises:
            RewardError: if the reward fails.
            RuntimeError: if the policy's numbers stop being finite.
        """
        while self.iteration < self.config.num_iterations:
            start = time.perf_counter()
            metrics = self._iterate()
            self.iteration += 1
            is_last = self.iteration == self.config.num_iterations
            if self.accelerator.is_main_process:
                # Before the checkpoint: a kill between the two then loses neither.
                self.run.append_metrics(metrics)
                if is_last or self.iteration % self.config.checkpoint_every == 0:
                    self.train_seconds += time.perf_counter() - start
                    start = time.perf_counter()
                    self._save()
            self.train_seconds += time.perf_counter() - start
            yield metrics

    def _iterate(self) -> dict[str, Any]:
        config, number = self.config, self.iteration
        rollout = self._roll_out(number)
        with self._clock.phase("policy"):
            metrics: dict[str, Any] = {
                "iteration": number + 1,
                "images": (number + 1) * config.batch_size,
                "reward": rollout.reward.mean().item(),
                "reward_std": rollout.reward.std().item(),
                "kl_coef": self._kl_coef,
                "diversity_coef": self._diversity_coef,
            }
            if self._critic is not None:
                metrics |= self._learn_reward(rollout, number)
            if self._critic is None or (number + 1) * config.batch_size >= config.critic_warmup:
                metrics |= update_policy(
                    self.policy, self._policy_optimizer, self._critic, rollout, self._prompts, config,
                    kl_coef=self._kl_coef, diversity_coef=self._diversity_coef,
                    generator=stream_generator(config.seed, "policy update", number),
                )  # fmt: skip
                self._adapt_kl_coef(metrics["kl_to_prior"])
                if self._critic is not None:
                    self._adapt_diversity_coef(metrics["diversity_kept"])
                self._average_weights()
            else:
                metrics |= {"kl_to_prior": 0.0, "step_kl": 0.0}
        if not all(value == value for value in metrics.values()):
            raise RuntimeError(f"training diverged at iteration {number + 1}: {metrics}; try a lower --learning-rate")
        return metrics

    def _roll_out(self, number: int) -> Rollout:
        config = self.config
        prompt_index = self._draw_prompts(number)
        steps = (torch.arange(len(prompt_index)) + number) % len(config.num_inference_steps)
        prompts = [self.task.train_prompts[i] for i in prompt_index for _ in range(config.group_size)]
        with self._clock.phase("frozen_model"):
            rows = self._prompts.add(prompt_index)
        return roll_out(
            self.policy, self.task.frozen, self.task.reward, prompts, self._prompts,
            prompt_row=rows.repeat_interleave(config.group_size),
            step_index=steps.repeat_interleave(config.group_size),
            step_counts=config.num_inference_steps, guidance_scale=config.guidance_scale,
            seed=stream_seed(config.seed, "noise"), first_row=number * config.batch_size,
            accelerator=self.accelerator, clock=self._clock, critic_shape=self._critic_shape,
        )  # fmt: skip

    def _draw_prompts(self, number: int) -> list[int]:
        """The prompts of an iteration, one a group."""
        generator = stream_generator(self.config.seed, "prompts", number)
        num_groups = self.config.batch_size // self.config.group_size
        return torch.randint(len(self.task.train_prompts), (num_groups,), generator=generator).tolist()

    def _learn_reward(self, rollout: Rollout, number: int) -> dict[str, float]:
        """Adds the batch to the history and trains the critic; measures first how well it foresaw the batch."""
        with torch.no_grad():
            embeds = self._prompts[rollout.prompt_row].prompt_embeds.float()
            foreseen = self._critic(embeds, rollout.action, rollout.step_index).mean(0)
        self._history.append(
            prompt_row=rollout.prompt_row, step_index=rollout.step_index, reward=rollout.reward,
            action=rollout.action, picture=rollout.picture,
        )  # fmt: skip
        self._critic.requires_grad_(True)
        loss = update_critic(
            self._critic, self._critic_optimizer, self._history, self._prompts,
            num_updates=self.config.critic_updates, batch_size=self.config.critic_batch_size,
            max_grad_norm=self.config.max_grad_norm,
            generator=stream_generator(self.config.seed, "critic", number),
        )  # fmt: skip
        self._critic.requires_grad_(False)
        error = ((foreseen - rollout.reward) ** 2).mean() / rollout.reward.var().clamp(min=1e-12)
        return {"critic_loss": loss, "critic_unexplained": error.item()}

    def kept_policy(self) -> NoisePolicy:
        """A copy of the averaged policy, scaled to the KL budget on the first prompts met, and the critic to choose."""
        kept = copy.deepcopy(self.average)
        rows = torch.arange(min(_NUM_BUDGET_PROMPTS, len(self._prompts)))
        kept.shrink_to(self.config.kl_budget, self._prompts[rows].prompt_embeds)
        if self._critic is not None and self.config.num_candidates > 1:
            kept.attach_critic(copy.deepcopy(self._critic), self.config.num_candidates)
        return kept

    @torch.no_grad()
    def _average_weights(self) -> None:
        pairs = zip(self.average.parameters(), self.policy.parameters(), strict=True)
        for mean, current in pairs:
            mean.lerp_(current, 1 - self.config.average_decay)

    def _adapt_kl_coef(self, kl_to_prior: float) -> None:
        """Raises the penalty while the policy is over its budget and lets it fall back to its start below."""
        excess = min(max(kl_to_prior / self.config.kl_training_budget - 1, -1.0), 1.0)
        self._kl_coef = max(self._kl_coef * (1 + _KL_COEF_RATE * excess), self.config.kl_coef)

    def _adapt_diversity_coef(self, diversity_kept: float) -> None:
        """Variety is worth more while the policy keeps less of it than asked, and less while it keeps more."""
        missing = min(max(self.config.diversity_target - diversity_kept, -0.2), 0.2)
        self._diversity_coef *= 1 + _DIVERSITY_COEF_RATE * missing

    def _save(self) -> None:
        tensors = with_prefix("policy", self.policy.state_dict())
        tensors |= with_prefix("average", self.average.state_dict())
        tensors |= optimizer_tensors(self._policy_optimizer, "policy_optimizer")
        if self._critic is not None:
            tensors |= with_prefix("critic", self._critic.state_dict())
            tensors |= optimizer_tensors(self._critic_optimizer, "critic_optimizer")
            tensors |= with_prefix("history", self._history.state())
        progress = {
            "iteration": self.iteration,
            "kl_coef": self._kl_coef,
            "diversity_coef": self._diversity_coef,
            "train_seconds": self.train_seconds,
            "seconds": self._clock.seconds,
        }
        save_checkpoint(self.run.checkpoints, self.iteration, tensors, progress)
        self.kept_policy().save_pretrained(self.run.policy)

    def resume(self) -> None:
        """Goes back to the newest readable checkpoint, or to the start where there is none yet."""
        checkpoint = load_newest_checkpoint(self.run.checkpoints)
        if checkpoint is not None:
            tensors, progress = checkpoint
            self.policy.load_state_dict(without_prefix("policy", tensors))
            self.average.load_state_dict(without_prefix("average", tensors))
            load_optimizer_tensors(self._policy_optimizer, tensors, "policy_optimizer")
            if self._critic is not None:
                self._critic.load_state_dict(without_prefix("critic", tensors))
                load_optimizer_tensors(self._critic_optimizer, tensors, "critic_optimizer")
                self._history.load_state(without_prefix("history", tensors))
            self.iteration = progress["iteration"]
            # In the batches of the first time: rounding depends on them, and rows on their order.
            self.encode_prompts(self.iteration)
            self._kl_coef, self._diversity_coef = progress["kl_coef"], progress["diversity_coef"]
            self.train_seconds = progress["train_seconds"]
            self._clock.seconds = {phase: progress["seconds"][phase] for phase in PHASES}
        if self.accelerator.is_main_process:
            self.run.truncate_metrics(self.iteration)


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
