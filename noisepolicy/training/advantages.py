"""Advantages: how much an image's reward exceeds what was expected of it, in spreads of the reward within a prompt."""

import torch

_MAX_ADVANTAGE = 5.0  # one outlier must not outweigh the rest of the batch


def leave_one_out(rewards: torch.Tensor, group_size: int, spread: float) -> torch.Tensor:
    """Reward minus the mean of the others of its prompt's group, `(batch,)`.

    Args:
        rewards: standardised, `(batch,)`, groups adjacent.
        group_size: images of one prompt, at least 2.
        spread: of the rewards within a prompt; 0 makes the advantages 0.
    """
    groups = rewards.reshape(-1, group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return _in_spreads((groups - others).reshape(-1), spread)


def residual(rewards: torch.Tensor, predicted: torch.Tensor, spread: float) -> torch.Tensor:
    """Reward minus the critic's prediction, centred over the batch, `(batch,)`; arguments as in `leave_one_out`."""
    difference = rewards - predicted
    return _in_spreads(difference - difference.mean(), spread)


def _in_spreads(advantages: torch.Tensor, spread: float) -> torch.Tensor:
    if not spread:
        return torch.zeros_like(advantages)
    return (advantages / spread).clamp(-_MAX_ADVANTAGE, _MAX_ADVANTAGE)
