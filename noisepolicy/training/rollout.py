"""One batch of the current policy's images and their rewards; each process makes its share of the rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from noisepolicy.frozen import FrozenModel
from noisepolicy.ops import num_counters
from noisepolicy.policies import NoisePolicy
from noisepolicy.policies.critic import CriticShape, shrink_pictures
from noisepolicy.rewards import Reward
from noisepolicy.training.phases import PhaseClock
from noisepolicy.training.prompt_store import PromptStore


@dataclass(frozen=True)
class Rollout:
    """A batch, the same on every process; `(batch, ...)` tensors on the policy's device."""

    prompt_row: torch.Tensor
    """Into the run's `PromptStore`; on the CPU."""
    step_index: torch.Tensor
    action: torch.Tensor
    log_prob: torch.Tensor
    reward: torch.Tensor
    picture: torch.Tensor | None
    """What the critic learns to sketch; None without a critic."""


@torch.no_grad()
def roll_out(
    policy: NoisePolicy, frozen: FrozenModel, reward: Reward, prompts: Sequence[str], embeds: PromptStore, *,
    prompt_row: torch.Tensor, step_index: torch.Tensor, step_counts: Sequence[int], guidance_scale: float,
    seed: int, first_row: int, accelerator: Accelerator, clock: PhaseClock, critic_shape: CriticShape | None,
) -> Rollout:  # fmt: skip
    """Samples, generates and scores.

    The noise of a row is addressed by the row's number in the whole run (`first_row` and on), so neither the number
    of processes nor the frozen model's own batch size changes an image.

    Args:
        prompts: of the batch, as many.
        prompt_row: theirs in `embeds`, int64 `(batch,)`.
        step_index: row -> index into `step_counts`, int64 `(batch,)`.
        critic_shape: of the pictures to keep for the critic, if there is one.
    """
    batch = len(prompts)
    share = -(-batch // accelerator.num_processes)
    mine = slice(accelerator.process_index * share, min((accelerator.process_index + 1) * share, batch))
    my_prompts, my_steps = prompts[mine], step_index[mine]
    my_embeds = embeds[prompt_row[mine]]
    with clock.phase("policy"):
        offset = (first_row + mine.start) * num_counters(policy.latent_shape)
        sample = policy.sample(my_embeds.prompt_embeds, seed=seed, offset=offset)
    rewards = torch.zeros(len(my_prompts))
    pictures = None
    if critic_shape is not None:
        pictures = torch.zeros(len(my_prompts), *critic_shape.sketch_shape, device=sample.action.device)
    for index, num_inference_steps in enumerate(step_counts):
        rows = (my_steps == index).nonzero()[:, 0]
        if len(rows) == 0:
            continue
        on_device = rows.to(sample.latents.device)
        with clock.phase("frozen_model"):
            images = frozen.generate(
                sample.latents[on_device], my_embeds[on_device],
                num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
            )  # fmt: skip
        with clock.phase("reward"):
            rewards[rows] = reward(images, [my_prompts[i] for i in rows.tolist()])
        if pictures is not None:
            pictures[on_device] = shrink_pictures(images, critic_shape)

    def gather(rows: torch.Tensor) -> torch.Tensor:
        if accelerator.num_processes == 1:
            return rows
        padding = rows.new_zeros(share - len(rows), *rows.shape[1:])
        return accelerator.gather(torch.cat([rows, padding]))[:batch]

    device = sample.action.device
    return Rollout(
        prompt_row,
        step_index.to(device),
        gather(sample.action),
        gather(sample.log_prob),
        gather(rewards.to(device)),
        None if pictures is None else gather(pictures),
    )
