"""The shortest run that trains: two iterations on two images, and what it must leave as it was."""

from pathlib import Path
from typing import Any

import torch

import noisepolicy
from noisepolicy.frozen import FrozenModel

SHORT: dict[str, Any] = {"num_inference_steps": (2,), "bands": 2, "batch_size": 2, "num_iterations": 2}
WITH_CRITIC: dict[str, Any] = SHORT | {"critic_warmup": 2, "critic_updates": 1, "critic_batch_size": 2}


def assert_it_trains_and_stays_as_it_was(frozen: FrozenModel, made: torch.Tensor, folder: Path) -> None:
    """Train on a frozen model.

    Args:
        made: Something that the model made. A critic learns from pictures alone; other things are trained with PPO.
        folder: Folder of the run.
    """
    before = frozen.weights_sha256()
    run = noisepolicy.Run(
        frozen,
        prompts=["a red circle", "a blue square"],
        reward=lambda images, prompts: images.flatten(1).mean(1),
        guidance_scale=4.0,
        eval_num_prompts=0,
        output_dir=folder,
        **(WITH_CRITIC if made.shape[-3:-2] == (3,) else SHORT | {"algorithm": "ppo", "group_size": 2}),
    )
    assert [row["iteration"] for row in run] == [1, 2]
    assert frozen.weights_sha256() == before
