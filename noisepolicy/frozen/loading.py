"""Loading of diffusers pipelines from a folder or the hub. Every error is one line."""

import difflib
import importlib.util
import inspect
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import ConfigMixin, DiffusionPipeline, ModularPipeline, SchedulerMixin
from diffusers.utils import DummyObject
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from noisepolicy.frozen.lora import apply_loras, load_lora, split_scale
from noisepolicy.frozen.quantization import denoisers, quantization_configs
from noisepolicy.frozen.single_file import load_denoiser, published_config

_CONVOLUTIONAL = ("UNet2DConditionModel", "AutoencoderKL", "AutoencoderTiny")
"""Components that are faster with channels last."""
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that play no part in making an image from a prompt and latents."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(?:/.+)?", re.ASCII)
"""Pattern of a hub id, perhaps with a file in it."""
_INDEX = "model_index.json"
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:-\d+-of-\d+)?(?:\.(\w+))?(?:-\d+-of-\d+)?\.safetensors", re.ASCII
)
"""Pattern of the name of a weight file, with its variant."""


def load_pipeline(
    model: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    revision: str | None = None,
    single_file_config: str | None = None,
    denoiser_file: str | Path | None = None,
    scheduler: str | None = None,
    scheduler_options: Mapping[str, Any] | None = None,
    lora: Sequence[str] = (),
    fuse_lora: bool = False,
    quantize: str | None = None,
    quantize_parts: Sequence[str] = (),
    vae_slicing: bool = False,
    vae_tiling: bool = False,
) -> DiffusionPipeline:
    """Load a pipeline as `DiffusionPipeline.from_pretrained` does, from safetensors only and without safety checker.

    Args:
        model: a folder, a hub id, or a .safetensors file with all weights of a model. One that holds a pipeline of
            Modular Diffusers alone, whose blocks are in diffusers, will do.
        dtype: dtype of the weights.
        variant: variant of the weight files, e.g. "fp16". A folder with files of a single variant needs none.
        revision: branch, tag or commit of a hub id.
        single_file_config: folder or hub id with the configuration of a model that is a file. Default: the published
            model of its kind.
        denoiser_file: .safetensors or .gguf file with the weights of the denoiser, which replace the model's own.
        scheduler: name of a diffusers scheduler that replaces the model's, with the same settings.
        scheduler_options: settings of the scheduler by name, over those that it has.
        lora: LoRAs, each `PATH_OR_ID[:SCALE]`; see `lora.load_lora` for the places.
        fuse_lora: add the LoRAs to the weights.
        quantize: quantise components while they are loaded, `BACKEND[:TYPE]`, e.g. "torchao:int8_weight_only".
        quantize_parts: the components. Default: the denoiser, or both of two.
        vae_slicing: decode one image at a time, to save memory.
        vae_tiling: decode an image in tiles, to save memory.

    Raises:
        OSError: if there is no such model, it cannot be loaded, or the hub cannot be reached or refuses it; one line.
        ValueError: if the pipeline is unsupported, or an option does not apply to it; one line.
    """
    finish = {
        "scheduler_options": scheduler_options,
        "lora": lora,
        "fuse_lora": fuse_lora,
        "vae_slicing": vae_slicing,
        "vae_tiling": vae_tiling,
    }
    # The index comes first, so that an unsupported model is refused before its weights are fetched.
    is_file = Path(model).is_file()
    place = _config_of(Path(model), single_file_config) if is_file else model
    if single_file_config is not None and not is_file:
        raise ValueError(f"single_file_config is for a model that is a file, which {model} is not")
    if revision is not None and (is_file or Path(model).exists()):
        raise ValueError(f"revision is for hub ids, and {model} is here")
    version = {} if revision is None else {"revision": revision}
    if not is_file and _is_modular(model, **version):
        others = {
            "denoiser_file": denoiser_file,
            "scheduler": scheduler,
            "quantize": quantize,
            "quantize_parts": tuple(quantize_parts) or None,
        }
        if given := [name for name, value in others.items() if value is not None]:
            raise ValueError(f"{given[0]} does not go with {model}, which is a modular pipeline")
        pipeline = _load_modular(model, dtype=dtype, variant=variant, **version)
        return _finish(pipeline, **finish)
    name, index = _read_index(place, **version)
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    options: dict[str, Any] = {
        component: None for component in _unused(getattr(diffusers, name)) if component in parameters
    }
    if "requires_safety_checker" in parameters:
        options["requires_safety_checker"] = False
    replacement = None
    if scheduler is not None:
        replacement = _make_scheduler(scheduler, place, index["scheduler"][1], **version)
        # diffusers looks up the model's own class beside it, which this release may not have.
        options["scheduler"] = replacement if hasattr(diffusers, str(index["scheduler"][1])) else None
    if variant is None and Path(model).is_dir():
        variant = _only_variant(Path(model), index)
    if quantize is None and quantize_parts:
        raise ValueError("quantize_parts needs quantize (--quantize)")
    if is_file and (quantize is not None or variant is not None or denoiser_file is not None):
        raise ValueError("quantize, variant and denoiser_file do not go with a model that is a file")
    quantised = {} if quantize is None else quantization_configs(quantize, quantize_parts, index, dtype)
    if denoiser_file is not None:
        part = denoisers(index)[0]
        if part in quantised:
            raise ValueError(
                f"quantize does not reach a {part} from a file; name other parts with quantize_parts "
                "(--quantize-parts), or give a file that is quantised already"
            )
        with _one_line(denoiser_file, "denoiser"), quiet():
            options[part] = load_denoiser(
                Path(denoiser_file),
                index[part][1],
                config=str(model),
                subfolder=part,
                dtype=dtype,
                revision=revision,
            )
    if quantised:
        options["quantization_config"] = diffusers.PipelineQuantizationConfig(quant_mapping=quantised)
    with _one_line(model), quiet(), _whole_weights(), warnings.catch_warnings():
        # Newer releases call it `dtype`, older ones know only this name.
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
        if is_file:
            pipeline = getattr(diffusers, name).from_single_file(
                str(model), config=str(place), torch_dtype=dtype, **options
            )
        else:
            pipeline = DiffusionPipeline.from_pretrained(
                str(model), torch_dtype=dtype, variant=variant, use_safetensors=True, **version, **options
            )
    if replacement is not None:
        pipeline.scheduler = replacement if pipeline.scheduler is None else pipeline.scheduler
    return _finish(pipeline, **finish)


def _finish(
    pipeline: DiffusionPipeline,
    *,
    scheduler_options: Mapping[str, Any] | None,
    lora: Sequence[str],
    fuse_lora: bool,
    vae_slicing: bool,
    vae_tiling: bool,
) -> DiffusionPipeline:
    """Change what is loaded as `load_pipeline` was asked to."""
    if scheduler_options:
        pipeline.scheduler = _with_options(pipeline.scheduler, scheduler_options)
    _add_loras(pipeline, lora, fuse=fuse_lora)
    for is_wanted, method in ((vae_slicing, "enable_slicing"), (vae_tiling, "enable_tiling")):
        if is_wanted:
            if not hasattr(pipeline.vae, method):
                raise ValueError(f"the VAE {type(pipeline.vae).__name__} has no {method.removeprefix('enable_')}")
            getattr(pipeline.vae, method)()
    return pipeline


def _is_modular(model: str | Path, **version: str) -> bool:
    """Tell whether a folder or hub id holds a pipeline of Modular Diffusers alone."""
    if Path(model).is_dir():
        return not (Path(model) / _INDEX).exists() and (Path(model) / ModularPipeline.config_name).exists()
    if Path(model).exists() or not _HUB_ID.fullmatch(str(model)):
        return False
    with quiet(), suppress(Exception):  # its cause is told where the index is read
        ModularPipeline.load_config(str(model), **version)
        try:
            DiffusionPipeline.load_config(str(model), **version)
        except OSError:
            return True
    return False


def _load_modular(model: str | Path, *, dtype: torch.dtype, variant: str | None, **version: str) -> ModularPipeline:
    """Load a pipeline of Modular Diffusers whose blocks are in diffusers, and those components that it says where from.

    Raises:
        OSError: if it cannot be loaded; one line.
    """
    with _one_line(model), quiet(logging.CRITICAL), _whole_weights(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
        pipeline = ModularPipeline.from_pretrained(str(model), trust_remote_code=False, **version)
        for name in pipeline.pretrained_component_names:
            spec = pipeline.get_component_spec(name)
            if spec.pretrained_model_name_or_path is None:
                continue
            is_module = spec.type_hint is None or issubclass(spec.type_hint, torch.nn.Module)
            options = {"torch_dtype": dtype, "use_safetensors": True} if is_module else {}
            if variant is not None and is_module:
                options["variant"] = variant
            pipeline.register_components(**{name: spec.load(**options)})
    return pipeline


def load_vae(place: str, *, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """Load an autoencoder of any class from a folder or hub id, e.g. an `AutoencoderTiny`.

    Raises:
        OSError: if there is none, or it cannot be loaded; one line.
    """
    with _one_line(place, "VAE"), quiet(), _whole_weights(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
        name = diffusers.AutoencoderTiny.load_config(place).get("_class_name")
        kind = getattr(diffusers, str(name), None)
        if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin) and hasattr(kind, "decode")):
            raise ValueError(f"it is a {name}, which decodes nothing")
        vae = kind.from_pretrained(place, torch_dtype=dtype, use_safetensors=True)
    return vae.eval().requires_grad_(False).to(device)


def place_pipeline(pipeline: DiffusionPipeline, device: torch.device, *, cpu_offload: bool = False) -> None:
    """Prepare a pipeline that nobody else uses: evaluation mode, no gradients, on `device`, laid out for speed.

    Args:
        cpu_offload: Keep only the component that runs on `device`.

    Raises:
        ValueError: if the pipeline cannot be moved or offloaded.
    """
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    for name, module in modules.items():
        module.eval().requires_grad_(False)
        # Faster on a CPU; on an H100 a UNet of Stable Diffusion's size in float16 was a tenth slower for it.
        is_quantised = getattr(module, "hf_quantizer", None) is not None  # its weights have a layout of their own
        is_convolutional = name in ("unet", "vae") and type(module).__name__ in _CONVOLUTIONAL
        if device.type == "cpu" and is_convolutional and not is_quantised:
            module.to(memory_format=torch.channels_last)
    if cpu_offload:
        if device.type == "cpu":
            raise ValueError("cpu_offload needs an accelerator; the device is cpu")
        if isinstance(pipeline, ModularPipeline):
            raise ValueError("cpu_offload does not go with a modular pipeline; its ComponentsManager offloads")
        pipeline.enable_model_cpu_offload(device=device)
        return
    for name, module in modules.items():
        try:
            module.to(device)
        except (ValueError, RuntimeError) as error:
            # bitsandbytes and Accelerate put modules where they are to stay, and refuse to move them.
            if any(tensor.device.type != device.type for tensor in module.parameters()):
                raise ValueError(f"the pipeline's {name} cannot be moved to {device}: {error}") from error


def _config_of(model: Path, config: str | None) -> str:
    """Return the folder or hub id with the configuration of a single file, which must be a model's.

    Raises:
        OSError: if the file is no model, or its configuration cannot be had.
    """
    with _one_line(model):
        published = published_config(model)
    if config is not None:
        return config
    try:
        _read_index(published)
    except OSError as error:
        raise OSError(
            f"{model} seems to be of the kind of {published}, whose configuration is not here ({error}); give a folder "
            "in diffusers' format with single_file_config (--single-file-config FOLDER)"
        ) from error
    return published


def _read_index(model: str | Path, **version: str) -> tuple[str, dict[str, Any]]:
    """Read the pipeline's class and `model_index.json`, whose components are pairs of library and class.

    Raises:
        OSError: if there is no such model, or the index is malformed.
        ValueError: if the pipeline is unsupported.
    """
    with _one_line(model), quiet():
        index = DiffusionPipeline.load_config(str(model), **version)
    wrong = f"cannot load the model {model}: its model_index.json"
    if not isinstance(index, dict):
        raise OSError(f"{wrong} must hold a JSON object, not a {type(index).__name__}")
    name = index.get("_class_name")
    if isinstance(name, list):
        raise OSError(f"{wrong} names the class {name}, which is a pipeline with code of its own; that is never run")
    if not isinstance(name, str):
        raise OSError(f"{wrong} must name the pipeline's class under _class_name, got {name!r}")
    if not hasattr(diffusers, name):
        raise ValueError(f"diffusers {diffusers.__version__} has no {name}; install a newer release of diffusers")
    if "prompt" not in inspect.signature(getattr(diffusers, name).__call__).parameters:
        raise ValueError(f"unsupported pipeline {name}: it takes no prompt, and a policy is learned for prompts")
    optional = (*UNUSED, *getattr(diffusers, name)._optional_components)
    for component, parameter in inspect.signature(getattr(diffusers, name).__init__).parameters.items():
        entry = index.get(component)
        if component == "self" or parameter.default is not parameter.empty or (entry is None and component in optional):
            continue
        is_pair = isinstance(entry, list) and len(entry) == 2
        if not is_pair or not all(part is None or isinstance(part, str) for part in entry):
            raise OSError(f"{wrong} must give {component} as [library, class], got {entry!r}")
    return name, index


def _unused(kind: type) -> tuple[str, ...]:
    """Return the components that are not loaded. Pipelines that start from an image may look at it with the others."""
    return UNUSED[:1] if "image" in inspect.signature(kind.__call__).parameters else UNUSED


def _only_variant(folder: Path, index: dict[str, Any]) -> str | None:
    """Return the variant of a model folder's weight files, or None if there are plain files.

    Raises:
        ValueError: if there are several variants and no plain files.
    """
    variants = []
    for name, entry in index.items():
        if isinstance(entry, list) and name not in UNUSED:
            files = [_WEIGHTS.fullmatch(path.name) for path in (folder / name).glob("*.safetensors")]
            found = {match.group(1) for match in files if match}
            if found and None not in found:
                variants.append(found)
    if not variants:
        return None
    if len(common := set.intersection(*variants)) == 1:
        return common.pop()
    raise ValueError(
        f"the model folder {folder} has weights in the variants {', '.join(sorted(set.union(*variants)))}; "
        "choose one with variant (--variant)"
    )


def _make_scheduler(name: str, model: str | Path, own: str | None, **version: str) -> SchedulerMixin:
    """Make the named scheduler with the settings of the model's own, whose class need not be loadable.

    Raises:
        OSError: if the model's scheduler settings cannot be read.
        ValueError: if there is no such scheduler, or the model was not trained for it.
    """
    kind = getattr(diffusers, name, None)
    if isinstance(kind, DummyObject):
        raise ValueError(f"scheduler {name} needs packages that are not installed: {', '.join(kind._backends)}")
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin) and issubclass(kind, ConfigMixin)):
        raise ValueError(f"unknown scheduler {name}; expected a scheduler of diffusers, e.g. DDIMScheduler")
    with _one_line(model), quiet():
        config = kind.load_config(str(model), subfolder="scheduler", **version)
    try:
        with quiet():
            scheduler = kind.from_config(config)
    except Exception as error:
        raise ValueError(f"scheduler {name} cannot be made with the model's scheduler settings: {error}") from error
    # Its own settings alone: from_config keeps those it does not know in `config`, too.
    taken = inspect.signature(kind.__init__).parameters
    settings = {key: value for key, value in scheduler.config.items() if key in taken}
    theirs, ours = _process_of(str(own), config), _process_of(name, settings)
    if ours != theirs:
        raise ValueError(f"scheduler {name} does not fit the model: it is for {ours}, the model's {own} for {theirs}")
    prediction = config.get("prediction_type", "epsilon")
    if prediction != settings.get("prediction_type", "epsilon"):
        raise ValueError(f"scheduler {name} does not fit the model, whose prediction_type is {prediction!r}")
    return scheduler


def _add_loras(pipeline: DiffusionPipeline, loras: Sequence[str], *, fuse: bool) -> None:
    if not loras:
        if fuse:
            raise ValueError("fuse_lora needs a LoRA; give one with lora (--lora)")
        return
    strengths = {}
    for index, text in enumerate(loras):
        place, strengths[f"lora_{index}"] = split_scale(text)
        with _one_line(place, "LoRA"), quiet():
            load_lora(pipeline, place, f"lora_{index}")
    with _one_line(", ".join(loras), "LoRA"), quiet():
        apply_loras(pipeline, strengths, fuse=fuse)


def _with_options(scheduler: SchedulerMixin, options: Mapping[str, Any]) -> SchedulerMixin:
    """Copy a scheduler with other settings.

    Raises:
        ValueError: if the scheduler has no such setting, or cannot be made with these values.
    """
    kind = type(scheduler)
    known = [name for name in inspect.signature(kind.__init__).parameters if name not in ("self", "trained_betas")]
    for name in options:
        if name not in known:
            raise ValueError(unknown(f"scheduler {kind.__name__} has no setting", name, known))
    try:
        with quiet():
            return kind.from_config(scheduler.config, **options)
    except Exception as error:  # schedulers check little, and raise almost anything
        wanted = ", ".join(f"{name} {value!r}" for name, value in options.items())
        raise ValueError(f"scheduler {kind.__name__} cannot be made with {wanted}: {error}") from error


def unknown(what: str, name: str, known: Sequence[str]) -> str:
    """Return the message that there is nothing of this name, with similar names, or else all names."""
    near = difflib.get_close_matches(name, known, n=3)
    return f"{what} {name!r}; " + (f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}")


def _process_of(name: str, config: Mapping[str, Any]) -> str:
    """Return the process from noise to image that a scheduler follows. A model is trained for one of them."""
    if "Inverse" in name:
        return "the way from images to noise"
    is_flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    if is_flow or name.startswith("FlowMatch"):
        return "flow matching"
    if "beta_schedule" in config or "beta_start" in config:
        return "diffusion with a schedule of betas"
    return f"{name} alone"


@contextmanager
def quiet(level: int = logging.ERROR) -> Iterator[None]:
    """Leave only what is as grave as `level` in the logs of diffusers and transformers."""
    # The handlers' levels, not the loggers': changing those empties a cache of every logger of the process.
    handlers = [handler for name in ("diffusers", "transformers") for handler in logging.getLogger(name).handlers]
    levels = [handler.level for handler in handlers]
    for handler in handlers:
        handler.setLevel(level)
    try:
        yield
    finally:
        for handler, level in zip(handlers, levels, strict=True):
            handler.setLevel(level)


@contextmanager
def _whole_weights() -> Iterator[None]:
    """Refuse a component whose files lack some of its weights, e.g. files in the layout of another release.

    diffusers and transformers give such weights random values and log a warning. They report missing weights to
    callers that ask for it. `DiffusionPipeline` does not ask, so this context replaces the method that it calls.
    """
    originals = {kind: vars(kind)["from_pretrained"] for kind in (diffusers.ModelMixin, transformers.PreTrainedModel)}

    def checked(original: Callable[..., Any]) -> Any:
        def from_pretrained(cls: type, path: str | Path, *args: Any, **kwargs: Any) -> Any:
            component, info = original(cls, path, *args, output_loading_info=True, **kwargs)
            tensors = component.state_dict(keep_vars=True)
            # Older releases of transformers leave some of them out of the list, without memory.
            missing = {*info["missing_keys"], *(name for name, tensor in tensors.items() if tensor.is_meta)}
            loaded = {id(tensor) for name, tensor in tensors.items() if name not in missing}
            # Weights that are tied to others need not be in the files.
            if missing := sorted(name for name in missing if id(tensors.get(name)) not in loaded):
                raise ValueError(
                    f"the files of its {Path(path).name} lack {len(missing)} of the {len(tensors)} weights of "
                    f"{cls.__name__}, e.g. {missing[0]}; they are incomplete, or were saved by a release of "
                    f"{cls.__module__.split('.')[0]} that names them differently"
                )
            return component

        return classmethod(from_pretrained)

    for kind, original in originals.items():
        kind.from_pretrained = checked(original.__func__)
    try:
        yield
    finally:
        for kind, original in originals.items():
            kind.from_pretrained = original


@contextmanager
def _one_line(place: str | Path, what: str = "model") -> Iterator[None]:
    """Turn errors of loading into an `OSError` of one line. `what` is loaded from `place`."""
    try:
        yield
    except Exception as error:  # a damaged model makes the libraries raise almost anything
        raise OSError(_explain(str(place), what, error)) from error


def _explain(place: str, what: str, error: Exception) -> str:
    causes: list[BaseException] = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    # GatedRepoError first: it is a RepositoryNotFoundError.
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return f"{what} {place} is gated: accept its terms on https://huggingface.co/{place} and run 'hf auth login'"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return f"there is no {what} {place} on the hub, or it is private: check the spelling or run 'hf auth login'"
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError | AttributeError | TypeError | IndexError):
        reason = f"{type(error).__name__}: {reason}"  # its text alone says little
    # transformers asks for tiktoken then, which cannot read such a file.
    needed = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
    missing = [package for module, package in needed.items() if not _is_installed(module)]
    if missing and re.search("tiktoken|sentencepiece|protobuf", reason, re.IGNORECASE):
        reason = f"its tokenizer needs packages that are not installed: pip install {' '.join(missing)}"
    if Path(place).exists():
        return f"cannot load the {what} {'folder ' if Path(place).is_dir() else ''}{place}: {reason}"
    if Path(place).is_absolute() or place.startswith(".") or not _HUB_ID.fullmatch(place):
        return f"there is no {what} {'folder ' if what == 'model' else ''}{place}"
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return f"{what} {place} is neither a folder nor downloaded, and HF_HUB_OFFLINE is set"
    if any(isinstance(cause, LocalEntryNotFoundError) for cause in causes):
        return f"{what} {place} is neither a folder nor downloaded, and the hub cannot be reached: check the network"
    return f"{what} {place} is not a folder and cannot be fetched from the hub: {reason}"


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it is part of is not there
        return False
