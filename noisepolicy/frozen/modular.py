"""Pipelines of Modular Diffusers, in the form in which the other pipelines are called.

A modular pipeline is a tree of blocks, each of which reads and writes a state. Guidance is the business of a component,
the guider. Here such a pipeline gets a call with arguments, `guidance_scale` among them, and an `encode_prompt` and a
`prepare_latents` that its blocks ask, so that both can be watched and answered as those of the other pipelines.
"""

import copy
import inspect
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import diffusers
import torch
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.modular_pipelines import ModularPipeline, ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline import (
    LoopSequentialPipelineBlocks,
    PipelineState,
)

from noisepolicy.frozen.loading import quiet

_MADE = ("images", "videos", "audio", "audios")
"""Names of what pipelines make, the likeliest first."""


def as_pipeline(pipeline: ModularPipeline) -> ModularPipeline:
    """Return a pipeline of the same components whose blocks are copies, and which is called as other pipelines are.

    Raises:
        ValueError: if it makes nothing that a reward could see, or diffusers is too old.
    """
    if not hasattr(pipeline, "_blocks"):
        raise ValueError(f"modular pipelines need a newer diffusers than {diffusers.__version__}")
    kind, own = type(pipeline), copy.copy(pipeline)
    own._blocks = copy.deepcopy(pipeline._blocks)
    outputs = [output.name for output in own._blocks.outputs]
    made = next((name for name in _MADE if name in outputs), None)
    if made is None:
        raise ValueError(f"the blocks of {kind.__name__} make {', '.join(outputs)}, and none of {', '.join(_MADE)}")
    guiders = {name: part for name, part in pipeline.components.items() if isinstance(part, BaseGuidance)}
    inputs = {param.name: param.default for param in own._blocks.inputs if param.name}
    defaults = ({"guidance_scale": 1.0} if guiders else {}) | inputs

    def call(self: _CallablePipeline, **arguments: Any) -> tuple[Any]:
        return self.run(made, inputs.keys(), arguments)

    keyword = inspect.Parameter.KEYWORD_ONLY
    call.__signature__ = inspect.Signature(
        [
            inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY),
            *(inspect.Parameter(name, keyword, default=default) for name, default in defaults.items()),
        ]
    )
    # Names and defaults of the arguments belong to a class, and differ between pipelines of one class.
    members = {"__call__": call, "__module__": kind.__module__}
    # Some blocks fail without negative embeddings, which the guider leaves aside where it does not guide.
    if guiders and hasattr(kind, "requires_unconditional_embeds"):
        members["requires_unconditional_embeds"] = True
    own.__class__ = type(kind.__name__, (_CallablePipeline, kind), members)
    own.guiders = guiders
    own.block_kinds = {base for block in _leaves(own._blocks) for base in type(block).__mro__}
    _ask_the_pipeline(own._blocks)
    return own


class _CallablePipeline(ModularPipeline):
    """A modular pipeline with what the other pipelines have, and is asked of them."""

    guiders: dict[str, BaseGuidance]
    """Guiders as they were found."""
    block_kinds: set[type]
    """Classes of the blocks."""
    guidance_scale: float | None = None
    """Guidance of the call that goes on."""

    def run(self, made: str, inputs: Any, arguments: dict[str, Any]) -> tuple[Any]:
        """Run the blocks, and return what they made under this name."""
        self._guide(arguments.get("guidance_scale"))
        arguments = {name: value for name, value in arguments.items() if name in inputs}
        if arguments.get("output_type") == "latent":
            arguments["output_type"], made = "pt", "latents"
        with quiet(logging.CRITICAL):  # blocks log every error with its traceback before they raise it again
            return (ModularPipeline.__call__(self, output=made, **arguments),)

    def components_for(self, arguments: Mapping[str, Any]) -> set[str]:
        """Return the names of the components that a call with a prompt and these arguments needs."""
        blocks = self._blocks
        if not _is_leaf(blocks):
            blocks = blocks.get_execution_blocks(prompt=[""], **arguments) or blocks
        return {spec.name for spec in blocks.expected_components}

    def encode_prompt(
        self,
        prompt: list[str],
        negative_prompt: str | list[str] | None,
        *,
        block: ModularPipelineBlocks,
        inputs: Mapping[str, Any],
        guidance_scale: float | None,
    ) -> dict[str, Any]:
        """Return the outputs of a block that encodes prompts."""
        self._guide(guidance_scale)
        state = PipelineState()
        # Some write a template into the prompts.
        for name, value in {**inputs, "prompt": prompt, "negative_prompt": negative_prompt}.items():
            state.set(name, list(value) if isinstance(value, list) else value)
        _, state = block(self, state)
        return {output.name: state.get(output.name) for output in block.intermediate_outputs}

    def prepare_latents(
        self, block: ModularPipelineBlocks, state: PipelineState, latents: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the latents that a block makes of those in the state."""
        state.set("latents", latents)
        block(self, state)
        return state.get("latents")

    def _guide(self, guidance_scale: float | None) -> None:
        """Give the guiders a scale, which turns them on if it is above 1."""
        self.guidance_scale = guidance_scale
        for name, guider in self.guiders.items():
            own = copy.deepcopy(guider)  # they keep state
            if guidance_scale is not None and hasattr(own, "guidance_scale"):
                own.guidance_scale = guidance_scale
                if guidance_scale > 1:
                    own.enable()
            setattr(self, name, own)

    def set_progress_bar_config(self, **options: Any) -> None:
        for block in _leaves(self._blocks):
            if isinstance(block, LoopSequentialPipelineBlocks):
                block.set_progress_bar_config(**options)

    def maybe_free_model_hooks(self) -> None:
        """Do nothing: a `ComponentsManager` looks after its hooks by itself."""


class _AskingBlock:
    """A block that has the pipeline do what the block does, by a method that may be replaced."""

    def __init__(self, block: ModularPipelineBlocks) -> None:
        self._block = block

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)


class _Encoder(_AskingBlock):
    def __call__(self, pipeline: _CallablePipeline, state: PipelineState) -> tuple[_CallablePipeline, PipelineState]:
        inputs = {param.name: state.get(param.name) for param in self._block.inputs if param.name}
        prompt, negative_prompt = inputs.pop("prompt", None), inputs.pop("negative_prompt", None)
        results = pipeline.encode_prompt(
            prompt, negative_prompt, block=self._block, inputs=inputs, guidance_scale=pipeline.guidance_scale
        )
        for output in self._block.intermediate_outputs:
            state.set(output.name, results[output.name], output.kwargs_type)
        return pipeline, state


class _Preparation(_AskingBlock):
    def __call__(self, pipeline: _CallablePipeline, state: PipelineState) -> tuple[_CallablePipeline, PipelineState]:
        pipeline.prepare_latents(self._block, state, state.get("latents"))
        return pipeline, state


def _ask_the_pipeline(blocks: ModularPipelineBlocks) -> None:
    """Let the blocks inside that encode prompts, or take latents to start from, ask the pipeline."""
    for name, block in blocks.sub_blocks.items():
        if _is_leaf(block):
            inputs, outputs = ({each.name for each in side} for side in (block.inputs, block.intermediate_outputs))
            if "prompt" in inputs and any(each.name.startswith("text_encoder") for each in block.expected_components):
                blocks.sub_blocks[name] = _Encoder(block)
            elif not block.sub_blocks and "generator" in inputs and "latents" in inputs & outputs:
                blocks.sub_blocks[name] = _Preparation(block)
        else:
            _ask_the_pipeline(block)


def _leaves(blocks: ModularPipelineBlocks) -> Iterator[ModularPipelineBlocks]:
    if _is_leaf(blocks):
        yield blocks
    else:
        for block in blocks.sub_blocks.values():
            yield from _leaves(block)


def _is_leaf(block: ModularPipelineBlocks) -> bool:
    return not block.sub_blocks or isinstance(block, LoopSequentialPipelineBlocks)
