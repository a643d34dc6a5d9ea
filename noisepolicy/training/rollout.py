"""One batch of the current policy's images and their rewards; each process makes its share of the chunks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from noisepolicy.frozen import FrozenModel
from noisepolicy.ops import num_counters
from noisepolicy.policies import NoisePolicy
from noisepolicy.policies.critic import CriticShape, shrink_pictures
from noisepolicy.rewards import Reward
from noisepolicy.rewards.weighted_sum import weigh
from noisepolicy.training.overlap import scoring
from noisepolicy.training.phases import PhaseClock
from noisepolicy.training.processes import Processes
from noisepolicy.training.prompt_store import PromptStore
from noisepolicy.training.shares import deal, split_batch


@dataclass(frozen=True)
class Rollout:
    """A batch, the same on every process; `(batch, ...)` tensors on the policy's device."""

    prompt_row: torch.Tensor
    """Into the run's `PromptStore`; on the CPU."""
    step_index: torch.Tensor
    action: torch.Tensor
    log_prob: torch.Tensor
    parts: torch.Tensor
    """Each part of the reward, before it is weighted, float64 `(batch, parts)`; see `Reward.parts`."""
    reward: torch.Tensor
    """Their weighted sum in the user's units, float64 `(batch,)`."""
    picture: torch.Tensor | None
    """What the critic learns to sketch, float16; None without a critic."""


@torch.no_grad()
def roll_out(
    policy: NoisePolicy,
    frozen: FrozenModel,
    reward: Reward,
    prompts: Sequence[str],
    embeds: PromptStore,
    *,
    prompt_row: torch.Tensor,
    step_index: torch.Tensor,
    step_counts: Sequence[int],
    guidance_scale: float,
    seed: int,
    number: int,
    max_rows: int,
    processes: Processes,
    clock: PhaseClock,
    critic_shape: CriticShape | None,
    is_overlapped: bool,
) -> Rollout:
    """Samples, generates and scores, chunk by chunk.

    The noise of a row is addressed by its number in the whole run, and everything of a chunk (policy, frozen model,
    reward) is computed with no other rows: neither the number of processes nor who makes a chunk changes a bit.

    Args:
        prompts: of the batch, as many.
        prompt_row: theirs in `embeds`, int64 `(batch,)`.
        step_index: row -> index into `step_counts`, int64 `(batch,)`.
        number: of the batch in the run, from 0; all have as many rows.
        max_rows: of a chunk; see `split_batch`.
        critic_shape: of the pictures to keep for the critic, if there is one.
        is_overlapped: score a chunk while the next one is generated; the reward's seconds are then those waited for it.
    """
    batch = len(prompts)
    shares = deal(split_batch(step_index, max_rows), step_counts, processes.count)
    mine = shares[processes.index]
    device = next(policy.parameters()).device
    actions = [torch.zeros(0, *policy.action_shape, device=device)]  # for a process that has no share
    log_probs, pictures = [torch.zeros(0, device=device)], []
    if critic_shape is not None:
        pictures = [torch.zeros(0, *critic_shape.sketch_shape, dtype=torch.float16, device=device)]
    with scoring(reward.parts, is_overlapped=is_overlapped, device=device) as scorer:
        for chunk in mine:
            rows = slice(chunk.start, chunk.stop)
            with clock.phase("policy"):
                chunk_embeds = embeds[prompt_row[rows]]
                offset = (number * batch + chunk.start) * num_counters(policy.latent_shape)
                sample = policy.sample(chunk_embeds.prompt_embeds, seed=seed, offset=offset)
            with clock.phase("frozen_model"):
                images = frozen.generate(
                    sample.latents,
                    chunk_embeds,
                    num_inference_steps=step_counts[chunk.step_index],
                    guidance_scale=guidance_scale,
                )
            actions.append(sample.action)
            log_probs.append(sample.log_prob)
            if critic_shape is not None:
                pictures.append(shrink_pictures(images, critic_shape).to(device, torch.float16))
            with clock.phase("reward"):
                scorer.add(images, prompts[rows])
        with clock.phase("reward"):
            rewards = [torch.zeros(0, len(reward.weights), dtype=torch.float64), *scorer.finish()]
    columns = [torch.cat(actions), torch.cat(log_probs), torch.cat(rewards).to(device)]
    if critic_shape is not None:
        columns.append(torch.cat(pictures))
    action, log_prob, parts, *picture = processes.gather_rows(
        f"'gather rewards' of iteration {number + 1}",
        torch.tensor([row for chunk in mine for row in range(chunk.start, chunk.stop)], dtype=torch.int64),
        columns,
        counts=[sum(chunk.stop - chunk.start for chunk in share) for share in shares],
    )
    return Rollout(
        prompt_row,
        step_index.to(device),
        action,
        log_prob,
        parts,
        weigh(parts, reward.weights),
        picture[0] if picture else None,
    )
