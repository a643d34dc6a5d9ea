"""What every algorithm's trainer is: iterations with metrics, checkpoints, and a policy that is kept."""

import copy
import functools
import hashlib
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator

from noisepolicy.policies import NoisePolicy
from noisepolicy.policies.critic import CriticShape
from noisepolicy.policies.precision import plain_arithmetic
from noisepolicy.storage import DamagedFileError
from noisepolicy.training.checkpoint import (
    Checkpoint,
    checkpoint_paths,
    save_checkpoint,
    skip_checkpoint,
    whole_checkpoints,
    with_prefix,
    without_prefix,
)
from noisepolicy.training.config import TrainConfig
from noisepolicy.training.phases import PHASES, PhaseClock
from noisepolicy.training.processes import Processes
from noisepolicy.training.prompt_records import identity
from noisepolicy.training.prompt_store import PromptStore
from noisepolicy.training.rollout import Rollout, roll_out
from noisepolicy.training.run_folder import MAY_CHANGE_ON_RESUME, RunFolder
from noisepolicy.training.seeding import stream_seed
from noisepolicy.training.shares import split_batch
from noisepolicy.training.task import Task


class TrainingLoop:
    """Base of the trainers. A subclass makes `policy` and has `_iterate`, `_state`, `_load_state` and `kept_policy`.

    `policy` makes the images and takes the gradient steps; `average` is the mean of its recent weights, and
    `kept_policy`, the average within its KL budget, is what the run is for. Iterations leave noise in the weights, the
    average loses it, and KL with it.

    Args:
        config: settings; the run's own, in `self.config` and RUN/config.yaml, name the task's model and rewards.
        task: the frozen model, the reward and the prompts.
        run: where checkpoints and metrics go.
        accelerator: device and processes. Each process makes a share of the images and all of the updates, which are a
            thousandth of the cost; the first one writes.
    """

    policy: NoisePolicy
    average: NoisePolicy
    critic_shape: CriticShape | None = None
    """Of the pictures that a rollout keeps for a critic, if there is one."""

    def __init__(self, config: TrainConfig, task: Task, run: RunFolder, accelerator: Accelerator) -> None:
        self.config = task.named(config).with_absolute_paths().resolved(len(task.train_prompts))
        self.config.check()
        self.task, self.run, self.accelerator = task, run, accelerator
        self.processes = Processes(accelerator, self.config.timeout)
        self.prompts = PromptStore(task.frozen, task.train_prompts, accelerator.device)
        self.prompts.add([0])
        self.prompt_shape = tuple(self.prompts[torch.zeros(1, dtype=torch.int64)].prompt_embeds.shape[1:])
        self.frozen_sha256 = task.frozen.weights_sha256()
        """Hash of the model's weights at the start."""
        self.iteration = 0
        self.train_seconds = 0.0
        self._saved_iteration = 0
        self._clock = PhaseClock(accelerator.device)
        self._warn_of_idle_processes()

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
            self.prompts.add(self._draw_prompts(number))

    def train(self) -> Iterator[dict[str, Any]]:
        """Runs to the last iteration, yielding each one's metrics once they are written.

        Raises:
            RewardError: if the reward fails.
            RuntimeError: if the policy's numbers stop being finite, or the processes lose or contradict one another.
        """
        if self.processes.is_main:
            self.prompts.keep(self.run.prompts)
            self.config.save(self.run.config)
        while self.iteration < self.config.num_iterations:
            start = time.perf_counter()
            with plain_arithmetic():
                metrics = self._iterate()
            if not all(math.isfinite(value) for value in metrics.values()):
                raise RuntimeError(
                    f"training diverged at iteration {self.iteration + 1}: {metrics}; try a lower --learning-rate"
                )
            self.iteration += 1
            self.processes.check_same_weights(self.policy, f"'compare policies' of iteration {self.iteration}")
            is_last = self.iteration == self.config.num_iterations
            if self.processes.is_main:
                # Before the checkpoint: a kill between the two then loses neither.
                self.run.append_metrics(metrics)
                if is_last or self.iteration % self.config.checkpoint_every == 0:
                    self.train_seconds += time.perf_counter() - start
                    start = time.perf_counter()
                    self.save()
            self.train_seconds += time.perf_counter() - start
            yield metrics

    @plain_arithmetic()
    def save(self) -> None:
        """Writes a checkpoint and the policy, unless those of this iteration are written. On the main process."""
        if self._saved_iteration != self.iteration:
            self._save()
            self._saved_iteration = self.iteration

    @plain_arithmetic()
    def resume(self) -> None:
        """Goes back to the newest whole checkpoint, or to the start where there is none yet.

        Raises:
            ValueError: if there were checkpoints and none can be used, or they are another run's or were made with
                another model or other prompts. Nothing is changed.
        """
        checkpoint = self._restore_newest() if self.processes.is_main else None
        checkpoint = self.processes.broadcast("'read the checkpoint'", checkpoint)
        if checkpoint is not None and not self.processes.is_main:
            self._restore(checkpoint)
        self._restore_prompts(None if checkpoint is None else checkpoint.progress.get("prompts"))
        if self.processes.is_main:
            self.run.truncate_metrics(self.iteration)
            if self.iteration:  # a kill may have come before it was written
                self.kept_policy().save_pretrained(self.run.policy)

    def _restore_prompts(self, state: dict[str, int] | None) -> None:
        try:
            if state is not None:
                self.prompts.load_state(state, self.run.prompts, is_main=self.processes.is_main)
        except DamagedFileError as error:
            warnings.warn(f"{error}; the run's prompts are encoded again", stacklevel=3)
        # Where they were not: in the batches of the first time, for rounding depends on them, and rows on their order.
        self.encode_prompts(self.iteration)

    def _restore_newest(self) -> Checkpoint | None:
        for checkpoint in whole_checkpoints(self.run.checkpoints):
            self._check_same_run(checkpoint)
            try:
                self._restore(checkpoint)
                return checkpoint
            except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:  # a shape, a type
                skip_checkpoint(checkpoint.path, error)
        # A policy is written after each checkpoint.
        if checkpoint_paths(self.run.checkpoints) or self.run.policy.exists():
            raise ValueError(
                f"no checkpoint in {self.run.checkpoints} can be used; nothing was changed: put one back, or start "
                "anew with another --output-dir"
            )
        return None

    def _check_same_run(self, checkpoint: Checkpoint) -> None:
        """Raises ValueError if settings that may not change, the model or the prompts are not the checkpoint's."""
        settings, made_with = self._settings(), checkpoint.progress.get("settings", {})
        for name in sorted(settings.keys() & made_with.keys()):
            if settings[name] == made_with[name]:
                continue
            if name == "frozen_sha256":
                raise ValueError(
                    f"the model is not the one that the run was started with: the weights of {self.config.model} have "
                    f"SHA-256 {settings[name][:12]}..., and its checkpoints were made with {str(made_with[name])[:12]}"
                    "...; put the model back, or start anew with another --output-dir"
                )
            if name == "prompts_sha256":
                raise ValueError(
                    "the training prompts are not those that the run's checkpoints were made with; put their files "
                    "back, or start anew with another --output-dir"
                )
            raise ValueError(
                f"{self.run.config} says {name} is {settings[name]}, but its checkpoints were made with "
                f"{made_with[name]}; put it back, or start anew with another --output-dir"
            )

    def _settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with itself, as JSON values."""
        plain = self.config.plain()
        settings = {name: value for name, value in plain.items() if name not in {*MAY_CHANGE_ON_RESUME, "output_dir"}}
        return settings | {"frozen_sha256": self.frozen_sha256, "prompts_sha256": self._prompts_sha256}

    @functools.cached_property
    def _prompts_sha256(self) -> str:
        digest = hashlib.sha256()
        for prompt in self.task.train_prompts:
            digest.update(identity(prompt) + b"\n")
        return digest.hexdigest()

    def _restore(self, checkpoint: Checkpoint) -> None:
        tensors, progress = checkpoint.tensors, checkpoint.progress
        if progress["iteration"] != checkpoint.iteration:
            raise DamagedFileError(f"it says that its iteration is {progress['iteration']}")
        self.policy.load_state_dict(without_prefix("policy", tensors))
        self.average.load_state_dict(without_prefix("average", tensors))
        self._load_state(tensors, progress)
        train_seconds, seconds = progress["train_seconds"], {phase: progress["seconds"][phase] for phase in PHASES}
        self.iteration = self._saved_iteration = progress["iteration"]
        self.train_seconds, self._clock.seconds = train_seconds, seconds

    def kept_policy(self) -> NoisePolicy:
        """What the run is for, as it stands."""
        raise NotImplementedError

    def _iterate(self) -> dict[str, Any]:
        """One batch and what is learned from it; returns its metrics."""
        raise NotImplementedError

    def _draw_prompts(self, number: int) -> list[int]:
        """The prompts of an iteration, one a group."""
        raise NotImplementedError

    def _state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What a checkpoint holds beside the policies: tensors, and JSON values."""
        raise NotImplementedError

    def _load_state(self, tensors: Mapping[str, torch.Tensor], progress: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def _roll_out(self, number: int) -> Rollout:
        config = self.config
        prompt_index = self._draw_prompts(number)
        prompts = [self.task.train_prompts[i] for i in prompt_index for _ in range(config.group_size)]
        with self._clock.phase("frozen_model"):
            rows = self.prompts.add(prompt_index)
        return roll_out(
            self.policy,
            self.task.frozen,
            self.task.reward,
            prompts,
            self.prompts,
            prompt_row=rows.repeat_interleave(config.group_size),
            step_index=self._step_index(number),
            step_counts=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            seed=stream_seed(config.seed, "noise"),
            number=number,
            max_rows=config.rollout_batch_size,
            processes=self.processes,
            clock=self._clock,
            critic_shape=self.critic_shape,
            is_overlapped=config.overlap,
        )

    def _batch_metrics(self, rollout: Rollout) -> dict[str, Any]:
        """Metrics of a batch as it was made, in the reward's own units."""
        weights = self.task.reward.weights
        means = dict(zip(weights, rollout.parts.mean(0).tolist(), strict=True)) if len(weights) > 1 else {}
        return {
            "iteration": self.iteration + 1,
            "images": (self.iteration + 1) * self.config.batch_size,
            "reward": rollout.reward.mean().item(),
            "reward_std": rollout.reward.std().item(),
            **{f"reward/{name}": mean for name, mean in means.items()},
        }

    def _step_index(self, number: int) -> torch.Tensor:
        """Row -> index into the denoising step counts: as many groups of each, adjacent, and places take turns."""
        num_steps, num_groups = len(self.config.num_inference_steps), self.config.batch_size // self.config.group_size
        groups = (torch.arange(num_groups) * num_steps // num_groups + number) % num_steps
        return groups.repeat_interleave(self.config.group_size)

    def _warn_of_idle_processes(self) -> None:
        num_chunks = len(split_batch(self._step_index(0), self.config.rollout_batch_size))
        if self.processes.is_main and num_chunks < self.processes.count:
            batch_size, count = self.config.batch_size, self.processes.count
            remedy = (
                f"--rollout-batch-size {batch_size // count} gives each a share"
                if batch_size >= count
                else f"there are only {batch_size} images"
            )
            warnings.warn(
                f"a batch has {num_chunks} chunks for {count} processes, so some have nothing to do; {remedy}",
                stacklevel=3,
            )

    def _start_average(self) -> NoisePolicy:
        return copy.deepcopy(self.policy).eval().requires_grad_(False)

    @torch.no_grad()
    def _average_weights(self) -> None:
        # Shorter at the start, where the weights of ten iterations ago are of no use yet.
        decay = min(self.config.average_decay, (1 + self.iteration) / (10 + self.iteration))
        for mean, current in zip(self.average.parameters(), self.policy.parameters(), strict=True):
            mean.lerp_(current, 1 - decay)

    def _save(self) -> None:
        tensors, progress = self._state()
        tensors |= with_prefix("policy", self.policy.state_dict())
        tensors |= with_prefix("average", self.average.state_dict())
        progress |= {
            "iteration": self.iteration,
            "train_seconds": self.train_seconds,
            "seconds": self._clock.seconds,
            "settings": self._settings(),
            "prompts": self.prompts.state(),
        }
        save_checkpoint(self.run.checkpoints, self.iteration, tensors, progress)
        self.kept_policy().save_pretrained(self.run.policy)
