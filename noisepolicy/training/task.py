"""What a run is about: a frozen model, a reward, and prompts for training and for evaluation."""

import dataclasses
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from noisepolicy.frozen import FrozenDiffusersPipeline, FrozenModel
from noisepolicy.rewards import Reward, load_reward
from noisepolicy.training.config import DEFAULT_EVAL_STEPS, FROM_PYTHON, TrainConfig
from noisepolicy.training.prompt_list import PromptList
from noisepolicy.training.prompt_records import identity, read_prompts
from noisepolicy.worlds import find_world


@dataclass(frozen=True)
class Task:
    """Prompts may be any iterable of text or of records, such as a `datasets` dataset; see docs/prompts.md.

    Raises:
        ValueError: if one of the prompts is none.
    """

    frozen: FrozenModel
    reward: Reward
    eval_rewards: list[Reward]
    train_prompts: Sequence[str]
    eval_prompts: Sequence[str]
    eval_steps: tuple[int, ...] | None = None
    """Denoising step counts of the final sweep; None if there is none."""
    model_name: str | None = None
    """The `--model` that `frozen` was loaded for; None for a model that was made in Python."""

    def named(self, config: TrainConfig) -> TrainConfig:
        """`config` with the names of the model and the rewards of this task, which may not be those it says."""
        return dataclasses.replace(
            config,
            model=self.model_name or FROM_PYTHON + type(self.frozen).__name__,
            reward=_reward_name(self.reward),
            eval_rewards=tuple(map(_reward_name, self.eval_rewards)),
        )

    def __post_init__(self) -> None:
        for name in ("train_prompts", "eval_prompts"):
            if not isinstance(prompts := getattr(self, name), PromptList):
                object.__setattr__(self, name, read_prompts(prompts))


def load_task(config: TrainConfig, device: torch.device, *, for_training: bool = True) -> Task:
    """Loads what `config` names.

    Args:
        for_training: whether training prompts are needed; without it, they are not read where `config` has evaluation
            prompts of their own.

    Raises:
        ValueError: if something named is not there or cannot be used.
    """
    _refuse_objects(config.model, config.reward, *config.eval_rewards)
    world = find_world(config.model)
    needs_training_prompts = for_training or not config.eval_prompts
    if world is None and not config.prompts and needs_training_prompts:
        raise ValueError(f"--model {config.model} needs --prompts: files or prompts; see docs/prompts.md")
    if world is None and config.reward is None:
        raise ValueError(f"--model {config.model} needs --reward, e.g. pickscore")
    if config.algorithm == "find" and not config.prompts:
        raise ValueError("--algorithm find needs --prompts: it learns each on its own")
    train: Sequence[str] = [scene.caption for scene in world.train_scenes()] if world is not None else []
    if not needs_training_prompts:
        train = []
    elif config.prompts:
        train = PromptList(config.prompts, config.prompt_column)
    if config.algorithm == "find":
        train = _without_repeats(train)
        held_out = train
    elif config.eval_prompts:
        held_out = PromptList(config.eval_prompts, config.prompt_column)
    elif not config.prompts:
        held_out = [scene.caption for scene in world.held_out_scenes()]
    elif config.holds_out_prompts:
        train, held_out = _hold_out(train)
    else:
        held_out = []
    if world is not None and config.reward in (None, config.model):
        for prompt in itertools.chain(train, held_out):
            world.parse_caption(prompt)
    reward = load_reward(config.reward or config.model, device=device)
    eval_rewards = [load_reward(spec, device=device) for spec in config.eval_rewards]
    frozen = load_frozen(config, device)
    # One image for each step count now, rather than a failure in the middle of the run.
    for steps in config.num_inference_steps if for_training else ():
        frozen.check_deterministic(steps, config.guidance_scale)
    eval_steps = _usable_eval_steps(config, frozen) if config.eval_num_prompts else config.eval_steps
    return Task(frozen, reward, eval_rewards, train, held_out, eval_steps, config.model)


def _usable_eval_steps(config: TrainConfig, frozen: FrozenModel) -> tuple[int, ...]:
    """The step counts to evaluate with; defaults that the model cannot work with are left out with a warning.

    Raises:
        ValueError: if the model cannot work with a step count that the user gave.
    """
    if config.eval_steps is not None:
        for steps in config.eval_steps:
            frozen.check_deterministic(steps, config.guidance_scale)
        return config.eval_steps
    usable, reason = [], None
    for steps in DEFAULT_EVAL_STEPS:
        try:
            frozen.check_deterministic(steps, config.guidance_scale)
            usable.append(steps)
        except ValueError as error:
            reason = error
    if reason is not None:
        left_out = ", ".join(str(steps) for steps in DEFAULT_EVAL_STEPS if steps not in usable)
        warnings.warn(f"the evaluation leaves out {left_out} steps: {reason}", stacklevel=2)
    return tuple(usable) or config.num_inference_steps


def load_frozen(config: TrainConfig, device: torch.device) -> FrozenDiffusersPipeline:
    """The frozen model `config` names, on its engine. What `--denoiser auto` chose is printed and is its `engine`.

    Raises:
        ValueError: if it is not there or cannot be used.
        RuntimeError: if its engine does not run here, or not rightly.
    """
    _refuse_objects(config.model)
    world = find_world(config.model)
    # A UNet for video does not say how long its clips are.
    num_frames = config.num_frames or (world.NUM_FRAMES if world is not None else None)
    try:
        frozen = FrozenDiffusersPipeline.from_pretrained(
            config.model if world is None else world.model_folder(),
            device=device,
            dtype=getattr(torch, config.dtype or "float32"),
            rollout_batch_size=config.rollout_batch_size,
            height=config.height,
            width=config.width,
            num_frames=num_frames,
            negative_prompt=config.negative_prompt,
            max_sequence_length=config.max_sequence_length,
            variant=config.variant,
            scheduler=config.scheduler,
            timestep_spacing=config.timestep_spacing,
            vae_slicing=config.vae_slicing,
            vae_tiling=config.vae_tiling,
            cpu_offload=config.cpu_offload,
            cuda_graph=config.cuda_graph,
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load --model {config.model}: {' '.join(str(error).split())}") from error
    if config.denoiser == "eager" and config.denoiser_dtype is None:
        return frozen
    from noisepolicy.engines import choose_engine, use_engine

    if config.denoiser != "auto":
        use_engine(frozen, config.denoiser, dtype=config.denoiser_dtype)
        return frozen
    choice = choose_engine(
        frozen,
        frozen.encode([""]),
        num_inference_steps=config.num_inference_steps[0],
        guidance_scale=config.guidance_scale,
    )
    print(choice, flush=True)
    return frozen


def _without_repeats(prompts: Sequence[str]) -> list[str]:
    """Each text once, for FIND, whose distribution of a prompt knows its text only."""
    kept: dict[str, str] = {}
    for prompt in prompts:
        if identity(kept.setdefault(prompt, prompt)) != identity(prompt):
            raise ValueError(f"the prompt {str(prompt)!r} comes twice, with different metadata; FIND takes it once")
    return list(kept.values())


def _reward_name(reward: Reward) -> str:
    return reward.spec or FROM_PYTHON + reward.name


def _refuse_objects(*names: str | None) -> None:
    for name in names:
        if name is not None and name.startswith(FROM_PYTHON):
            raise ValueError(
                f"this run was made in Python with {name.removeprefix(FROM_PYTHON)}, which no command can load; go on "
                "with it, or use its policy, from Python"
            )


def _hold_out(prompts: PromptList) -> tuple[PromptList, PromptList]:
    """Splits off a fifth of the user's prompts, at least one, for evaluation.

    They are the texts with the smallest checksums, so they are the same in every run, whatever the order of the list,
    and a text that comes several times is never on both sides.
    """
    checksums = np.unique(prompts.crc32)
    if len(checksums) < 2:
        raise ValueError(
            f"{len(prompts)} prompts hold too few different ones (1) to hold some out for evaluation; give "
            "--eval-prompts FILE, or --eval-num-prompts 0 for no evaluation"
        )
    num_held_out = max(1, round(len(checksums) / 5))
    is_held_out = prompts.crc32 <= checksums[num_held_out - 1]
    return prompts.select(~is_held_out), prompts.select(is_held_out)
