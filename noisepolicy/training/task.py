"""What a run is about: a frozen model, a reward, and prompts for training and for evaluation."""

import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

from noisepolicy.frozen import FrozenDiffusersPipeline, FrozenModel
from noisepolicy.rewards import Reward, load_reward
from noisepolicy.shapes import held_out_scenes, model_folder, train_scenes
from noisepolicy.training.config import TrainConfig


@dataclass(frozen=True)
class Task:
    frozen: FrozenModel
    reward: Reward
    train_prompts: list[str]
    eval_prompts: list[str]


def load_task(config: TrainConfig, device: torch.device) -> Task:
    """Loads what `config` names.

    Raises:
        ValueError: if something named is not there or cannot be used.
    """
    is_embedded = config.model == "shapes"
    if not is_embedded and config.prompts is None:
        raise ValueError(f"--model {config.model} needs --prompts FILE (one prompt a line)")
    train = read_prompts(config.prompts) if config.prompts else [scene.caption for scene in train_scenes()]
    if config.eval_prompts:
        held_out = read_prompts(config.eval_prompts)
    elif config.prompts is None:
        held_out = [scene.caption for scene in held_out_scenes()]
    elif config.eval_num_prompts:
        train, held_out = _hold_out(train)
    else:
        held_out = []
    reward = load_reward(config.reward)
    try:
        frozen = FrozenDiffusersPipeline.from_pretrained(
            model_folder() if is_embedded else config.model, device=device, dtype=getattr(torch, config.dtype),
            rollout_batch_size=config.rollout_batch_size,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load --model {config.model}: {' '.join(str(error).split())}") from error
    return Task(frozen, reward, train, held_out)


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; blank lines are skipped.

    Raises:
        ValueError: if the file is missing, empty or not UTF-8.
    """
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt file {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise ValueError(f"cannot read prompt file {path}: {error.strerror}") from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"prompt file {path} holds no prompt; expected one a line")
    return prompts


def _hold_out(prompts: list[str]) -> tuple[list[str], list[str]]:
    """A fifth of the user's prompts for evaluation, chosen by their text, so it is the same in every run."""
    held_out = [prompt for prompt in prompts if zlib.crc32(prompt.encode()) % 5 == 0]
    train = [prompt for prompt in prompts if zlib.crc32(prompt.encode()) % 5 != 0]
    if not held_out or not train:
        raise ValueError(
            f"{len(prompts)} prompts are too few to hold some out for evaluation; give --eval-prompts FILE, "
            "or --eval-num-prompts 0 for no evaluation"
        )
    return train, held_out
