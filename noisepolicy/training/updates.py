"""The gradient steps of one iteration: the critic on the history, then the policy.

Every process holds the whole gathered batch and does the same arithmetic, so there are no gradients to average: the
update is a thousandth of the cost of the images.
"""

import math
from itertools import pairwise, starmap

import torch

from noisepolicy.ops import gaussian_kl, gaussian_log_prob, ppo_clip_loss
from noisepolicy.policies import NoisePolicy
from noisepolicy.policies.critic import RewardCritic
from noisepolicy.training.advantages import leave_one_out, residual
from noisepolicy.training.config import TrainConfig
from noisepolicy.training.history import History
from noisepolicy.training.prompt_store import PromptStore
from noisepolicy.training.reward_scale import RewardScale
from noisepolicy.training.rollout import Rollout

_MAX_LOG_PROB_DRIFT = 1e-2
_MAX_ATTEMPTS = 10


def update_critic(
    critic: RewardCritic,
    optimizer: torch.optim.Optimizer,
    history: History,
    prompts: PromptStore,
    scale: RewardScale,
    *,
    num_updates: int,
    batch_size: int,
    max_grad_norm: float,
    generator: torch.Generator,
) -> float:
    """Regresses pictures and standardised rewards on the history.

    Returns:
        The reward's mean squared error over the updates, in the reward's own units.
    """
    total = 0.0
    for _ in range(num_updates):
        rows = history.draw(batch_size, generator)
        loss, error = critic.loss(
            prompts[rows["prompt_row"]].prompt_embeds.float(),
            rows["action"],
            rows["step_index"],
            rows["picture"].float(),
            scale.standardise(rows["parts"]),
        )
        optimizer.zero_grad()
        loss.backward()
        # Without it, one bad batch late in a run can undo the critic and the policy that follows it.
        torch.nn.utils.clip_grad_norm_(critic.parameters(), max_grad_norm)
        optimizer.step()
        total = total + error
    return float(total) / num_updates * scale.spread.total**2


def update_policy(
    policy: NoisePolicy,
    optimizer: torch.optim.Optimizer,
    critic: RewardCritic | None,
    rollout: Rollout,
    prompts: PromptStore,
    scale: RewardScale,
    config: TrainConfig,
    *,
    kl_coef: float,
    diversity_coef: float,
    generator: torch.Generator,
) -> dict[str, float]:
    """Clipped PPO on the batch and, with a critic, its gradient on fresh samples of the policy.

        loss = ppo_clip_loss(advantages)
               - mean(critic.lower_bound) - diversity_coef * difference of two sketches + kl_coef * KL(policy, prior)

    Rewards are in units of their spread between images of one prompt. The advantages are the rewards less the critic's
    prediction (a control variate, as in Q-Prop, arXiv 1611.02247), or the leave-one-out advantages of plain Noise PPO.
    Stops early when KL(old, new) passes its target, and is drawn back to it from more than twice as much, which a
    single step of a policy without a critic can come to.

    Args:
        prompts: those met so far; fresh samples are of these.
        scale: of the rewards.
        config: its `gradient_accumulation_steps` cuts the batch for PPO's gradient, not the fresh samples.
        kl_coef: spreads of the reward per nat.
        diversity_coef: spreads of the reward per unit of difference between two pictures of a prompt (root mean square
            of pixels in [0, 1]).
        generator: for fresh prompts and noise.

    Returns:
        Metrics of the iteration.
    """
    batch_embeds = prompts[rollout.prompt_row].prompt_embeds.float()
    with torch.no_grad():
        old_mean, old_log_std = policy(batch_embeds)
        # Taken anew by the op that the loss uses, so the first ratio is 1 (to the bit where the batch is one part);
        # float32 log-probs of hundreds of dimensions are exact to 1e-4 only.
        old_log_prob = gaussian_log_prob(rollout.action, old_mean, old_log_std)
        if (drift := (old_log_prob - rollout.log_prob).abs().max().item()) > _MAX_LOG_PROB_DRIFT:
            raise RuntimeError(f"log-probs of the rollout and of its update differ by {drift:.3g}; the ratio would lie")
        reward = scale.standardise(rollout.parts)
        if critic is None:
            advantages = leave_one_out(reward, config.group_size, scale.within_share)
        else:
            predicted = critic(batch_embeds, rollout.action, rollout.step_index).mean(0)
            advantages = residual(reward, predicted, scale.within_share)
    ppo_kl_coef = kl_coef if critic is None else 0.0
    # For memory: the graph of a part of the batch at a time. Slices are views, where indices would copy embeddings.
    batch, num_parts = len(rollout.reward), config.gradient_accumulation_steps
    parts = list(starmap(slice, pairwise(batch * number // num_parts for number in range(num_parts + 1))))
    start = [parameter.detach().clone() for parameter in policy.parameters()]
    for _ in range(config.num_updates):
        optimizer.zero_grad()
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
            _critic_loss(policy, critic, prompts, scale, config, kl_coef, diversity_coef, generator).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        optimizer.step()
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


def _draw_back(
    policy: NoisePolicy,
    start: list[torch.Tensor],
    embeds: torch.Tensor,
    old_mean: torch.Tensor,
    old_log_std: torch.Tensor,
    target_kl: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shortens the way of the weights from `start` until KL(old, new) is at most twice its target; what it then gives.

    KL is nearly quadratic in the way, so one attempt or two will do.
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
    """How far apart two pictures of a prompt are, by their sketches, as a share of the prior's."""
    noise = [torch.randn(mean.shape, generator=generator).to(mean.device) for _ in range(2)]
    pairs = ([mean + log_std.exp() * draw for draw in noise], noise)
    ours, prior = (
        _distance(*(critic.sketch(embeds, action, rollout.step_index) for action in pair)).mean() for pair in pairs
    )
    return (ours / prior).item()


def _distance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Root mean square difference of two batches of sketches, in units of pixels in [0, 1]; `(batch,)`."""
    # Pictures are in [-1, 1] here; half the difference is that of pixels in [0, 1].
    return ((first - second) ** 2).flatten(1).mean(1).add(1e-12).sqrt() / 2


def _critic_loss(
    policy: NoisePolicy,
    critic: RewardCritic,
    prompts: PromptStore,
    scale: RewardScale,
    config: TrainConfig,
    kl_coef: float,
    diversity_coef: float,
    generator: torch.Generator,
) -> torch.Tensor:
    # Two samples of each prompt, to see how far apart their pictures are.
    count = config.critic_batch_size // 2
    rows = torch.randint(len(prompts), (count,), generator=generator).repeat(2)
    step_index = torch.randint(len(config.num_inference_steps), (count,), generator=generator).repeat(2)
    fresh = prompts[rows].prompt_embeds.float()
    mean, log_std = policy(fresh)
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    value, sketch = critic.lower_bound(fresh, mean + log_std.exp() * noise, step_index.to(mean.device))
    distance = _distance(*sketch.chunk(2))
    gain = value.mean() / scale.within_share if scale.within_share else 0.0
    return kl_coef * gaussian_kl(mean, log_std).mean() - gain - diversity_coef * distance.mean()
