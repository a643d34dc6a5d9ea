"""One policy for every prompt: Noise PPO, or a policy that climbs a reward critic.

`NoisePpo.learn` is what one iteration learns from its images, top to bottom: the reward's scale, the critic if there
is one, the policy. `run.py` calls it, `rollout.py` makes the images. Nothing is back-propagated through the frozen
model or the reward. Every process of a run holds the whole batch. The cost of an update does not grow with the
batch, or the update is cut into parts that the processes share: see `_set_gradient`.
"""

import copy
import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise, starmap
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from noisepolicy.ops import gaussian_kl, gaussian_log_prob, ppo_clip_loss
from noisepolicy.policies import NoisePolicy
from noisepolicy.policies.base import make_policy
from noisepolicy.policies.critic import CriticShape, RewardCritic
from noisepolicy.policies.networks import averaged, multiplies_bfloat16, plain_arithmetic
from noisepolicy.rewards.base import RewardScale
from noisepolicy.storage import load_optimizer_tensors, optimizer_tensors
from noisepolicy.training.checkpoint import with_prefix, without_prefix
from noisepolicy.training.config import TrainConfig
from noisepolicy.training.muon import Muon
from noisepolicy.training.processes import Processes
from noisepolicy.training.rollout import Rollout, draw_noise, stream_generator, stream_seed
from noisepolicy.training.rows import History, PromptStore
from noisepolicy.training.task import Task

_NUM_FRESH = 32  # prompts in each gradient step along the critic, with two samples each
_CRITIC_AVERAGE_DECAY = 0.995
_MUON_SHARE = 16  # Muon's learning rate, in those of AdamW
_DECAY_SHARE = 0.3  # of the run, at its end, over which the critic's learning rate falls to 0
_DIVERSITY_COEF_RATE = 0.5
_MAX_MISSING_VARIETY = 0.2
_NUM_BUDGET_PROMPTS = 256
_NUM_TRIED = 256  # prompts or rows of a batch on which a mean is measured: enough for any batch
_PART_ROWS = 96  # of an update, at most
_MAX_ADVANTAGE = 5.0  # one outlier must not outweigh the rest of the batch
_MAX_LOG_PROB_DRIFT = 1e-2
_MAX_ATTEMPTS = 10


class NoisePpo:
    """The learner of the algorithms `critic` and `ppo`.

    Args:
        config: Resolved settings.
        task: The frozen model, the reward and the prompts.
        prompts: Embeddings of the prompts met so far.
        processes: The processes of the run, which share large updates.
        history_folder: RUN/history, or None for a process that is not the main one.
        device: Device of the policy and the critic.
    """

    @plain_arithmetic()
    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        prompts: PromptStore,
        processes: Processes,
        *,
        history_folder: Path | None,
        device: torch.device,
    ) -> None:
        self._config, self._prompts, self._num_prompts = config, prompts, len(task.train_prompts)
        self._processes = processes
        self.policy = make_config_policy(config, task.frozen.latent_shape, prompts.shape)
        self.policy.num_draws = task.frozen.num_draws
        self.policy.to(device)
        self.average = copy.deepcopy(self.policy).eval().requires_grad_(False)
        self._policy_optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=config.learning_rate, weight_decay=1e-3, fused=True
        )
        self._scale = RewardScale(task.reward.weights, config.group_size, config.normalize_rewards)
        self._critic: RewardCritic | None = None
        self.critic_shape: CriticShape | None = None
        self._diversity_coef = config.diversity_coef
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
            # A clip's convolutions go over three axes; with fewer channels they take no longer than a picture's.
            channels = 48 if len(self.policy.action_shape) == 4 else 64
            self._critic = RewardCritic(self.critic_shape, size=config.critic.size, channels=channels).to(device)
        # On CPUs the gradients of three-dimensional convolutions in bfloat16 hold memory that was never written.
        is_safe = device.type != "cpu" or len(self.policy.action_shape) < 4
        self._critic.sketch.in_bfloat16 = is_safe and multiplies_bfloat16(device)
        # The critic that is asked; the other one is taught. An average foresees more than any of its members.
        self._critic_average = copy.deepcopy(self._critic).eval().requires_grad_(False)
        convolutions = [layer.weight for layer in self._critic.sketch.convolutions]
        by_muon = set(map(id, convolutions))
        others = [parameter for parameter in self._critic.parameters() if id(parameter) not in by_muon]
        rate, decay = config.critic.learning_rate, config.critic.weight_decay
        self._critic_optimizers = {
            "critic_adamw": torch.optim.AdamW(others, lr=rate, weight_decay=decay, fused=True),
            "critic_muon": Muon(convolutions, lr=_MUON_SHARE * rate, weight_decay=decay),
        }
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
        if self._critic is None:
            metrics = self._take_ppo_steps(rollout)
        else:
            metrics = self._learn_reward(rollout, number)
            if (number + 1) * config.batch_size < config.critic.warmup:
                return metrics | {"kl_to_prior": 0.0, "step_kl": 0.0}
            metrics |= self._climb_critic(rollout, stream_generator(config.seed, "policy update", number))
        averaged(self.average, self.policy, config.average_decay, number)
        return metrics

    def _learn_reward(self, rollout: Rollout, number: int) -> dict[str, float]:
        """Measure how well the critic predicts the batch, add the batch to the history, and train the critic."""
        for critic in (self._critic, self._critic_average):
            critic.set_scale(self._scale.spread.center, self._scale.spread.total)
        reward = self._scale.standardise(rollout.parts)[:_NUM_TRIED]
        with torch.no_grad():
            embeds = self._prompts[rollout.prompt_row[:_NUM_TRIED]].prompt_embeds.float()
            tried = rollout.action[:_NUM_TRIED], rollout.step_index[:_NUM_TRIED]
            foreseen = self._critic_average(embeds, *tried).mean(0)
        self._history.append(
            prompt_row=rollout.prompt_row,
            step_index=rollout.step_index,
            parts=rollout.parts,
            action=rollout.action,
            picture=rollout.picture,
        )
        loss = self._teach_critic(number)
        variance = reward.var().item()
        unexplained = ((foreseen - reward) ** 2).mean().item() / variance if variance else 1.0
        return {"critic_loss": loss, "critic_unexplained": unexplained}

    def _teach_critic(self, number: int) -> float:
        """Train the critic on pictures and standardised rewards of the history.

        The learning rate falls to 0 over the last iterations of the run, also of one that is resumed and made longer.

        Returns:
            The rewards' mean squared error over the updates, in the reward's own units.
        """
        settings, total = self._config.critic, 0.0
        generator = stream_generator(self._config.seed, "critic", number)
        share_left = 1 - number / self._config.num_iterations
        for optimizer in self._critic_optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * min(share_left / _DECAY_SHARE, 1.0)
        for update in range(number * settings.updates, (number + 1) * settings.updates):
            rows = self._history.draw(settings.batch_size, generator)
            loss_of = partial(self._critic_part_loss, rows)
            error = self._set_gradient("'teach the critic'", self._critic, settings.batch_size, loss_of, 1)
            # Without it, one bad batch late in a run can undo the critic and the policy that follows it.
            torch.nn.utils.clip_grad_norm_(self._critic.parameters(), self._config.max_grad_norm)
            for optimizer in self._critic_optimizers.values():
                optimizer.step()
            averaged(self._critic_average, self._critic, _CRITIC_AVERAGE_DECAY, update)
            total = total + error
        return float(total) / settings.updates * self._scale.spread.total**2

    def _critic_part_loss(self, rows: dict[str, torch.Tensor], part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the critic's loss on some of the rows drawn from the history, and its error, `(1,)`."""
        loss, error = self._critic.loss(
            self._prompts[rows["prompt_row"][part]].prompt_embeds.float(),
            rows["action"][part],
            rows["step_index"][part],
            rows["picture"][part].float(),
            self._scale.standardise(rows["parts"][part]),
        )
        return loss, error[None]

    def _take_ppo_steps(self, rollout: Rollout) -> dict[str, float]:
        """Take clipped PPO steps on the batch: `loss = ppo_clip_loss(advantages) + kl_coef * KL(policy, prior)`.

        The advantages are the leave-one-out advantages of plain Noise PPO, in units of the rewards' spread between
        images of one prompt. Stops early when KL(old, new) passes its target, and is drawn back to it from more than
        twice as much, which a single step can come to.
        """
        config, policy = self._config, self.policy
        batch = len(rollout.reward)
        parts = self._mine(self._parts(batch))
        embeds = {part.start: self._prompts[rollout.prompt_row[part]].prompt_embeds.float() for part in parts}
        with torch.no_grad():
            old = {part.start: policy(embeds[part.start]) for part in parts}
            # Taken anew by the op that the loss uses, so the first ratio is 1 to the bit; float32 log-probs of hundreds
            # of dimensions are exact to 1e-4 only.
            old_log_prob = {part.start: gaussian_log_prob(rollout.action[part], *old[part.start]) for part in parts}
        for part in parts:
            drift = (old_log_prob[part.start] - rollout.log_prob[part]).abs().max().item()
            if drift > _MAX_LOG_PROB_DRIFT:
                raise RuntimeError(
                    f"log-probs of the rollout and of its update differ by {drift:.3g}; the ratio would be wrong"
                )
        advantages = leave_one_out(self._scale.standardise(rollout.parts), config.group_size, self._scale.within_share)

        def loss_of(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
            mean, log_std = policy(embeds[part.start])
            loss, stats = ppo_clip_loss(
                rollout.action[part],
                mean,
                log_std,
                old_log_prob[part.start],
                advantages[part],
                clip_range=config.clip_range,
                kl_coef=config.kl_coef,
            )
            with torch.no_grad():
                step_kl = gaussian_kl(*old[part.start], mean, log_std).mean()
            return loss, torch.stack([step_kl, stats.clip_fraction])

        step = self._begin_step(rollout)
        for _ in range(config.num_updates):
            step_kl, clip_fraction = self._set_gradient("'climb the reward'", policy, batch, loss_of, 2).tolist()
            if step_kl > config.target_kl:
                break
            torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
            self._policy_optimizer.step()
        return {**self._end_step(step), "clip_fraction": clip_fraction}

    def _climb_critic(self, rollout: Rollout, generator: torch.Generator) -> dict[str, float]:
        """Take steps along the critic's gradient on fresh samples of the policy; no image is made for them.

            loss = -mean(critic.lower_bound) - diversity_coef * difference of two sketches + kl_coef * KL(policy, prior)

        Stops when KL(old, new) on the batch's prompts passes its target.

        Args:
            generator: Generator of prompts and noise.
        """
        config, policy, step = self._config, self.policy, self._begin_step(rollout)
        for _ in range(config.num_updates):
            loss_of = partial(self._climb_loss, self._draw_fresh(generator))
            self._set_gradient("'climb the critic'", policy, _NUM_FRESH, loss_of, 0)
            torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
            self._policy_optimizer.step()
            with torch.no_grad():
                if gaussian_kl(*step.old, *policy(step.embeds)).mean().item() > config.target_kl:
                    break
        kls = self._end_step(step)
        kept = self._diversity_kept(step, generator)
        metrics = {**kls, "diversity_kept": kept, "diversity_coef": self._diversity_coef}
        # Raised while the policy keeps less variety than its target, lowered above it.
        missing = min(max(config.diversity_target - kept, -_MAX_MISSING_VARIETY), _MAX_MISSING_VARIETY)
        self._diversity_coef *= 1 + _DIVERSITY_COEF_RATE * missing
        return metrics

    @torch.no_grad()
    def _begin_step(self, rollout: Rollout) -> "_Step":
        """Remember the policy as it is, on the first prompts of a batch."""
        groups = slice(None, _NUM_TRIED * self._config.group_size, self._config.group_size)
        embeds = self._prompts[rollout.prompt_row[groups]].prompt_embeds.float()
        weights = [parameter.detach().clone() for parameter in self.policy.parameters()]
        return _Step(weights, embeds, rollout.step_index[groups], self.policy(embeds))

    @torch.no_grad()
    def _end_step(self, step: "_Step") -> dict[str, float]:
        """Draw the policy back to its trust region and into its KL budget, and return both KLs."""
        config = self._config
        _draw_back(self.policy, step, config.target_kl)
        self.policy.contract_to(config.kl_training_budget, step.embeds)
        mean, log_std = self.policy(step.embeds)
        return {
            "kl_to_prior": gaussian_kl(mean, log_std).mean().item(),
            "step_kl": gaussian_kl(*step.old, mean, log_std).mean().item(),
        }

    def _set_gradient(
        self,
        phase: str,
        network: nn.Module,
        num_rows: int,
        loss_of: Callable[[slice], tuple[torch.Tensor, torch.Tensor]],
        num_statistics: int,
    ) -> torch.Tensor:
        """Set a network's gradient to that of the mean loss over some rows.

        The rows are cut into parts, whose number depends on the settings alone. Each part is computed whole by one
        process, and the gradients are summed in the order of the parts: no bit depends on the number of processes.

        Args:
            phase: Name of this meeting of the processes, for errors.
            loss_of: Computes the mean loss over a part, and statistics of it `(num_statistics,)`, which are means too.

        Returns:
            The statistics' means over all rows.
        """
        parts, parameters = self._parts(num_rows), list(network.parameters())
        shares = [(part.stop - part.start) / num_rows for part in parts]
        sizes = [*(parameter.numel() for parameter in parameters), num_statistics]
        total, mine = 0.0, [parameters[0].new_empty(0, sum(sizes))]
        network.zero_grad()
        for part, share in zip(self._mine(parts), self._mine(shares), strict=True):
            loss, statistics = loss_of(part)
            (share * loss).backward()
            total = total + share * statistics
            if self._is_shared(parts):
                values = [parameter.grad.flatten() for parameter in parameters]
                mine.append(torch.cat([*values, share * statistics])[None])
                network.zero_grad()
        if not self._is_shared(parts):
            return total
        *gradients, statistics = self._processes.sum_parts(phase, torch.cat(mine), len(parts)).split(sizes)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.view_as(parameter)
        return statistics

    def _parts(self, num_rows: int) -> list[slice]:
        """Cut rows into parts of nearly the same size, as many as the settings ask for, or more if they are large."""
        count = max(min(self._config.gradient_accumulation_steps, num_rows // 2), -(-num_rows // _PART_ROWS))
        return list(starmap(slice, pairwise(num_rows * number // count for number in range(count + 1))))

    def _is_shared(self, parts: list[Any]) -> bool:
        """Tell whether each process computes some of the parts of an update; of a single one, all compute the same."""
        return min(len(parts), self._processes.count) > 1

    def _mine(self, parts: list[Any]) -> list[Any]:
        """Return the parts that this process computes."""
        return parts[self._processes.index :: self._processes.count] if self._is_shared(parts) else parts

    def _draw_fresh(self, generator: torch.Generator) -> "_Fresh":
        """Draw prompts, step counts and noise for one step along the critic's gradient, the same in all processes."""
        rows = torch.randint(len(self._prompts), (_NUM_FRESH,), generator=generator)
        step_index = torch.randint(len(self._config.num_inference_steps), (_NUM_FRESH,), generator=generator)
        noise = torch.randn(2, _NUM_FRESH, *self.policy.action_shape, generator=generator)
        return _Fresh(rows, step_index, noise)

    def _climb_loss(self, fresh: "_Fresh", part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the critic's term of the policy's loss, including KL and variety, on some fresh samples."""
        config, policy = self._config, self.policy
        embeds = self._prompts[fresh.rows[part]].prompt_embeds.float()
        mean, log_std = policy(embeds)
        action = torch.cat([mean + log_std.exp() * noise.to(mean.device) for noise in fresh.noise[:, part]])
        value, sketch = self._critic_average.lower_bound(embeds, action, fresh.step_index[part].to(mean.device))
        distance = _distance(*sketch.chunk(2))
        gain = value.mean() / self._scale.within_share if self._scale.within_share else 0.0
        loss = config.kl_coef * gaussian_kl(mean, log_std).mean() - gain - self._diversity_coef * distance.mean()
        return loss, loss.new_empty(0)

    @plain_arithmetic()
    def kept_policy(self) -> NoisePolicy:
        """The result of the run: the averaged policy within its KL budget on the first prompts met, with the critic."""
        kept = copy.deepcopy(self.average)
        rows = torch.arange(min(_NUM_BUDGET_PROMPTS, len(self._prompts)))
        kept.shrink_to(self._config.kl_budget, self._prompts[rows].prompt_embeds)
        if self._critic is not None and self._config.num_candidates > 1:
            kept.attach_critic(copy.deepcopy(self._critic_average), self._config.num_candidates)
        return kept

    @torch.no_grad()
    def _diversity_kept(self, step: "_Step", generator: torch.Generator) -> float:
        """Compute the distance of two pictures of a prompt, by their sketches, as a share of the prior's."""
        mean, log_std = self.policy(step.embeds)
        noise = [draw_noise(mean, generator) for _ in range(2)]
        actions = torch.cat([*(mean + log_std.exp() * draw for draw in noise), *noise])
        sketches = self._critic_average.sketch(step.embeds, actions, step.step_index).chunk(4)
        return (_distance(*sketches[:2]).mean() / _distance(*sketches[2:]).mean()).item()

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return tensors and JSON values for a checkpoint, beside the weights of `policy` and `average`."""
        tensors = optimizer_tensors(self._policy_optimizer, "policy_optimizer")
        tensors |= with_prefix("reward_scale", self._scale.state())
        progress: dict[str, Any] = {}
        if self._critic is not None:
            progress["diversity_coef"] = self._diversity_coef
            tensors |= with_prefix("critic", self._critic.state_dict())
            tensors |= with_prefix("critic_average", self._critic_average.state_dict())
            for name, optimizer in self._critic_optimizers.items():
                tensors |= optimizer_tensors(optimizer, name)
            progress["history"] = self._history.state()
        return tensors, progress

    def load_state(
        self, tensors: Mapping[str, torch.Tensor], progress: Mapping[str, Any], history_folder: Path
    ) -> None:
        """Restore what `state` returned; the history's rows are read from RUN/history."""
        load_optimizer_tensors(self._policy_optimizer, tensors, "policy_optimizer")
        self._scale.load_state(without_prefix("reward_scale", tensors))
        if self._critic is not None:
            self._diversity_coef = progress["diversity_coef"]
            self._critic.load_state_dict(without_prefix("critic", tensors))
            self._critic_average.load_state_dict(without_prefix("critic_average", tensors))
            for name, optimizer in self._critic_optimizers.items():
                load_optimizer_tensors(optimizer, tensors, name)
            self._history.load_state(progress["history"], history_folder)


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
    if not spread:
        return torch.zeros_like(rewards)
    return ((groups - others).reshape(-1) / spread).clamp(-_MAX_ADVANTAGE, _MAX_ADVANTAGE)


class _Fresh(NamedTuple):
    """Draws for one step along the critic's gradient; two samples of each prompt show how far apart pictures are."""

    rows: torch.Tensor
    step_index: torch.Tensor
    noise: torch.Tensor
    """`(2, prompts, *action_shape)`, on the CPU."""


class _Step(NamedTuple):
    """The start of an update of the policy: its weights, and its distributions on some prompts."""

    weights: list[torch.Tensor]
    embeds: torch.Tensor
    step_index: torch.Tensor
    old: tuple[torch.Tensor, torch.Tensor]
    """Mean and log-std."""


def _draw_back(policy: NoisePolicy, step: _Step, target_kl: float) -> None:
    """Move the weights back towards the start of a step until KL(old, new) is at most twice its target.

    KL is nearly quadratic in the distance, so one or two attempts suffice.
    """
    for _ in range(_MAX_ATTEMPTS):
        step_kl = gaussian_kl(*step.old, *policy(step.embeds)).mean().item()
        if not step_kl > 2 * target_kl:
            return
        for parameter, old in zip(policy.parameters(), step.weights, strict=True):
            parameter.copy_(old.lerp(parameter, math.sqrt(target_kl / step_kl)))


def _distance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Compute the root mean square difference of two batches of sketches, `(batch,)`, for pixels in [0, 1]."""
    # Pictures are in [-1, 1] here; half the difference is that of pixels in [0, 1].
    return ((first - second) ** 2).flatten(1).mean(1).add(1e-12).sqrt() / 2
