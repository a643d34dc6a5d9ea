"""FIND (Chen et al., ACM MM 2024, arXiv 2407.19453): a free mean and std for each prompt, many prompts at once.

Denoising is a Markov decision process of one step: the state is the prompt, the action is the initial noise, and the
reward is the picture's. Each iteration draws a group of pictures for every prompt. A network, the calibrator, predicts
what the current distribution is worth, and the advantage of a picture is its reward less this prediction. Then come a
few clipped steps on new and historical samples together. Every ratio is against the distribution that its sample was
drawn from.

Started from a policy with a critic (`--init-policy`), the critic takes the calibrator's place: it foresees the reward
of each noise, and its own gradient is followed beside the clipped term.
"""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from noisepolicy.ops import gaussian_kl, gaussian_log_prob, ppo_clip_loss
from noisepolicy.policies import NoisePolicy, TablePolicy
from noisepolicy.policies.critic import RewardCritic
from noisepolicy.policies.networks import PromptReader, averaged, plain_arithmetic
from noisepolicy.rewards.base import RewardScale
from noisepolicy.storage import load_optimizer_tensors, optimizer_tensors
from noisepolicy.training.checkpoint import with_prefix, without_prefix
from noisepolicy.training.config import TrainConfig
from noisepolicy.training.rollout import Rollout, draw_noise, stream_generator, stream_seed
from noisepolicy.training.rows import PromptStore
from noisepolicy.training.task import Task

_MAX_CALIBRATOR_UPDATES = 100
_CALIBRATOR_LEARNING_RATE = 5e-3
_CALIBRATOR_ERROR = 1e-4  # mean square of standardised rewards, at which it is taught enough
_CRITIC_SAMPLES = 8  # of a row, for the critic's gradient
_MIN_SPREAD = 0.1  # of the spread of all rewards: a prompt that is solved has none of its own
_MAX_NUMBERS = 2**26  # of the actions that are updated at a time


class Find:
    """The learner of the algorithm `find`. Row i of the table is prompt i of the task.

    Args:
        config: Resolved settings.
        task: The frozen model, the reward and the prompts.
        prompts: Embeddings of the prompts; all of them are encoded here.
        start_copy: RUN/init_policy, where the run keeps a copy of the policy that it started from.
        device: Device of the table and the networks.

    Raises:
        ValueError: if a batch holds more groups than there are prompts, or the policy to start from does not fit.
    """

    policy: TablePolicy
    critic_shape = None

    @plain_arithmetic()
    def __init__(
        self, config: TrainConfig, task: Task, prompts: PromptStore, *, start_copy: Path, device: torch.device
    ) -> None:
        num_prompts = len(task.train_prompts)
        if config.batch_size // config.group_size > num_prompts:
            raise ValueError(
                f"--batch-size {config.batch_size} is more than a group of {config.group_size} for each of "
                f"{num_prompts} prompts"
            )
        self._config, self._task, self._prompts, self._start_copy = config, task, prompts, start_copy
        prompts.add(range(num_prompts))
        embeds = prompts[torch.arange(num_prompts)].prompt_embeds
        self._critic: RewardCritic | None = None
        self._start: NoisePolicy | None = None
        self.policy = self._make_policy(embeds).to(device)
        self.policy.num_draws = task.frozen.num_draws
        self.average = copy.deepcopy(self.policy).eval().requires_grad_(False)
        self._scale = RewardScale(task.reward.weights, config.group_size, config.normalize_rewards)
        self._replay = Replay(
            num_prompts,
            config.replay * config.group_size,
            self.policy.action_shape,
            num_parts=len(task.reward.weights),
            device=device,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(config.seed, "calibrator weights"))
            self._calibrator = RewardCalibrator(
                prompts.shape, self.policy.action_shape, len(config.num_inference_steps)
            ).to(device)
        self._calibrator_optimizer = torch.optim.AdamW(
            self._calibrator.parameters(), lr=_CALIBRATOR_LEARNING_RATE, fused=True
        )

    def begin(self) -> None:
        """Write the copy of the policy that the run starts from, on the main process."""
        if self._start is not None:
            self._start.save_pretrained(self._start_copy)

    @plain_arithmetic()
    def kept_policy(self) -> NoisePolicy:
        """The result of the run: the averaged table within its KL budget, with the critic it started from, if any."""
        kept = copy.deepcopy(self.average)
        kept.shrink_to(self._config.kl_budget, self._prompts[torch.arange(len(self._prompts))].prompt_embeds)
        if self._critic is not None and self._config.num_candidates > 1:
            kept.attach_critic(copy.deepcopy(self._critic), self._config.num_candidates)
        return kept

    def _make_policy(self, embeds: torch.Tensor) -> TablePolicy:
        config, start = self._config, None
        bands, std = (config.bands if config.policy == "spectral" else None), config.std
        if config.init_policy is not None:
            start = self._load_start(config.init_policy).to(embeds.device)
            bands, std, self._critic = start.config.get("bands"), start.config["std"], start.critic
        policy = TablePolicy(
            latent_shape=self._task.frozen.latent_shape,
            prompt_shape=self._prompts.shape,
            prompts=self._task.train_prompts,
            bands=bands,
            std=std,
        ).to(embeds.device)
        policy.learn_keys(embeds)
        row = policy.row_of(embeds)
        if (same := (row != torch.arange(len(row), device=row.device)).nonzero()).numel():
            first, other = (policy.prompts[index] for index in (int(row[same[0]]), int(same[0])))
            raise ValueError(f"the text encoder takes {first!r} and {other!r} for the same prompt; leave one out")
        if start is not None:
            with torch.no_grad():
                policy.set_distribution(*start(embeds))
        return policy

    def _load_start(self, source: Path) -> NoisePolicy:
        """Load the policy to start from: the run's own copy, if there is one."""
        if (self._start_copy / "config.json").is_file():
            return NoisePolicy.from_pretrained(self._start_copy)
        folder = source / "policy" if (source / "policy" / "config.json").is_file() else source
        if not (folder / "config.json").is_file():
            raise ValueError(f"--init-policy {source} holds no policy; give a run's folder or a policy's")
        start = NoisePolicy.from_pretrained(folder)
        if (start.latent_shape, start.prompt_shape) != (self._task.frozen.latent_shape, self._prompts.shape):
            raise ValueError(
                f"--init-policy {source} is for latents {start.latent_shape} and prompt embeddings "
                f"{start.prompt_shape}; this model has {self._task.frozen.latent_shape} and {self._prompts.shape}"
            )
        self._start = start
        return start

    def draw_prompts(self, number: int) -> list[int]:
        """Return the prompts of iteration `number`, one per group: the next ones of the list, again and again."""
        count = self._config.batch_size // self._config.group_size
        return [index % len(self._task.train_prompts) for index in range(number * count, (number + 1) * count)]

    def learn(self, rollout: Rollout, number: int) -> dict[str, Any]:
        """Learn from the images of iteration `number` and return its metrics."""
        config = self._config
        group = config.group_size
        prompt = rollout.prompt_row[::group].to(rollout.reward.device)
        self._scale.update(rollout.parts)
        self._scale.warn_if_nothing_to_learn()
        self._replay.append(
            prompt,
            action=rollout.action.unflatten(0, (-1, group)),
            log_prob=rollout.log_prob.unflatten(0, (-1, group)),
            parts=rollout.parts.unflatten(0, (-1, group)),
            step_index=rollout.step_index.unflatten(0, (-1, group)),
        )
        metrics = {} if self._critic is not None else {"calibration_error": self._calibrate(prompt, rollout)}
        metrics |= self._update(prompt, stream_generator(config.seed, "policy update", number))
        averaged(self.average, self.policy, config.average_decay, number)
        return metrics

    def _calibrate(self, prompt: torch.Tensor, rollout: Rollout) -> float:
        """Train the calibrator on the current distributions' rewards; return its relative error before that."""
        reward = self._scale.standardise(rollout.parts).unflatten(0, (-1, self._config.group_size)).mean(1)
        step_index = rollout.step_index[:: self._config.group_size, None]
        embeds = self._prompts[prompt].prompt_embeds.float()
        with torch.no_grad():
            mean, log_std = self.policy.distribution(prompt)
        errors = []
        while len(errors) < _MAX_CALIBRATOR_UPDATES and (not errors or errors[-1] > _CALIBRATOR_ERROR):
            foreseen = self._calibrator(embeds, mean, log_std).gather(1, step_index)[:, 0]
            loss = F.mse_loss(foreseen, reward)
            errors.append(loss.item())
            self._calibrator_optimizer.zero_grad()
            loss.backward()
            self._calibrator_optimizer.step()
        return errors[0]

    def _update(self, prompt: torch.Tensor, generator: torch.Generator) -> dict[str, float]:
        """Call `_update_rows` on as many rows at a time as memory allows; metrics are means over the prompts."""
        row_size = self._config.replay * self._config.group_size * math.prod(self.policy.action_shape)
        total: dict[str, float] = {}
        for rows in prompt.split(max(1, _MAX_NUMBERS // row_size)):
            for name, value in self._update_rows(rows, generator).items():
                total[name] = total.get(name, 0.0) + value * len(rows) / len(prompt)
        return total

    def _update_rows(self, prompt: torch.Tensor, generator: torch.Generator) -> dict[str, float]:
        """Take a few natural-gradient steps on the prompts' rows. A row stops once its KL(old, new) passes the target.

        The loss of a row, with a critic between brackets, in units of the spread of its own rewards:

            ppo_clip_loss(advantages of its samples in the trust region) [- mean critic.lower_bound] + kl_coef KL(prior)
        """
        config = self._config
        samples, is_filled = self._replay.of(prompt)
        embeds = self._prompts[prompt].prompt_embeds.float()
        capacity = is_filled.shape[1]
        with torch.no_grad():
            old_mean, old_log_std = self.policy.distribution(prompt)
            reward = self._scale.standardise(samples["parts"].flatten(0, 1)).view_as(is_filled)
            surprise = reward - self._foreseen(embeds, samples, old_mean, old_log_std)
            # The spread includes what the critic foresaw, and leaves out what the step count explains.
            varied = surprise if self._critic is None else reward
            spread = _spread(varied, is_filled).clamp(min=_MIN_SPREAD)
            advantages = surprise / spread
        action, old_log_prob = samples["action"].flatten(0, 1), samples["log_prob"].flatten()
        for _ in range(config.num_updates):
            mean, log_std = self.policy.distribution(prompt)
            with torch.no_grad():
                is_live = gaussian_kl(old_mean, old_log_std, mean, log_std) <= config.target_kl
            if not is_live.any():
                break
            means, log_stds = (_repeat(value, capacity) for value in (mean, log_std))
            with torch.no_grad():
                log_ratio = (gaussian_log_prob(action, means, log_stds) - old_log_prob).view_as(is_filled)
                is_used = is_filled & (log_ratio.abs() <= config.max_log_ratio)
                weight = is_used * (capacity / is_used.sum(1, keepdim=True).clamp(min=1))
                is_clipped = is_used & ((log_ratio.exp() - 1).abs() > config.clip_range)
            loss, _ = ppo_clip_loss(
                action, means, log_stds, old_log_prob, (advantages * weight).flatten(), clip_range=config.clip_range
            )
            # A mean over prompts: times their number it is each row's own.
            loss = len(prompt) * loss + config.kl_coef * gaussian_kl(mean, log_std).sum()
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
                "clip_fraction": (is_clipped.sum() / is_used.sum().clamp(min=1)).item(),
                "used_fraction": (is_used.sum() / is_filled.sum()).item(),
            }

    def _foreseen(
        self, embeds: torch.Tensor, samples: Mapping[str, torch.Tensor], mean: torch.Tensor, log_std: torch.Tensor
    ) -> torch.Tensor:
        """Predict the standardised reward of each sample's own noise (critic) or of the distribution (calibrator)."""
        if self._critic is None:
            return self._calibrator(embeds, mean, log_std).gather(1, samples["step_index"])
        count = samples["step_index"].shape[1]
        values = self._critic(
            embeds.repeat_interleave(count, 0),
            samples["action"].flatten(0, 1),
            self._critic_steps(samples["step_index"].flatten()),
        )
        return self._restandardised(values.mean(0)).unflatten(0, (-1, count))

    def _restandardised(self, predicted: torch.Tensor) -> torch.Tensor:
        """Convert the critic's predictions from the scale of the run that trained it to this run's scale."""
        return self._scale.standardise_sum(self._critic.in_reward_units(predicted))

    def _critic_steps(self, step_index: torch.Tensor) -> torch.Tensor:
        """Map this run's step counts to the nearest that the critic was trained at."""
        nearest = [self._critic.shape.nearest_step_index(steps) for steps in self._config.num_inference_steps]
        return torch.tensor(nearest, device=step_index.device)[step_index]

    def _promise(
        self, embeds: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Compute the critic's lower bound of standardised rewards on fresh noise, `(prompts,)`, differentiable."""
        means, log_stds = (_repeat(value, _CRITIC_SAMPLES) for value in (mean, log_std))
        noise = draw_noise(means, generator)
        count = len(self._config.num_inference_steps)
        step_index = (torch.arange(len(means)) % count).to(means.device)
        values, _ = self._critic.lower_bound(
            embeds.repeat_interleave(_CRITIC_SAMPLES, 0), means + log_stds.exp() * noise, self._critic_steps(step_index)
        )
        return self._restandardised(values).unflatten(0, (-1, _CRITIC_SAMPLES)).mean(1)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return tensors and JSON values for a checkpoint, beside the weights of `policy` and `average`."""
        tensors = with_prefix("replay", self._replay.state())
        tensors |= with_prefix("calibrator", self._calibrator.state_dict())
        tensors |= with_prefix("reward_scale", self._scale.state())
        tensors |= optimizer_tensors(self._calibrator_optimizer, "calibrator_optimizer")
        return tensors, {}

    def load_state(
        self, tensors: Mapping[str, torch.Tensor], progress: Mapping[str, Any], history_folder: Path
    ) -> None:
        """Restore what `state` returned."""
        self._replay.load_state(without_prefix("replay", tensors))
        self._calibrator.load_state_dict(without_prefix("calibrator", tensors))
        self._scale.load_state(without_prefix("reward_scale", tensors))
        load_optimizer_tensors(self._calibrator_optimizer, tensors, "calibrator_optimizer")


class Replay:
    """FIND's historical samples: for each prompt a ring of the last `capacity` samples, on one device.

    Args:
        num_prompts: Number of rings.
        capacity: Number of samples in each ring.
        action_shape: Shape of one action, float32.
        num_parts: Number of parts of the reward, kept as float64 before they are weighted.
        device: Device of the samples.
    """

    def __init__(
        self, num_prompts: int, capacity: int, action_shape: tuple[int, ...], num_parts: int, device: torch.device
    ) -> None:
        self._capacity = capacity
        self._count = torch.zeros(num_prompts, dtype=torch.int64, device=device)
        self._columns = {
            "action": torch.zeros(num_prompts, capacity, *action_shape, device=device),
            "log_prob": torch.zeros(num_prompts, capacity, device=device),
            "parts": torch.zeros(num_prompts, capacity, num_parts, dtype=torch.float64, device=device),
            "step_index": torch.zeros(num_prompts, capacity, dtype=torch.int64, device=device),
        }

    def append(self, prompt: torch.Tensor, **samples: torch.Tensor) -> None:
        """Add `group` samples of each of some prompts: `(prompts,)`, and `(prompts, group, ...)` for each column."""
        group = samples["parts"].shape[1]
        place = (self._count[prompt][:, None] + torch.arange(group, device=prompt.device)) % self._capacity
        for name, column in self._columns.items():
            column[prompt[:, None], place] = samples[name]
        self._count[prompt] += group

    def of(self, prompt: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return some prompts' rings, `(prompts, capacity, ...)`, and the filled places, `(prompts, capacity)`."""
        is_filled = torch.arange(self._capacity, device=prompt.device) < self._count[prompt][:, None]
        return {name: column[prompt] for name, column in self._columns.items()}, is_filled

    def state(self) -> dict[str, torch.Tensor]:
        """Return the rings as tensors, for a checkpoint."""
        return {"count": self._count, **self._columns}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state` returned."""
        self._count.copy_(state["count"])
        for name, column in self._columns.items():
            column.copy_(state[name])


class RewardCalibrator(nn.Module):
    """FIND's dynamic reward calibration: the expected reward of a distribution over the noise, and a prompt.

    It sees the mean at 8 x 8 places at most and the log-std by channel, and predicts for each denoising step count.
    """

    _MAX_PLACES = 8

    def __init__(
        self, prompt_shape: tuple[int, int], action_shape: tuple[int, ...], num_steps: int, hidden_width: int = 64
    ) -> None:
        super().__init__()
        self._places = tuple(min(size, self._MAX_PLACES) for size in action_shape[-2:])
        planes = math.prod(action_shape[:-2])
        self.prompt = PromptReader(prompt_shape, token_width=16, hidden_width=hidden_width)
        self.distribution = nn.Linear(planes * (math.prod(self._places) + 1), hidden_width)
        self.out = nn.Linear(2 * hidden_width, num_steps)

    def forward(self, prompt_embeds: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
        """Predict standardised rewards, `(batch, steps)`, from embeddings and two tensors `(batch, *action_shape)`."""
        planes = mean.reshape(len(mean), -1, *mean.shape[-2:])
        loudness = log_std.expand_as(mean).reshape_as(planes).mean((2, 3))
        seen = torch.cat([F.adaptive_avg_pool2d(planes, self._places).flatten(1), loudness], 1)
        return self.out(torch.cat([self.prompt(prompt_embeds), F.silu(self.distribution(seen))], 1))


def _repeat(value: torch.Tensor, count: int) -> torch.Tensor:
    """Repeat each row `count` times: a row's samples are next to each other."""
    return value if value.ndim == 0 else value.repeat_interleave(count, 0)


def _spread(reward: torch.Tensor, is_filled: torch.Tensor) -> torch.Tensor:
    """Compute the standard deviation of each row's filled places, `(prompts, 1)`."""
    count = is_filled.sum(1, keepdim=True)
    center = (reward * is_filled).sum(1, keepdim=True) / count
    variance = (((reward - center) ** 2) * is_filled).sum(1, keepdim=True) / count
    return variance.sqrt()
