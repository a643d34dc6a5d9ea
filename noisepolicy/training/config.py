"""The settings of a training run. The command line, presets, `config.yaml` and `noisepolicy.train` all fill them."""

import math
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from noisepolicy.frozen.config import ModelConfig
from noisepolicy.named_objects import with_absolute_folder
from noisepolicy.policies.loading import MAX_CANDIDATES
from noisepolicy.rewards.registry import with_absolute_paths
from noisepolicy.settings import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_OR_INFINITE,
    Bounds,
    Flat,
    Group,
    find_setting,
    flat_values,
    plain_values,
    with_names,
    with_settings,
)
from noisepolicy.storage import write_text
from noisepolicy.training.config_file import read_settings
from noisepolicy.worlds import WORLDS

_PRESETS = Path(__file__).parent.parent / "presets"
_SCHEDULES = ("timesteps", "sigmas")
"""Arguments of a pipeline's call that take the place of its number of steps."""
_EVAL_EVERY = 10
DEFAULT_EVAL_STEPS = (1, 2, 4, 8, 16)
FROM_PYTHON = "python:"
"""Prefix of the name of a model or reward that was given as a Python object, which no command can load."""
RENAMED = {
    "denoiser": "engine",
    "denoiser_dtype": "engine_dtype",
    "timestep_spacing": "scheduler.timestep_spacing",
}
"""Former names of settings, and their names of today."""

RECIPES: dict[str, dict[str, Any]] = {
    "critic": {
        "policy": "spectral",
        "bands": 8,
        "std": "power",
        "num_iterations": 125,
        "batch_size": 96,
        "group_size": 2,
        "learning_rate": 2e-3,
        "average_decay": 0.95,
        "num_updates": 8,
        "target_kl": 1.0,
        "kl_budget": 5.5,
        "kl_training_budget": 30.0,
        "kl_coef": 4e-3,
    },
    "ppo": {
        "policy": "spectral",
        "bands": 8,
        "std": "power",
        "num_iterations": 300,
        "batch_size": 96,
        "group_size": 8,
        "learning_rate": 2e-3,
        "average_decay": 0.95,
        "num_updates": 8,
        "clip_range": 1.0,
        "target_kl": 0.3,
        "kl_budget": 60.0,
        "kl_training_budget": 160.0,
        "kl_coef": 4e-3,
    },
    "find": {
        "policy": "dense",
        "bands": 8,
        "std": "power",
        "num_iterations": 20,
        "group_size": 20,
        "learning_rate": 0.9,
        "average_decay": 0.0,
        "num_updates": 1,
        "clip_range": 0.2,
        "target_kl": math.inf,
        "kl_budget": math.inf,
        "kl_training_budget": math.inf,
        "kl_coef": 0.0,
    },
}
"""Values of the settings that are left at None, by algorithm: each algorithm's own best."""


@dataclass(frozen=True)
class CriticConfig:
    """Settings of the reward critic of `algorithm="critic"`."""

    updates: Annotated[int, COUNT] = 26
    """Gradient steps on the reward critic in an iteration."""
    batch_size: Annotated[int, Bounds(at_least=2)] = 32
    """Samples of the history in each gradient step on the critic."""
    size: Annotated[int, Bounds(at_least=2)] = 3
    """Networks in the critic's ensemble. The policy ascends their mean minus their spread."""
    learning_rate: Annotated[float, POSITIVE] = 3e-3
    """Learning rate of the critic (AdamW; Muon, which teaches the sketch's convolutions, has 16 times as much)."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.1
    """Weight decay of the critic."""
    warmup: Annotated[int, NOT_NEGATIVE] = 192
    """Images that are generated before the policy first moves."""


@dataclass(frozen=True)
class EvalConfig:
    """Settings of the evaluation that ends a run: base model and policy from the same seeds, at several step counts."""

    steps: Annotated[tuple[int, ...] | None, COUNT] = None
    """Step counts of the evaluation. Default: those of 1,2,4,8,16 at which the model makes the same image from the
    same noise."""
    num_prompts: Annotated[int, NOT_NEGATIVE] = 48
    """Largest number of held-out prompts that are evaluated. 0 skips the evaluation."""
    group_size: Annotated[int, COUNT] = 8
    """Images of each held-out prompt, for the base model and for the policy. Best-of-n is measured within them."""
    prompts: tuple[str, ...] = ()
    """Held-out prompts for the evaluation, given like `prompts`. FIND has none, for it learns each prompt on its own.
    Default: a fifth of the training prompts, which are then not trained on."""
    rewards: tuple[str, ...] = ()
    """Further rewards that the evaluation measures. Rewards that were not trained for show reward hacking."""
    every: Annotated[int | None, NOT_NEGATIVE] = None
    """Iterations between short evaluations in training: two images of each held-out prompt, whose mean rewards are
    metrics. 0 evaluates at the end only. Default: 10 with `stop_on`, else 0."""


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run."""

    model: Annotated[ModelConfig, Group("Model"), Flat("")] = field(default_factory=ModelConfig)
    reward: Annotated[str | None, Group("Reward")] = None
    """Reward to train for: a name, a weighted sum ('0.7*pickscore + 0.3*aesthetic'), 'module:function' or an http(s)
    address; see docs/rewards.md. Default: an embedded model's own."""
    normalize_rewards: Literal["each", "sum", "none"] = "each"
    """How rewards of different units are combined. 'each': every part of a weighted sum is divided by its own
    spread between images of a prompt, then weighted, so weights are shares. 'sum': the parts keep their units, and the
    weighted sum is divided by its spread. 'none': KL and variety are weighed against the reward in its own units."""
    prompts: Annotated[tuple[str, ...], Group("Prompts")] = ()
    """Training prompts: files (text with one prompt a line, .jsonl, .json, .csv, .tsv, .parquet), datasets of the hub
    (hf:owner/name or hf:owner/name:split), or prompts themselves. A single word that ends like a file's name, as in
    prompts.txt, or starts like a path, as in ./prompts, is a file; see docs/prompts.md. Default: an embedded model's
    own."""
    prompt_column: str | None = None
    """Column that holds the prompt in files and datasets of records. Default: the first of prompt, prompts, caption,
    captions and text that is there."""
    policy: Annotated[Literal["spectral", "dense"] | None, Group("Policy")] = None
    """Part of the noise that the policy chooses: its low frequencies ('spectral'), or every latent ('dense')."""
    bands: Annotated[int | None, COUNT] = None
    """DCT frequencies per axis of the spectral policy, at most the latents' extent."""
    std: Literal["power", "one", "learned"] | None = None
    """Standard deviation of the policy: 'power' shrinks it as the mean grows, so that the noise stays as loud as
    ordinary noise; 'one' keeps it at 1; 'learned' lets the network choose it."""
    num_candidates: Annotated[int, Bounds(at_least=1, at_most=MAX_CANDIDATES)] = 256
    """Starts that the finished policy draws for an image if it has a critic, which chooses one of them. Only that one
    is denoised. 1 leaves the critic out of the policy."""
    kl_budget: Annotated[float | None, POSITIVE_OR_INFINITE] = None
    """Largest KL of the finished policy from N(0, I), in nats, on average over prompts and before the critic chooses.
    More nats buy more reward for less variety and less use at other step counts. A finished run can be resumed with
    another budget: nothing is trained anew."""
    init_policy: Path | None = None
    """Run or policy folder that FIND starts from. FIND then uses that policy's action, standard deviation and
    critic."""
    algorithm: Annotated[Literal["critic", "ppo", "find"], Group("Training")] = "critic"
    """Training algorithm. 'critic': a critic learns to foresee the reward from the noise, and the policy follows its
    gradient. 'ppo': Noise PPO with leave-one-out advantages, no critic. 'find': FIND, a free mean and std for each
    prompt, which generalises to no others. Settings that are not given take the algorithm's own values."""
    num_inference_steps: Annotated[tuple[int, ...], COUNT] = (2,)
    """Denoising steps in training. Several, as in 1,2,4,8, train one policy for all of them."""
    guidance_scale: float = 1.5
    """Scale of the frozen model's classifier-free guidance. 1 and below turn it off."""
    num_iterations: Annotated[int | None, COUNT] = None
    """Training iterations. Each generates `batch_size` images."""
    batch_size: Annotated[int | None, COUNT] = None
    """Images in an iteration, over all processes. FIND's default: a group for every prompt."""
    group_size: Annotated[int | None, COUNT] = None
    """Images of the same prompt in a batch. It divides `batch_size`, and is at least 2 without a critic."""
    learning_rate: Annotated[float | None, POSITIVE] = None
    """Learning rate of the policy (AdamW)."""
    num_updates: Annotated[int | None, COUNT] = None
    """Largest number of gradient steps on the policy in an iteration (see `target_kl`)."""
    clip_range: Annotated[float | None, POSITIVE] = None
    """Clip range of the ratio, for PPO and FIND. Log-probs are summed over the action."""
    target_kl: Annotated[float | None, POSITIVE_OR_INFINITE] = None
    """KL(old policy, new policy) in nats at which an iteration's gradient steps stop."""
    kl_training_budget: Annotated[float | None, POSITIVE_OR_INFINITE] = None
    """Largest KL of the policy in training from N(0, I), in nats, on average over a batch's prompts. The policy's
    output is scaled back to it."""
    kl_coef: Annotated[float | None, NOT_NEGATIVE] = None
    """KL penalty per nat, in spreads of the reward between images of a prompt."""
    diversity_target: Annotated[float, Bounds(at_least=0, at_most=1)] = 0.82
    """Share of the base model's variety between images of one prompt that training keeps, measured on the critic's
    sketches."""
    diversity_coef: Annotated[float, NOT_NEGATIVE] = 4.6
    """Weight of variety at the start of training: spreads of the reward for one unit of variety (root mean square
    difference of pixels in [0, 1]). It adapts to `diversity_target`. 0 lets the policy give up variety for reward."""
    average_decay: Annotated[float | None, Bounds(at_least=0, below=1)] = None
    """Decay of the average of the policy's weights over iterations, which is the finished policy. 0 keeps the last
    weights."""
    max_grad_norm: Annotated[float, POSITIVE_OR_INFINITE] = 1.0
    """Norm to which the gradients of policy and critic are each clipped."""
    replay: Annotated[int, COUNT] = 3
    """Number of latest iterations whose images FIND learns from."""
    max_log_ratio: Annotated[float, POSITIVE_OR_INFINITE] = 1.0
    """FIND drops images of earlier iterations whose log-ratio is further from 0 than this."""
    gradient_accumulation_steps: Annotated[int, COUNT] = 1
    """Parts into which an update is cut, to save memory or to share it among as many processes. It is cut further where
    a part would have more than 96 rows."""
    overlap: bool = False
    """Score each chunk of images while the next is generated, for rewards that are slow and run elsewhere."""
    seed: Annotated[int, NOT_NEGATIVE] = 0
    """Seed of everything random: prompts, noise, initial weights."""
    timeout: Annotated[float, Bounds(above=0, at_most=10_000_000)] = 1800.0
    """Seconds that a process waits for the others of its run before it gives up and names them."""
    critic: Annotated[CriticConfig, Group("Critic"), Flat("critic_")] = field(default_factory=CriticConfig)
    evaluation: Annotated[EvalConfig, Group("Evaluation"), Flat("eval_")] = field(default_factory=EvalConfig)
    stop_on: str | None = None
    """The reward, or one of `eval_rewards`, that ends the training: when three short evaluations in a row find it no
    higher than before. The finished policy is then the one for which it was highest."""
    output_dir: Annotated[Path | None, Group("Output")] = None
    """Run folder, which must not hold a run. Default: a new folder in runs/, named by the time."""
    checkpoint_every: Annotated[int, COUNT] = 10
    """Iterations between checkpoints."""
    sample_every: Annotated[int, COUNT] = 25
    """Iterations between sample images."""
    license: str = ""
    """Licence of the policy for its model card, as the hub writes it, e.g. 'apache-2.0'."""
    trackers: tuple[str, ...] = ()
    """Trackers that follow the run, by Accelerate's names: tensorboard (in RUN/tensorboard), trackio, wandb, mlflow,
    comet_ml, aim, clearml, dvclive, swanlab. Their packages must be installed."""
    tensorboard: bool = False
    """Short for 'tensorboard' among the trackers (needs the extra 'tensorboard')."""

    @classmethod
    def of(cls, **settings: Any) -> "TrainConfig":
        """Make a config from settings by flat names, e.g. `TrainConfig.of(model="me/model", critic_updates=30)`.

        Raises:
            ValueError: if there is no such setting, or a value does not fit it.
        """
        return cls().replace(**settings)

    def replace(self, **settings: Any) -> "TrainConfig":
        """Copy the config with other settings, by their flat names. Raises as `of`."""
        return with_settings(self, **settings)

    def resolved(self, num_prompts: int) -> "TrainConfig":
        """Copy the config with the algorithm's own values in place of None.

        Args:
            num_prompts: Number of training prompts; FIND's batch is a group of each.
        """
        values = {name: value for name, value in RECIPES[self.algorithm].items() if getattr(self, name) is None}
        if "kl_budget" in values and self.kl_training_budget is not None and self.algorithm != "find":
            values["kl_budget"] = min(values["kl_budget"], self.kl_training_budget)
        values["reward"] = self.reward or self.model.name
        values["dtype"] = self.model.dtype or "float32"
        if self.evaluation.every is None:
            values["eval_every"] = 0 if self.stop_on is None else _EVAL_EVERY
        resolved = self.replace(**values)
        if resolved.batch_size is None:
            resolved = resolved.replace(batch_size=num_prompts * resolved.group_size)
        return resolved

    def with_absolute_paths(self) -> "TrainConfig":
        """Copy the config with absolute paths of files and folders, so that it means the same in any working folder.

        Raises:
            ValueError: if a reward cannot be read.
        """
        named = {self.reward, *self.evaluation.rewards} - {None}
        return self.replace(
            model=_absolute_model(self.model.name),
            single_file_config=_absolute(self.model.single_file_config, Path.is_dir),
            denoiser_file=_absolute(self.model.denoiser_file, Path.is_file),
            rollout_vae=_absolute(self.model.rollout_vae, Path.is_dir),
            lora=tuple(_absolute_lora(text) for text in self.model.lora),
            prompts=tuple(_absolute(source, Path.is_file) for source in self.prompts),
            eval_prompts=tuple(_absolute(source, Path.is_file) for source in self.evaluation.prompts),
            init_policy=None if self.init_policy is None else _absolute(str(self.init_policy), Path.is_dir),
            reward=None if self.reward is None else _absolute_reward(self.reward),
            eval_rewards=tuple(map(_absolute_reward, self.evaluation.rewards)),
            stop_on=_absolute_reward(self.stop_on) if self.stop_on in named else self.stop_on,
        )

    @property
    def all_trackers(self) -> tuple[str, ...]:
        """Names of the trackers, each once."""
        return tuple(dict.fromkeys((*self.trackers, *(["tensorboard"] if self.tensorboard else []))))

    @property
    def has_schedule(self) -> bool:
        """Whether `call` fixes the steps."""
        return any(self.model.call.get(name) is not None for name in _SCHEDULES)

    @property
    def holds_out_prompts(self) -> bool:
        """Whether a fifth of `prompts` is kept from training, for the evaluation."""
        evaluation = self.evaluation
        return bool(self.prompts and evaluation.num_prompts and not evaluation.prompts) and self.algorithm != "find"

    def check(self) -> None:
        """Raise ValueError for values that do not fit their setting, or that cannot work together."""
        with_settings(self, **flat_values(self))
        recipe = RECIPES[self.algorithm]
        group_size = self.group_size or recipe["group_size"]
        batch_size = self.batch_size or recipe.get("batch_size", group_size)
        if batch_size % group_size:
            raise ValueError(f"--group-size {group_size} must divide --batch-size {batch_size}")
        if (parts := self.gradient_accumulation_steps) > batch_size:
            raise ValueError(f"--gradient-accumulation-steps {parts} is more than the {batch_size} images of a batch")
        if self.algorithm != "critic" and group_size < 2:
            raise ValueError(
                f"--algorithm {self.algorithm} compares images of one prompt: --group-size must be at least 2, got 1"
            )
        if batch_size < 2:
            raise ValueError(f"--batch-size must be at least 2, got {batch_size}: images are compared with one another")
        if self.init_policy is not None and self.algorithm != "find":
            raise ValueError(f"--init-policy is for --algorithm find, not {self.algorithm}")
        if self.gradient_accumulation_steps > 1 and self.algorithm == "find":
            raise ValueError("--gradient-accumulation-steps is for the algorithms critic and ppo, not for find")
        ceiling = self.kl_training_budget or recipe["kl_training_budget"]
        if self.kl_budget is not None and ceiling < self.kl_budget < math.inf and self.algorithm != "find":
            raise ValueError(
                f"--kl-budget {self.kl_budget:g} is more than the policy comes to in training: give "
                f"--kl-training-budget, which is {ceiling:g}, a value at least as large"
            )
        if self.evaluation.prompts and self.algorithm == "find":
            raise ValueError("FIND is measured on the prompts it was made for; it takes no --eval-prompts")
        self.check_schedule((*self.num_inference_steps, *(self.evaluation.steps or ())))
        if self.stop_on is not None and self.evaluation.every == 0:
            raise ValueError("--stop-on needs evaluations in training: --eval-every must not be 0")
        if self.prompt_column is not None and not self.prompts and not self.evaluation.prompts:
            raise ValueError("--prompt-column names a column of --prompts or --eval-prompts; give one of them")

    def check_schedule(self, step_counts: Iterable[int]) -> None:
        """Raise ValueError if `call` holds timesteps or sigmas for another number of steps."""
        for name in _SCHEDULES:
            schedule = self.model.call.get(name)
            if schedule is None:
                continue
            if not isinstance(schedule, list):
                raise ValueError(f"--call.{name} must be a list, as in [{schedule}], got {reprlib.repr(schedule)}")
            # Some schedulers also take the end of the last step.
            if other := [number for number in step_counts if number not in (len(schedule), len(schedule) - 1)]:
                raise ValueError(
                    f"--call.{name} has {len(schedule)} values, and so many steps are made at any step count: "
                    f"{other[0]} steps would be others in name only"
                )

    def save(self, path: Path) -> None:
        """Write the settings as YAML, atomically."""
        write_text(path, yaml.safe_dump(self.plain(), sort_keys=False))

    def plain(self) -> dict[str, Any]:
        """Return the settings by their flat names, as values that YAML and JSON know."""
        return plain_values(self)


def load_config(path: Path) -> TrainConfig:
    """Read settings from a YAML file; the others keep their defaults.

    Raises:
        ValueError: if the file is missing, is no YAML mapping, or has a key or value that is no setting's.
    """
    read = read_settings(path).items()
    values = {RENAMED.get(name, name): value for name, value in read if value is not None or name not in RENAMED}
    found = {name: find_setting(TrainConfig, name) for name in values}
    if unknown := [name for name, setting in found.items() if setting is None]:
        raise ValueError(f"{path}: unknown setting {reprlib.repr(unknown[0])}; see noisepolicy-train --help")
    # A setting that is left empty, and may not be, keeps its default. An option may always be None.
    given = {
        name: value
        for name, value in values.items()
        if value is not None or found[name].is_optional or found[name].name != name
    }
    try:
        return TrainConfig.of(**given)
    except ValueError as error:
        raise ValueError(f"{path}: {with_names(TrainConfig, str(error))}") from error


def preset_names() -> list[str]:
    """Return the names of the presets that come with the package."""
    return sorted(path.stem for path in _PRESETS.glob("*.yaml"))


def load_preset(name: str) -> TrainConfig:
    """Return the settings of a preset.

    Raises:
        ValueError: if there is none of this name.
    """
    if name not in preset_names():
        raise ValueError(f"unknown preset {name!r}; choose from {', '.join(preset_names())}")
    return load_config(_PRESETS / f"{name}.yaml")


def is_model_object(name: str) -> bool:
    """Tell whether a model's name is `module:object`, an object of a Python module."""
    return ":" in name and not name.startswith(FROM_PYTHON) and not Path(name).exists()


def _absolute_model(name: str) -> str:
    if name in WORLDS:
        return name
    return with_absolute_folder(name) if is_model_object(name) else _absolute(name, Path.exists)


def _absolute(text: str | None, is_there: Callable[[Path], bool]) -> str | None:
    try:
        return str(Path(text).absolute()) if text and is_there(Path(text)) else text
    except OSError:  # a long prompt is no name of a file
        return text


def _absolute_lora(text: str) -> str:
    place, colon, scale = (text, "", "") if Path(text).exists() else text.rpartition(":")
    return _absolute(place or text, Path.exists) + (colon + scale if place else "")


def _absolute_reward(spec: str) -> str:
    return spec if spec.startswith(FROM_PYTHON) else with_absolute_paths(spec)
