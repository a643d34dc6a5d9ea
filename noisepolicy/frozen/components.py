"""The parts of a diffusers pipeline: where they are, what stands in for them, and a hash of their weights."""

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from noisepolicy.frozen.families import family_of
from noisepolicy.frozen.recording import timed, weights_digest

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_CONVOLUTIONAL = ("UNet2DConditionModel", "AutoencoderKL", "AutoencoderTiny")
"""Faster with channels last."""


class StandIn(torch.nn.Module):
    """A module in the place of a pipeline's denoiser or VAE, whose weights count for the model's hash as they were."""


class PipelineComponents:
    """A copy of a pipeline with components of its own choice.

    The pipeline itself stays as it is, but for its modules: they are shared, moved to `device`, set to evaluation and
    without gradients.

    Args:
        pipeline: of a class named in `families.FAMILIES`.
        device: where it runs.
        cpu_offload: keep on `device` only the component that runs.

    Raises:
        ValueError: if the pipeline is unsupported, or cannot be offloaded.
    """

    def __init__(self, pipeline: "DiffusionPipeline", device: torch.device, *, cpu_offload: bool) -> None:
        self._family = family_of(pipeline)
        for name in (self._family.denoiser, "vae", "scheduler", "text_encoder", "tokenizer"):
            if getattr(pipeline, name, None) is None:
                raise ValueError(f"the pipeline has no {name}")
        self.device = device
        self.engine = "eager"
        """What denoiser and decoder run on; `noisepolicy.engines.use_engine` changes it."""
        self._pipeline = copy.copy(pipeline)
        self._pipeline.scheduler = copy.deepcopy(pipeline.scheduler)  # it keeps state
        self._pipeline.set_progress_bar_config(disable=True)
        if getattr(pipeline, "safety_checker", None) is not None:
            # It would black out images which the reward then scores; the caller's own pipeline keeps its checker.
            self._pipeline.safety_checker = None
        self._vae_dtype = pipeline.vae.dtype
        self._digests: dict[str, str] = {}
        self._place(cpu_offload)

    @property
    def denoiser(self) -> torch.nn.Module:
        """The UNet or transformer, or what stands in for it."""
        return getattr(self._pipeline, self._family.denoiser)

    @property
    def vae(self) -> torch.nn.Module:
        """The autoencoder, or what stands in for it."""
        return self._pipeline.vae

    @property
    def upcasts_vae(self) -> bool:
        """Whether the pipeline decodes in float32 although the VAE's weights may be float16, which would overflow."""
        return self._family.upcasts_vae and bool(getattr(self.vae.config, "force_upcast", False))

    def replace(self, *, denoiser: torch.nn.Module | None = None, vae: torch.nn.Module | None = None) -> None:
        """Puts stand-ins in the place of components; those count for `weights_sha256` as they were.

        Raises:
            ValueError: if the components move between devices.
        """
        if hasattr(self.denoiser, "_hf_hook"):
            raise ValueError("cpu_offload moves the model's own modules; another engine cannot stand in for them")
        for name, module in ((self._family.denoiser, denoiser), ("vae", vae)):
            if module is not None:
                digest = self.component_sha256(name)
                setattr(self._pipeline, name, module)
                if isinstance(module, StandIn):
                    self._digests[name] = digest
                else:
                    self._digests.pop(name, None)
        self._vae_dtype = self.vae.dtype

    def component_sha256(self, name: str) -> str:
        """SHA-256 over the weights of a component, or of "denoiser"; where something stands in, the original's."""
        name = self._family.denoiser if name == "denoiser" else name
        return self._digests[name] if name in self._digests else weights_digest(getattr(self._pipeline, name))

    def drop_text_encoders(self) -> None:
        """Frees the text encoders and tokenizers; prompts that are encoded already go on working."""
        for name, part in self._pipeline.components.items():
            if name.startswith(("text_encoder", "tokenizer")):
                if isinstance(part, torch.nn.Module):
                    self._digests[name] = weights_digest(part)
                setattr(self._pipeline, name, None)
        self._pipeline.maybe_free_model_hooks()  # offloading's hooks hold them too
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def record_phases(self) -> Iterator[dict[str, float]]:
        """Fills a dict with the seconds spent in `denoiser` and `vae` while it is open. It waits for the device."""
        seconds = {"denoiser": 0.0, "vae": 0.0}
        with (
            timed(self.denoiser, "forward", seconds, "denoiser", self.device),
            timed(self.vae, "decode", seconds, "vae", self.device),
        ):
            yield seconds

    def weights_sha256(self) -> str:
        """SHA-256 over every parameter and buffer, by component and name; dropped components count as they were."""
        names = self._digests.keys() | self._modules().keys()
        digests = {name: self.component_sha256(name) for name in names}
        return hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()

    def _place(self, cpu_offload: bool) -> None:
        for module in self._modules().values():
            module.eval().requires_grad_(False)
        for module in (getattr(self._pipeline, "unet", None), self.vae):
            # Faster on a CPU; on an H100 a UNet of Stable Diffusion's size in float16 was a tenth slower for it.
            is_quantised = getattr(module, "hf_quantizer", None) is not None  # its weights have a layout of their own
            if self.device.type == "cpu" and type(module).__name__ in _CONVOLUTIONAL and not is_quantised:
                module.to(memory_format=torch.channels_last)
        if cpu_offload:
            if self.device.type == "cpu":
                raise ValueError("cpu_offload needs an accelerator; the device is cpu")
            self._pipeline.enable_model_cpu_offload(device=self.device)
        else:
            for name, module in self._modules().items():
                self._move(name, module)

    def _move(self, name: str, module: torch.nn.Module) -> None:
        try:
            module.to(self.device)
        except (ValueError, RuntimeError) as error:
            # bitsandbytes and Accelerate put modules where they are to stay, and refuse to move them.
            if any(tensor.device.type != self.device.type for tensor in module.parameters()):
                raise ValueError(f"the pipeline's {name} cannot be moved to {self.device}: {error}") from error

    def _modules(self) -> dict[str, torch.nn.Module]:
        components = self._pipeline.components.items()
        return {name: part for name, part in components if isinstance(part, torch.nn.Module)}
