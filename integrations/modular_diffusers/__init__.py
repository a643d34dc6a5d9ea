"""A block of Modular Diffusers that starts a pipeline from learned noise.

blocks = insert_learned_noise(ZImageAutoBlocks())
pipe = blocks.init_pipeline("Tongyi-MAI/Z-Image-Turbo")
pipe.load_components()
pipe(prompt="a dog and a cat", noise_policy="me/policy", seed=7, num_inference_steps=8, output="images")
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.modular_pipelines import ModularPipeline, ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline import PipelineState, SequentialPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam

import noisepolicy
from noisepolicy.frozen.noise import Draws, watching
from noisepolicy.policies import NoisePolicy

_NAME = "learned_noise"
_load = functools.lru_cache(noisepolicy.load)


def insert_learned_noise(blocks: ModularPipelineBlocks) -> ModularPipelineBlocks:
    """Insert a `LearnedNoiseStep` before every block inside that draws the latents to start from.

    Returns:
        The same blocks.

    Raises:
        ValueError: if no such block is inside.
    """
    if not _insert(blocks):
        raise ValueError(f"{type(blocks).__name__} has no block inside that draws latents to start from")
    return blocks


def _insert(blocks: ModularPipelineBlocks) -> int:
    count = 0
    for index, (name, block) in reversed(list(enumerate(blocks.sub_blocks.items()))):
        if block.sub_blocks:
            count += _insert(block)
        elif name != _NAME and isinstance(blocks, SequentialPipelineBlocks) and _draws_latents(block):
            blocks.sub_blocks.insert(_NAME, LearnedNoiseStep(block), index)
            count += 1
    return count


def _draws_latents(block: ModularPipelineBlocks) -> bool:
    inputs, outputs = ({each.name for each in side} for side in (block.inputs, block.intermediate_outputs))
    return "generator" in inputs and "latents" in inputs & outputs


class LearnedNoiseStep(ModularPipelineBlocks):
    """Outputs `latents` of a policy, where a policy is given and no latents are.

    The block that follows tells by itself what it draws and in which form it takes latents, so this one fits any model.

    Args:
        preparation: The block that follows, which draws latents where none are given.
    """

    def __init__(self, preparation: ModularPipelineBlocks) -> None:
        super().__init__()
        self.model_name = preparation.model_name
        self._preparation = preparation

    @property
    def description(self) -> str:
        return "Starts from the noise that a policy of noisepolicy learned for the prompt."

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("noise_policy", description="Policy, its folder or hub id. Without one, noise is drawn."),
            InputParam("seed", type_hint=int, description="Seed of the noise. Default: one that torch draws."),
            InputParam("index", description="Index of each picture's noise. Default: 0, 1, 2, ..."),
            InputParam("num_candidates", type_hint=int, description="Starts that the policy's critic chooses among."),
            InputParam(
                "variety", type_hint=float, description="How much the pictures of a prompt are to differ, 0 to 1."
            ),
            InputParam("num_inference_steps", description="Number of denoising steps."),
            InputParam("prompt_embeds", required=True, description="The prompts, by the text encoder step."),
            InputParam("latents", description="Latents to start from, which are left as they are."),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("latents", type_hint=torch.Tensor, description="Latents that a policy chose")]

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        block_state = self.get_block_state(state)
        if block_state.noise_policy is None or block_state.latents is not None:
            return components, state
        policy = block_state.noise_policy
        policy = policy if isinstance(policy, NoisePolicy) else _load(str(policy))
        draws = Draws()
        self._prepare(components, state, draws)
        if draws.shape is None:
            raise ValueError(f"{type(self._preparation).__name__} draws no noise that learned noise could replace")
        noise = self._learned(policy, draws.shape, block_state)
        draws = Draws(noise)
        made = self._prepare(components, state, draws)
        # Some take noise as they draw it, others as they return it, packed.
        for form in (draws.handed, made):
            if torch.equal(self._prepare(components, state, Draws(), form), made):
                block_state.latents = form
                self.set_block_state(state, block_state)
                return components, state
        raise ValueError(f"{type(self._preparation).__name__} does not take latents in a form that can be told")

    def _prepare(
        self, components: ModularPipeline, state: PipelineState, draws: Draws, latents: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the latents that the next block would make, and leave everything else as it is."""
        values = {**state.values, "latents": latents, "generator": torch.Generator().manual_seed(0)}
        mapping = {name: list(keys) for name, keys in state.kwargs_mapping.items()}
        with watching(self._preparation, draws):
            _, after = self._preparation(components, PipelineState(values, mapping))
        return after.get("latents")

    def _learned(self, policy: NoisePolicy, drawn: Sequence[int], given: Any) -> torch.Tensor:
        """Return the policy's latents in the shape of the noise that the next block draws."""
        count, channels = drawn[0], policy.latent_shape[0] // policy.num_draws
        axis = next((axis for axis in (1, 2, len(drawn) - 1) if drawn[axis] == channels), None)
        if axis is None:
            raise ValueError(
                f"the policy was trained on latents of {channels} channels, and {type(self._preparation).__name__} "
                f"draws noise of shape {tuple(drawn)}: it is of another model"
            )
        extent = [size for place, size in enumerate(drawn) if place not in (0, axis)]
        # Some image models see a video of one frame, which a policy knows as an image.
        shape = (policy.latent_shape[0], *(extent[1:] if len(extent) == len(policy.latent_shape) else extent))
        rows = given.prompt_embeds
        rows = rows.split(1) if isinstance(rows, torch.Tensor) else [row[None] for row in rows]
        embeds = torch.cat([policy.fit_tokens(row) for row in rows])
        embeds = embeds.repeat_interleave(count // len(embeds), 0)
        latents = policy.latents(
            embeds,
            seed=int(torch.randint(2**62, (1,))) if given.seed is None else given.seed,
            index=given.index,
            num_inference_steps=given.num_inference_steps or 1,
            num_candidates=given.num_candidates,
            variety=given.variety or 0.0,
            latent_shape=shape,
        )
        return latents[:, :channels].reshape(count, channels, *extent).movedim(1, axis)


__all__ = ["LearnedNoiseStep", "insert_learned_noise"]
