"""Attaching a policy to somebody's diffusers pipeline: every call then starts from learned noise.

    noisepolicy.attach(pipe, policy)
    pipe("a dog and a cat", seed=7).images
    noisepolicy.detach(pipe)

The pipeline becomes of a subclass of its own class, made here, whose `__call__` hands the policy's latents to the
class's own. A modular pipeline runs its own blocks with a `LearnedNoiseStep` among them. Nothing else of the pipeline
changes.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import noisepolicy
from noisepolicy.policies.base import NoisePolicy

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_SIZES = ("height", "width", "num_frames", "max_sequence_length")


def attach(
    pipeline: "DiffusionPipeline",
    policy: NoisePolicy | str | Path,
    *,
    num_candidates: int | None = None,
    variety: float = 0.0,
) -> "DiffusionPipeline":
    """Let every call of a pipeline start from a policy's latents, until `detach`.

    The pipeline's call then takes `seed` and `index` too, as `NoisePolicy.latents` does; what a sampler draws between
    steps follows them as well. Without a seed, one is drawn from the call's `generator`, or else from torch's own. A
    call with `latents` starts from these.

    Args:
        pipeline: A pipeline of diffusers or of Modular Diffusers. A policy that is attached already is replaced.
        policy: The policy, its folder, its run's folder or its hub id.
        num_candidates: Number of starts that the critic chooses among. Default: the policy's own.
        variety: How much the pictures of a prompt are to differ, from 0 to 1; see `NoisePolicy.latents`.

    Returns:
        The same pipeline.

    Raises:
        ValueError: if it is no pipeline with a prompt, or does not take latents.
    """
    from noisepolicy.frozen.base import row_seeds
    from noisepolicy.frozen.calling import call_parameters, unattached_class

    kind = unattached_class(pipeline)
    if not isinstance(policy, NoisePolicy):
        policy = noisepolicy.load(policy)
    if hasattr(kind, "blocks"):
        return _become(pipeline, _modular_class(kind, pipeline.blocks, policy, num_candidates, variety))
    defaults, signature = call_parameters(kind), inspect.signature(kind.__call__)
    for name in ("prompt", "latents"):
        if name not in defaults:
            raise ValueError(f"the call of {kind.__name__} takes no {name}, so no policy can be attached to it")

    class Attached(kind):
        unattached_class = kind

        def __call__(
            self, *args: Any, seed: int | None = None, index: int | Sequence[int] | None = None, **kwargs: Any
        ) -> Any:
            call = {**signature.bind_partial(self, *args).arguments, **kwargs}
            del call["self"]
            if call.get("latents") is not None:
                if seed is not None or index is not None:
                    raise ValueError("latents are given, and so is a seed or an index for learned ones; leave one out")
                return super().__call__(**call)
            if call.get("prompt") is None:
                raise ValueError(
                    "the attached policy reads the prompt, which is missing; noisepolicy.detach removes it"
                )
            texts = [call["prompt"]] if isinstance(call["prompt"], str) else call["prompt"]
            count = call.get("num_images_per_prompt") or call.get("num_videos_per_prompt") or 1
            prompts = [text for text in texts for _ in range(count)]
            call["latents"], indices = policy.latents_and_indices(
                self,
                prompts,
                seed=_draw_seed(call.get("generator")) if seed is None else seed,
                index=index,
                num_inference_steps=call.get("num_inference_steps", defaults.get("num_inference_steps")) or 1,
                num_candidates=num_candidates,
                variety=variety,
                **{name: call[name] for name in _SIZES if name in call},
            )
            if seed is not None and call.get("generator") is None and "generator" in defaults:
                seeds = row_seeds(seed, indices)
                call["generator"] = [torch.Generator(self._execution_device).manual_seed(own) for own in seeds]
            return super().__call__(**call)

    return _become(pipeline, Attached)


def _modular_class(kind: type, blocks: Any, policy: NoisePolicy, num_candidates: int | None, variety: float) -> type:
    """Make a class of modular pipelines that start from a policy's latents.

    Args:
        kind: The pipeline's own class.
        blocks: A copy of its blocks.
    """
    from noisepolicy.frozen.base import row_seeds
    from noisepolicy.integrations.modular_diffusers import insert_learned_noise

    learned = insert_learned_noise(blocks)
    draws = "generator" in {param.name for param in blocks.inputs}

    class Attached(kind):
        unattached_class = kind

        def __call__(self, state: Any = None, output: Any = None, **inputs: Any) -> Any:
            if draws and inputs.get("seed") is not None and inputs.get("generator") is None:
                own = row_seeds(inputs["seed"], range(1))[0]
                inputs["generator"] = torch.Generator(self._execution_device).manual_seed(own)
            plain, self._blocks = self._blocks, learned
            try:
                options = {"noise_policy": policy, "num_candidates": num_candidates, "variety": variety}
                return super().__call__(state, output, **{**options, **inputs})
            finally:
                self._blocks = plain

    return Attached


def _become(pipeline: "DiffusionPipeline", attached: type) -> "DiffusionPipeline":
    # Diffusers writes the class's name into what it saves, and finds related classes by it.
    kind = attached.unattached_class
    attached.__name__, attached.__qualname__, attached.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    pipeline.__class__ = attached
    return pipeline


def detach(pipeline: "DiffusionPipeline") -> "DiffusionPipeline":
    """Return a pipeline without the policy that `attach` attached to it, if any: the same object.

    Raises:
        ValueError: if it is no pipeline.
    """
    from noisepolicy.frozen.calling import unattached_class

    pipeline.__class__ = unattached_class(pipeline)
    return pipeline


def _draw_seed(generator: torch.Generator | list[torch.Generator] | None) -> int:
    generator = generator[0] if isinstance(generator, list) else generator
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (1,), generator=generator, device=device))
