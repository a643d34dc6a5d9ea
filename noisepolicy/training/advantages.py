"""Advantages: how much better an image was than it had to be."""

import torch


def leave_one_out(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """Reward minus the mean of the others of its prompt's group, over the batch's spread.

    Args:
        rewards: `(batch,)`, groups adjacent.
        group_size: images of one prompt, at least 2.
    """
    groups = rewards.reshape(-1, group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return _normalise((groups - others).reshape(-1))


def residual(rewards: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """What the critic did not foresee, centred, over the rewards' spread; `(batch,)`."""
    difference = rewards - predicted
    return (difference - difference.mean()) / (rewards.std() + 1e-6)


def _normalise(advantages: torch.Tensor) -> torch.Tensor:
    return advantages / (advantages.std() + 1e-6)
