"""The interface of a learner: an algorithm that learns from a run's images, which `run.py` makes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from noisepolicy.policies import NoisePolicy
from noisepolicy.policies.critic import CriticShape
from noisepolicy.training.rollout import Rollout


class Learner(Protocol):
    """An algorithm of a run; `NoisePpo` and `Find` are learners."""

    policy: NoisePolicy
    """The policy that makes the images and takes the gradient steps."""
    average: NoisePolicy
    """Average of the policy's recent weights, which is free of the noise that single iterations leave in them."""
    critic_shape: CriticShape | None
    """Shape of the pictures that a rollout keeps for a critic, if there is one."""

    def draw_prompts(self, number: int) -> list[int]:
        """Return the prompts of iteration `number`, one per group."""
        ...

    def begin(self) -> None:
        """Write what the run folder must hold before the first iteration, on the main process."""
        ...

    def learn(self, rollout: Rollout, number: int) -> dict[str, Any]:
        """Learn from the images of iteration `number` and return its metrics."""
        ...

    def kept_policy(self) -> NoisePolicy:
        """Return the result of the run so far: the average of the weights, scaled to its KL budget."""
        ...

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return tensors and JSON values for a checkpoint, beside the weights of `policy` and `average`."""
        ...

    def load_state(
        self, tensors: Mapping[str, torch.Tensor], progress: Mapping[str, Any], history_folder: Path
    ) -> None:
        """Restore what `state` returned."""
        ...
