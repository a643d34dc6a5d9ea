"""The cost of handing noise and embeddings over to a pipeline's own call, against that call as its users make it.

The two take turns, and the overhead is the median difference of a pair, so other jobs slow both alike.
"""

import statistics
import time
from typing import Any

import torch

from noisepolicy.benchmarks.latency.cases import EMBEDDED, ModelSpec, check_output
from noisepolicy.frozen import FrozenDiffusersPipeline
from noisepolicy.frozen.loading import load_pipeline, place_pipeline
from noisepolicy.ops import gaussian_sample

MOST_OVERHEAD = 0.02
"""Overhead that is allowed at `NUM_STEPS` steps, as a share of the pipeline's own call."""
NUM_STEPS = 2
_MIN_PAIRS = 15
# The default of an argument that the lean loop does not know, so that the model is called as any pipeline is.
_GENERAL = {"eta": 0.0}


@torch.no_grad()
def time_overhead(spec: ModelSpec, batch: int, guidance_scale: float, seconds: float) -> dict[str, Any] | None:
    """Time the general way and the pipeline's own call for the same images.

    Returns:
        The figures, or None for another model than the embedded one, whose own call we know how to make.

    Raises:
        RuntimeError: if the images differ.
    """
    if spec.model != EMBEDDED:
        print("\nany pipeline: measured on the embedded model alone")
        return None
    frozen = FrozenDiffusersPipeline.from_pretrained(
        spec.source, device=spec.device, rollout_batch_size=batch, call=_GENERAL, **spec.options()
    )
    pipeline = load_pipeline(spec.source, **spec.options())
    place_pipeline(pipeline, spec.device, cpu_offload=False)
    pipeline.set_progress_bar_config(disable=True)
    prior = torch.zeros(batch, *frozen.latent_shape, device=spec.device)
    latents, embeds = gaussian_sample(prior, prior.new_zeros(()), seed=0)[0], frozen.encode(spec.prompts(batch))
    away = {name: row.repeat(batch, 1, 1) for name, row in frozen.negative_embeds.items()}
    settings = {"num_inference_steps": NUM_STEPS, "guidance_scale": guidance_scale}

    def own() -> torch.Tensor:
        generator = torch.Generator(spec.device).manual_seed(0)
        given = {"latents": latents, "prompt_embeds": embeds.prompt_embeds, **away, "generator": generator}
        return pipeline(**given, **settings, **_GENERAL, output_type="pt", return_dict=False)[0]

    def general() -> torch.Tensor:
        return frozen.generate(latents, embeds, **settings)

    difference = check_output("an image of the general way", general(), own(), spec.dtype, is_image=True)
    spent: dict[Any, list[float]] = {own: [], general: []}
    end = time.perf_counter() + 2 * seconds
    while len(spent[own]) < _MIN_PAIRS or time.perf_counter() < end:
        for call in (own, general) if len(spent[own]) % 2 else (general, own):
            start = time.perf_counter()
            call()
            if spec.device.type == "cuda":
                torch.cuda.synchronize(spec.device)
            spent[call].append(1e3 * (time.perf_counter() - start))
    own_ms = statistics.median(spent[own])
    row = {
        "batch": batch,
        "num_inference_steps": NUM_STEPS,
        "own_ms": own_ms,
        "general_ms": statistics.median(spent[general]),
        "overhead_fraction": statistics.median(b - a for a, b in zip(spent[own], spent[general], strict=True)) / own_ms,
        "difference": difference,
    }
    print(
        f"\nany pipeline, batch {batch}, {NUM_STEPS} steps: {row['general_ms']:.2f} ms, its own call "
        f"{own_ms:.2f} ms, {row['overhead_fraction']:+.1%} (at most {MOST_OVERHEAD:+.0%})",
        flush=True,
    )
    return row
