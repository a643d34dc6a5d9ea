"""The settings of a training run. The command line, presets and `config.yaml` are all this dataclass."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import yaml
from tyro.constructors import PrimitiveConstructorSpec

from noisepolicy.rewards.registry import with_absolute_paths
from noisepolicy.storage import write_text
from noisepolicy.training.config_file import read_settings, shown, typed
from noisepolicy.training.recipes import RECIPES
from noisepolicy.worlds import WORLDS

StepCounts = Annotated[
    tuple[int, ...],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="N[,N...]",
        instance_from_str=lambda texts: tuple(int(text) for text in texts[0].split(",")),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(str, value))],
    ),
]
"""Denoising step counts; on the command line 1,2,4,8."""

DEFAULT_EVAL_STEPS = (1, 2, 4, 8, 16)
FROM_PYTHON = "python:"
"""Begins the name of a model or reward that was given as an object from Python, and which no command can load."""
_MAX_TIMEOUT_S = 10_000_000
_MAY_BE_INFINITE = ("target_kl", "kl_budget", "kl_training_budget", "max_log_ratio", "max_grad_norm")
"""Limits that infinity switches off."""


@dataclass
class TrainConfig:
    """What to train, on what, and how long."""

    model: str = "shapes"
    """The frozen model: 'shapes' or 'moving_shapes' (the embedded ones, pictures and clips), or a folder or hub id in
    diffusers' format."""
    reward: str | None = None
    """What is trained for: a name, a weighted sum ('0.7*pickscore + 0.3*aesthetic'), 'module:function' or an http(s)
    address; see docs/rewards.md. None is an embedded model's own."""
    normalize_rewards: Literal["each", "sum", "none"] = "each"
    """How rewards of different units are brought to one. 'each': every part of a weighted sum is divided by its own
    spread between images of a prompt, then weighted, so weights are shares. 'sum': the parts keep their units, and the
    weighted sum is divided by its spread. 'none': KL and variety are weighed against the reward in its own units."""
    eval_rewards: tuple[str, ...] = ()
    """Further rewards, measured in the final sweep only: those not trained for show whether the reward was hacked."""
    prompts: tuple[str, ...] = ()
    """Training prompts: files (text with one prompt a line, .jsonl, .json, .csv, .tsv, .parquet), datasets of the hub
    (hf:owner/name or hf:owner/name:split), or prompts themselves. A single word that ends like a file's name, as in
    prompts.txt, or starts like a path, as in ./prompts, is a file; docs/prompts.md has more. Embedded models bring
    theirs."""
    eval_prompts: tuple[str, ...] = ()
    """The same for the held-out prompts that the report is measured on. FIND has none: it learns its prompts alone.
    Default: a fifth of the training prompts, which are then not trained on."""
    prompt_column: str | None = None
    """The field or column that holds the prompt in files and datasets of records. Default: the first of prompt,
    prompts, caption, captions and text that is there."""
    output_dir: Path | None = None
    """The run folder; must not hold a run. Default: runs/ and the time."""
    height: int | None = None
    """Of the pictures, in pixels; None takes the model's own."""
    width: int | None = None
    """Of the pictures, in pixels; None takes the model's own."""
    num_frames: int | None = None
    """Of a video model's clips; None takes the model's own."""
    variant: str | None = None
    """Variant of the model's weight files, e.g. 'fp16'. A folder with files of a single variant needs none."""
    scheduler: str | None = None
    """A diffusers scheduler class, e.g. EulerDiscreteScheduler, made from the configuration of the model's own."""
    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = None
    """Of the scheduler; 'trailing' suits few steps."""
    negative_prompt: str | None = None
    """For models with classifier-free guidance; None is what the pipeline takes when it is given none."""
    max_sequence_length: int | None = None
    """Tokens of a prompt, for pipelines that let one choose; None takes the pipeline's own."""
    seed: int = 0
    """Of everything random: prompts, noise, initial weights."""
    device: str = "auto"
    """'auto' (CUDA where there is one, else CPU), 'cpu', 'cuda' or 'cuda:N'."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Of the frozen model; None is what `accelerate launch --mixed_precision` says, else float32. Latents, log-probs
    and the policy are float32 always."""

    denoiser: Literal["auto", "eager", "compile", "onnx", "openvino", "tensorrt", "tensorrt-rtx"] = "eager"
    """What runs the frozen model's denoiser and VAE decoder: PyTorch as it is or compiled, ONNX Runtime, OpenVINO on a
    CPU, TensorRT or TensorRT-RTX; exported once and cached. 'auto' measures those that run here, takes the fastest."""
    denoiser_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """What an exported denoiser computes in; None is `dtype`. OpenVINO has bfloat16, as fast as the CPU allows."""
    cuda_graph: bool = False
    """Replay the whole denoising loop as one CUDA graph for each batch size (Stable Diffusion and SDXL, on a GPU)."""
    vae_slicing: bool = False
    """Decode pictures one at a time, for memory."""
    vae_tiling: bool = False
    """Decode pictures in tiles, for memory."""
    cpu_offload: bool = False
    """Keep each part of the model on the accelerator only while it works (Accelerate's model offload)."""
    drop_text_encoders: bool = False
    """Encode every prompt of the run at the start and free the text encoders."""

    num_iterations: int | None = None
    """Iterations; each generates `batch_size` images."""
    batch_size: int | None = None
    """Images an iteration, over all processes. FIND's own: a group of every prompt."""
    group_size: int | None = None
    """Images of the same prompt in a batch; divides `batch_size`. At least 2 for `algorithm ppo`."""
    rollout_batch_size: int = 32
    """Images the frozen model makes at a time, at most: processes share a batch in an even number of such chunks."""
    overlap: bool = False
    """Score each chunk of images while the next is generated: for rewards that are slow, and elsewhere."""
    timeout: float = 1800.0
    """Seconds that a process waits for the others of its run before it gives up and names them."""
    num_inference_steps: StepCounts = (2,)
    """Denoising steps in training; several, as in 1,2,4,8, train one policy for all of them."""
    guidance_scale: float = 1.5
    """Classifier-free guidance of the frozen model; 1 and below turn it off."""

    algorithm: Literal["critic", "ppo", "find"] = "critic"
    """'critic': clipped PPO on what a reward critic left unexplained, beside the critic's own gradient.
    'ppo': plain Noise PPO with leave-one-out advantages.
    'find': FIND, a free mean and std for each prompt, which learns nothing of others. Settings left at None take the
    algorithm's own values."""
    policy: Literal["spectral", "dense"] | None = None
    """What the policy chooses: the noise's low frequencies, or every latent."""
    init_policy: Path | None = None
    """FIND: a run or a policy's folder to start from, with its action, its std, and its critic if it has one."""
    bands: int | None = None
    """Spectral policy: DCT frequencies per axis, at most the latents' extent."""
    std: Literal["power", "one", "learned"] | None = None
    """The policy's standard deviation: 'power' makes room for the mean, so the noise is as loud as the prior's; 'one';
    or 'learned'."""
    learning_rate: float | None = None
    """Of the policy (AdamW)."""
    average_decay: float | None = None
    """The policy that is kept is an exponential average of its weights over iterations; 0 keeps the last."""
    num_updates: int | None = None
    """Gradient steps on the policy an iteration, at most (see `target_kl`)."""
    clip_range: float | None = None
    """PPO's clip of the ratio, for log-probs summed over the action."""
    replay: int = 3
    """FIND: iterations whose images are used again."""
    max_log_ratio: float = 1.0
    """FIND: historical images whose log-ratio is further from 0 have left the trust region and are dropped."""
    gradient_accumulation_steps: int = 1
    """Parts of a batch that PPO's gradient is summed over, for memory; the step is the same but for rounding. With a
    critic, `critic_batch_size` samples of its own term are held at once too."""
    target_kl: float | None = None
    """Nats: an iteration's updates stop once KL(old policy, new policy) passes this; looked at before each."""
    kl_budget: float | None = None
    """Nats: how far the policy that is kept may be from N(0, I), on average over prompts and before the critic chooses;
    its shift is scaled down to this. More reward for more, less variety and less use at other step counts."""
    kl_training_budget: float | None = None
    """Nats: how far the policy may go in training, where its scale is free; the penalty adapts to it."""
    kl_coef: float | None = None
    """The penalty per nat of KL to the prior to start from, in spreads of the reward between images of a prompt."""
    diversity_target: float = 0.82
    """With a critic: the share of the base model's variety between pictures of one prompt, as the critic's sketches
    show it, that the policy in training is held to."""
    diversity_coef: float = 4.6
    """How many spreads of the reward a unit of that variety (root mean square of pixels in [0, 1]) is worth at the
    start; the value adapts to the target. 0 lets the policy give up variety for reward."""
    max_grad_norm: float = 1.0
    """Gradients of policy and critic are each clipped to this norm."""

    critic_updates: int = 22
    """Gradient steps on the reward critic an iteration."""
    critic_batch_size: int = 64
    """Samples of the history in each, and samples of the policy in the critic's term of the policy's loss."""
    critic_size: int = 2
    """Networks in the critic's ensemble; the policy ascends their mean minus their spread."""
    critic_learning_rate: float = 3e-3
    """Of the critic (AdamW)."""
    critic_weight_decay: float = 1e-2
    """Of the critic (AdamW)."""
    critic_warmup: int = 192
    """Images generated before the policy first moves."""
    num_candidates: int = 8
    """With a critic: noises that the finished policy draws for an image, of which the critic chooses one; only that one
    is denoised. 1 takes every draw as it comes."""

    eval_steps: StepCounts | None = None
    """Denoising steps of the final sweep. Default: those of 1,2,4,8,16 with which the model makes the same image from
    the same noise."""
    eval_num_prompts: int = 48
    """Held-out prompts in the sweep; 0 skips sweep and report."""
    eval_group_size: int = 8
    """Images of each, for the base model and the policy, from the same seeds. Best-of-n is measured within them."""
    checkpoint_every: int = 10
    """Iterations between checkpoints."""
    sample_every: int = 25
    """Iterations between sample grids."""
    license: str = ""
    """The policy's licence for its model card, as the hub writes it, e.g. 'apache-2.0'; empty leaves it out."""
    tensorboard: bool = False
    """Also write TensorBoard events to RUN/tensorboard (needs the extra 'tensorboard')."""

    def __post_init__(self) -> None:
        self.num_inference_steps = tuple(self.num_inference_steps)
        self.eval_steps = None if self.eval_steps is None else tuple(self.eval_steps)
        for name in ("eval_rewards", "prompts", "eval_prompts"):
            value = getattr(self, name)
            setattr(self, name, (str(value),) if isinstance(value, str | Path) else tuple(value))

    def resolved(self, num_prompts: int) -> "TrainConfig":
        """A copy with the algorithm's own values in place of None.

        Args:
            num_prompts: in training; FIND's batch is a group of each.
        """
        recipe = RECIPES[self.algorithm]
        values = {name: value for name, value in recipe.items() if getattr(self, name) is None}
        resolved = dataclasses.replace(self, **values)
        resolved.reward = resolved.reward or resolved.model
        resolved.dtype = resolved.dtype or "float32"
        if resolved.batch_size is None:
            resolved.batch_size = num_prompts * resolved.group_size
        return resolved

    def with_absolute_paths(self) -> "TrainConfig":
        """A copy that means the same in any working folder: files and folders that are there have their absolute path.

        Raises:
            ValueError: if a reward cannot be read.
        """
        return dataclasses.replace(
            self,
            model=self.model if self.model in WORLDS else _absolute(self.model, Path.exists),
            prompts=tuple(_absolute(source, Path.is_file) for source in self.prompts),
            eval_prompts=tuple(_absolute(source, Path.is_file) for source in self.eval_prompts),
            init_policy=None if self.init_policy is None else Path(_absolute(str(self.init_policy), Path.is_dir)),
            reward=None if self.reward is None else _absolute_reward(self.reward),
            eval_rewards=tuple(map(_absolute_reward, self.eval_rewards)),
        )

    @property
    def holds_out_prompts(self) -> bool:
        """Whether a fifth of `prompts` is kept from training, for the evaluation."""
        return bool(self.prompts and self.eval_num_prompts and not self.eval_prompts) and self.algorithm != "find"

    def check(self) -> None:
        """Raises ValueError for values that cannot work together."""
        for name, hint in get_type_hints(TrainConfig).items():
            options = [
                option for part in (hint, *get_args(hint)) if get_origin(part) is Literal for option in get_args(part)
            ]
            if options and (value := getattr(self, name)) is not None and value not in options:
                raise ValueError(f"{_flag(name)} must be one of {', '.join(options)}, got {value!r}")
        for name, value in vars(self).items():
            if isinstance(value, float) and (math.isnan(value) or (math.isinf(value) and name not in _MAY_BE_INFINITE)):
                raise ValueError(f"{_flag(name)} must be a finite number, got {value}")
        positive = (
            "num_iterations",
            "batch_size",
            "group_size",
            "rollout_batch_size",
            "bands",
            "learning_rate",
            "num_updates",
            "clip_range",
            "target_kl",
            "kl_budget",
            "kl_training_budget",
            "max_grad_norm",
            "critic_updates",
            "critic_batch_size",
            "critic_learning_rate",
            "num_candidates",
            "replay",
            "max_log_ratio",
            "eval_group_size",
            "checkpoint_every",
            "sample_every",
            "timeout",
            "gradient_accumulation_steps",
        )
        for name in positive:
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{_flag(name)} must be positive, got {value}")
        if self.timeout > _MAX_TIMEOUT_S:
            raise ValueError(f"--timeout must be at most {_MAX_TIMEOUT_S:,} seconds, got {self.timeout}")
        for name in ("seed", "eval_num_prompts", "critic_warmup", "critic_weight_decay", "diversity_coef", "kl_coef"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ValueError(f"{_flag(name)} must not be negative, got {value}")
        for name in ("num_inference_steps", "eval_steps"):
            steps = getattr(self, name)
            if steps is not None and (not steps or min(steps) < 1):
                raise ValueError(f"{_flag(name)} must be one or more positive step counts, got {list(steps)}")
        for name in ("height", "width", "num_frames", "max_sequence_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{_flag(name)} must be positive, got {value}")
        if not 0 <= self.diversity_target <= 1:
            raise ValueError(f"--diversity-target must be in [0, 1], got {self.diversity_target}")
        if self.average_decay is not None and not 0 <= self.average_decay < 1:
            raise ValueError(f"--average-decay must be in [0, 1), got {self.average_decay}")
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
            raise ValueError(
                f"--batch-size must be at least 2, got {batch_size}: an image is good or bad beside another one only"
            )
        if self.init_policy is not None and self.algorithm != "find":
            raise ValueError(f"--init-policy is for --algorithm find, not {self.algorithm}")
        if self.gradient_accumulation_steps > 1 and self.algorithm == "find":
            raise ValueError("--gradient-accumulation-steps is not for FIND, whose policy is a table, not a network")
        if self.eval_prompts and self.algorithm == "find":
            raise ValueError("FIND is measured on the prompts it was made for; no others can be given")
        if self.prompt_column is not None and not self.prompts and not self.eval_prompts:
            raise ValueError("--prompt-column names a column of --prompts or --eval-prompts; give one of them")
        if self.critic_size < 2:
            raise ValueError(f"--critic-size must be at least 2 (their spread is used), got {self.critic_size}")

    def save(self, path: Path) -> None:
        write_text(path, yaml.safe_dump(self.plain(), sort_keys=False))

    def plain(self) -> dict[str, Any]:
        """The settings as values that YAML and JSON know."""
        return {
            name: list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(self).items()
        }


def load_config(path: Path, base: TrainConfig | None = None) -> TrainConfig:
    """A YAML file's settings over `base`.

    Raises:
        ValueError: if the file is missing, is no YAML mapping, or has a key or value that is no setting's.
    """
    values = read_settings(path)
    known = {field.name: field for field in dataclasses.fields(TrainConfig)}
    if unknown := sorted(str(name) for name in set(values) - set(known)):
        raise ValueError(f"{path}: unknown setting {shown(unknown[0])}; see noisepolicy-train --help")
    return dataclasses.replace(base or TrainConfig(), **{name: _typed(name, v, path) for name, v in values.items()})


def _typed(name: str, value: Any, path: Path) -> Any:
    """Converts a YAML value to the setting's type."""
    default, hint = getattr(TrainConfig(), name), get_type_hints(TrainConfig)[name]
    options = (hint, *get_args(hint))
    lists = [option for option in options if get_origin(option) is tuple]
    if value is None and (default is None or lists):
        return default
    if lists:
        kind = get_args(lists[0])[0]
    elif default is None:
        kind = next((option for option in options if option in (int, float, Path)), str)
    else:
        kind = type(default)
    try:
        return typed(value, kind, is_list=bool(lists))
    except ValueError:
        wanted = repr(default) if default is not None else f"[{kind.__name__}]" if lists else kind.__name__
        raise ValueError(f"{path}: {name} must be like {wanted}, got {shown(value)}") from None


def _absolute(text: str, is_there: Callable[[Path], bool]) -> str:
    try:
        return str(Path(text).absolute()) if text and is_there(Path(text)) else text
    except OSError:  # a long prompt is no name of a file
        return text


def _absolute_reward(spec: str) -> str:
    return spec if spec.startswith(FROM_PYTHON) else with_absolute_paths(spec)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
