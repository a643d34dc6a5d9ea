"""The task of a run: a frozen model, a reward, and prompts for training and for evaluation."""

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from noisepolicy.frozen import FrozenModel, as_frozen_model
from noisepolicy.frozen.base import PlainModel
from noisepolicy.frozen.config import ModelConfig
from noisepolicy.named_objects import import_object
from noisepolicy.rewards import Reward, load_reward
from noisepolicy.settings import settings_of
from noisepolicy.training.config import DEFAULT_EVAL_STEPS, FROM_PYTHON, TrainConfig, is_model_object
from noisepolicy.training.prompt_list import PromptList
from noisepolicy.training.prompt_records import identity
from noisepolicy.worlds import find_world

_OF_USE = (
    *("rollout_batch_size", "height", "width", "num_frames"),
    *("negative_prompt", "max_sequence_length", "call", "image_columns", "sampler_noise", "cuda_graph"),
)


OF_LOADING = (
    *("variant", "revision", "single_file_config", "denoiser_file"),
    *("lora", "fuse_lora", "quantize", "quantize_parts", "scheduler", "scheduler_options"),
    *("vae_slicing", "vae_tiling", "cpu_offload"),
)
"""Settings of a pipeline's loading, beside its name and data type. One that is in memory is used as it is."""


@dataclass(frozen=True)
class Given:
    """Objects from Python that replace those named in the settings; None keeps the setting's."""

    model: Any = None
    reward: Reward | None = None
    eval_rewards: Sequence[str | Reward] | None = None
    prompts: PromptList | None = None
    eval_prompts: PromptList | None = None


@dataclass(frozen=True)
class Task:
    """A frozen model, a reward, and prompts for training and for evaluation."""

    frozen: FrozenModel
    reward: Reward
    eval_rewards: list[Reward]
    train_prompts: Sequence[str]
    eval_prompts: Sequence[str]
    eval_steps: tuple[int, ...] | None = None
    """Denoising step counts of the evaluation; None if there is no evaluation."""
    rollout_vae: torch.nn.Module | None = None
    """Autoencoder that decodes the images of training in the place of the model's own."""


def load_task(
    config: TrainConfig, device: torch.device, given: Given | None = None, *, for_training: bool = True
) -> Task:
    """Load what `config` names, except for the given objects.

    Args:
        for_training: Whether training prompts are needed. If not, they are not read if `config` has evaluation prompts.

    Raises:
        ValueError: if something that is named is not there or cannot be used.
    """
    given = given or Given()
    _refuse_missing_objects(config, given)
    world = find_world(config.model.name)
    train, held_out = load_prompts(config, given, for_training=for_training)
    if world is None and config.reward is None and given.reward is None:
        raise ValueError(f"--model {config.model.name} needs --reward, e.g. pickscore")
    if world is not None and given.reward is None and config.reward in (None, config.model.name):
        for prompt in itertools.chain(train, held_out):
            world.parse_caption(prompt)
    reward = given.reward or load_reward(config.reward or config.model.name, device=device)
    further = config.evaluation.rewards if given.eval_rewards is None else given.eval_rewards
    eval_rewards = [load_reward(each, device=device) if isinstance(each, str) else each for each in further]
    frozen = load_model(config.model, device, given.model, settings=config)
    if isinstance(frozen, PlainModel) and (prompts := train or held_out):
        frozen.encode([str(prompts[0])])  # it has no prompt of its own to try the step counts with
    # One image for each step count now, rather than a failure in the middle of the run.
    for steps in config.num_inference_steps if for_training else ():
        frozen.check_deterministic(steps, config.guidance_scale)
    eval_steps = _usable_eval_steps(config, frozen) if config.evaluation.num_prompts else config.evaluation.steps
    rollout_vae = None
    if config.model.rollout_vae is not None and for_training:
        rollout_vae = _load_rollout_vae(config, frozen)
    return Task(frozen, reward, eval_rewards, train, held_out, eval_steps, rollout_vae)


def _load_rollout_vae(config: TrainConfig, frozen: FrozenModel) -> torch.nn.Module:
    """Load the autoencoder for training, and try it on an image.

    Raises:
        ValueError: if it is not there, or makes images of another size than the model's own.
    """
    what = f"--rollout-vae {config.model.rollout_vae}"
    if getattr(frozen, "vae", None) is None:
        raise ValueError(f"{what} is for diffusers pipelines with an autoencoder")
    from noisepolicy.frozen.loading import load_vae

    try:
        vae = load_vae(config.model.rollout_vae, dtype=frozen.vae.dtype, device=frozen.device)
    except OSError as error:
        raise ValueError(f"cannot load {what}: {error}") from error
    latents = torch.randn(1, *frozen.latent_shape, generator=torch.Generator().manual_seed(0))
    settings = {"num_inference_steps": config.num_inference_steps[0], "guidance_scale": config.guidance_scale}
    embeds = frozen.encode([""])
    own = frozen.generate(latents, embeds, **settings)
    try:
        with frozen.decoding_with(vae):
            image = frozen.generate(latents, embeds, **settings)
    except Exception as error:  # what is made for other latents raises almost anything
        raise ValueError(f"{what} does not decode this model's latents ({type(error).__name__}: {error})") from error
    if image.shape != own.shape:
        raise ValueError(
            f"{what} makes images {tuple(image.shape[1:])}, and the model's own VAE {tuple(own.shape[1:])}"
        )
    return vae


def load_model(model: ModelConfig, device: torch.device, given: Any = None, *, settings: TrainConfig) -> FrozenModel:
    """Load the frozen model that `model` names, or take `given`, and put it on its engine.

    An engine that 'auto' chose is printed, and is the model's `engine`.

    Args:
        settings: Step count and guidance scale to measure engines with.

    Raises:
        ValueError: if the model is not there or cannot be used.
        RuntimeError: if the engine does not run here, or gives wrong results.
    """
    if given is None:
        refuse_object(model.name, "--model")
    if given is None and is_model_object(model.name):
        given = _import_model(model)
    if given is not None:
        return _load_given(model, device, given, settings)
    world = find_world(model.name)
    if world is not None and model.num_frames is None:  # a UNet for video does not say how long its clips are
        model = dataclasses.replace(model, num_frames=world.NUM_FRAMES)
    from noisepolicy.frozen import FrozenDiffusersPipeline

    try:
        frozen = FrozenDiffusersPipeline.from_pretrained(
            model.name if world is None else world.model_folder(),
            device=device,
            dtype=getattr(torch, model.dtype or "float32"),
            **{name: getattr(model, name) for name in OF_LOADING},
            **_use_of(model, settings),
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load --model {model.name}: {' '.join(str(error).split())}") from error
    return _on_engine(frozen, model, settings)


def _load_given(model: ModelConfig, device: torch.device, given: Any, settings: TrainConfig) -> FrozenModel:
    """Take a model from Python or from a user's module, which is used as it is."""
    if not hasattr(given, "components"):  # no diffusers pipeline
        if model.engine != "eager" and getattr(given, "engine", None) is None:
            raise ValueError(f"--engine {model.engine} is for diffusers pipelines, not for a {type(given).__name__}")
        return as_frozen_model(given, device=device)
    return _on_engine(as_frozen_model(given, device=device, **_use_of(model, settings)), model, settings)


def _use_of(model: ModelConfig, settings: TrainConfig) -> dict[str, Any]:
    """Return the settings of a pipeline's use, in contrast to its loading: keyword arguments of the frozen pipeline."""
    learned_steps = max(settings.num_inference_steps)
    return {name: getattr(model, name) for name in _OF_USE} | {"learned_steps": learned_steps}


def _on_engine(frozen: FrozenModel, model: ModelConfig, settings: TrainConfig) -> FrozenModel:
    """Move the pipeline to the engine that the settings ask for."""
    if model.engine == "eager" and model.engine_dtype is None:
        return frozen
    from noisepolicy.engines import choose_engine, use_engine  # torch's exporter and more

    if model.engine != "auto":
        use_engine(frozen, model.engine, dtype=model.engine_dtype)
        return frozen
    choice = choose_engine(
        frozen,
        frozen.encode([""]),
        num_inference_steps=settings.num_inference_steps[0],
        guidance_scale=settings.guidance_scale,
    )
    print(choice, flush=True)
    return frozen


def _import_model(model: ModelConfig) -> Any:
    """Import the model that a user's module holds. Settings of loading would do nothing, and are refused."""
    for name in OF_LOADING:
        if getattr(model, name) != getattr(ModelConfig(), name):
            flag = settings_of(ModelConfig)[name].flag
            raise ValueError(f"{flag} is for models that are loaded by name; set it on {model.name} itself")
    return import_object(model.name, "model")


def find_object(config: TrainConfig, given: Given) -> tuple[Given, torch.device | None]:
    """Return the model that a user's module holds, if the settings name one, and the device of a model from Python.

    An object that says nothing of its device, and holds no weights, is taken to be on the CPU.

    Raises:
        ValueError: if the module or the object is not there.
    """
    if given.model is None and is_model_object(config.model.name):
        given = dataclasses.replace(given, model=_import_model(config.model))
    if given.model is None:
        return given, None
    if hasattr(given.model, "components"):  # a diffusers pipeline
        return given, torch.device(given.model.device)
    return given, as_frozen_model(given.model).device or torch.device("cpu")


def dtype_of(frozen: FrozenModel) -> str | None:
    """Return the data type that a diffusers pipeline's denoiser computes in, if it is one that a setting can name."""
    name = str(getattr(getattr(frozen, "denoiser", None), "dtype", "")).removeprefix("torch.")
    return name if name in settings_of(ModelConfig)["dtype"].choices else None


def as_reward(reward: Reward | Callable[..., Any], argument: str) -> Reward:
    """Make a `Reward` of a reward from Python; a function keeps its name.

    Raises:
        ValueError: if `reward` is neither a `Reward` nor a function.
    """
    if isinstance(reward, Reward):
        return reward
    if not callable(reward):
        raise ValueError(f"{argument} must be a reward's name, a function or a Reward, got {type(reward).__name__}")
    return Reward(getattr(reward, "__name__", type(reward).__name__), reward)


def reward_name(reward: Reward) -> str:
    """Return a reward's name in `config.yaml`."""
    return reward.spec or FROM_PYTHON + reward.name


def load_prompts(config: TrainConfig, given: Given, *, for_training: bool) -> tuple[Sequence[str], Sequence[str]]:
    """Load the prompts for training, where they are needed, and for evaluation.

    Raises:
        ValueError: if there are none, or they cannot be read.
    """
    world = find_world(config.model.name)
    has_prompts = bool(config.prompts) or given.prompts is not None
    has_eval_prompts = bool(config.evaluation.prompts) or given.eval_prompts is not None
    is_find = config.algorithm == "find"
    needs_training_prompts = for_training or not has_eval_prompts
    if world is None and not has_prompts and needs_training_prompts:
        raise ValueError(f"--model {config.model.name} needs --prompts: files or prompts; see docs/prompts.md")
    if is_find and not has_prompts:
        raise ValueError("--algorithm find needs --prompts: it learns each on its own")
    train: Sequence[str] = []
    if needs_training_prompts and has_prompts:
        train = given.prompts if given.prompts is not None else PromptList(config.prompts, config.prompt_column)
    elif needs_training_prompts:
        train = [scene.caption for scene in world.train_scenes()]
    if is_find and not for_training and given.eval_prompts is not None:
        return [], given.eval_prompts
    if is_find:
        train = _without_repeats(train)
        return train, train
    if given.eval_prompts is not None:
        return train, given.eval_prompts
    if config.evaluation.prompts:
        return train, PromptList(config.evaluation.prompts, config.prompt_column)
    if not has_prompts:
        return train, [scene.caption for scene in world.held_out_scenes()]
    return _hold_out(train) if config.evaluation.num_prompts else (train, [])


def _usable_eval_steps(config: TrainConfig, frozen: FrozenModel) -> tuple[int, ...]:
    """Return the step counts of the evaluation. Defaults that the model cannot work with are left out with a warning.

    Raises:
        ValueError: if the model cannot work with a step count that the user gave.
    """
    if config.evaluation.steps is not None:
        config.check_schedule(config.evaluation.steps)
        for steps in config.evaluation.steps:
            frozen.check_deterministic(steps, config.guidance_scale)
        return config.evaluation.steps
    if config.has_schedule:
        return config.num_inference_steps
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


def _without_repeats(prompts: Sequence[str]) -> list[str]:
    """Drop repeated texts, for FIND, which has one distribution for each text."""
    kept: dict[str, str] = {}
    for prompt in prompts:
        if identity(kept.setdefault(prompt, prompt)) != identity(prompt):
            raise ValueError(f"the prompt {str(prompt)!r} comes twice, with different metadata; FIND takes it once")
    return list(kept.values())


def _refuse_missing_objects(config: TrainConfig, given: Given) -> None:
    names = {
        "--model": [config.model.name] if given.model is None else [],
        "--reward": [config.reward or ""] if given.reward is None else [],
        "--eval-rewards": config.evaluation.rewards if given.eval_rewards is None else (),
    }
    for argument, texts in names.items():
        for text in texts:
            refuse_object(text, argument)


def refuse_object(name: str, argument: str) -> None:
    """Raise `ValueError` if settings name an object from Python, which cannot be loaded."""
    if name.startswith(FROM_PYTHON):
        keyword = argument.removeprefix("--").replace("-", "_")
        raise ValueError(
            f"this run was made in Python with {name.removeprefix(FROM_PYTHON)}, which cannot be loaded by its name; "
            f"give it again from Python: noisepolicy.resume(folder, {keyword}=...)"
        )


def _hold_out(prompts: PromptList) -> tuple[PromptList, PromptList]:
    """Split off a fifth of the user's prompts, at least one, for evaluation.

    The fifth has the smallest checksums, so it is the same in every run, whatever the order of the list, and a text
    that comes several times is never on both sides.
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
