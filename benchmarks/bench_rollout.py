"""`noisepolicy-bench rollout`: what the general path through diffusers costs, against a loop written for one model.

The embedded model, batches of 32, guidance on. The loop is the least that makes the same images: UNet, scheduler and
autoencoder, with nothing checked and every tensor prepared.
"""

from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline

from noisepolicy.benchmarks.timing import measure
from noisepolicy.frozen import FrozenDiffusersPipeline
from noisepolicy.frozen.loading import load_pipeline
from noisepolicy.shapes import held_out_scenes, model_folder

_BATCH, _GUIDANCE = 32, 1.5


@torch.no_grad()
def run(step_counts: tuple[int, ...] = (1, 2, 4), seconds: float = 20.0) -> dict:
    """Prints a table of medians and returns its numbers; one thread."""
    torch.set_num_threads(1)
    pipeline = load_pipeline(model_folder())
    frozen = FrozenDiffusersPipeline(pipeline, rollout_batch_size=_BATCH)
    embeds = frozen.encode([scene.caption for scene in held_out_scenes()[:_BATCH]])
    null = frozen.encode([""]).prompt_embeds.expand_as(embeds.prompt_embeds)
    both = torch.cat([null, embeds.prompt_embeds])
    latents = torch.randn(_BATCH, *frozen.latent_shape, generator=torch.Generator().manual_seed(0))
    rows = []
    print(" steps   general path   written loop   ratio   largest difference of a pixel")
    for steps in step_counts:
        written = _written_loop(pipeline, latents, both, steps)

        def general(steps: int = steps) -> torch.Tensor:
            return frozen.generate(latents, embeds, num_inference_steps=steps, guidance_scale=_GUIDANCE)

        difference = (general() - written()).abs().max().item()
        times = measure({"general": general, "written": written}, torch.device("cpu"), seconds=seconds)
        ours, theirs = times["general"].median_us / 1e3, times["written"].median_us / 1e3
        rows.append(
            {"steps": steps, "general_ms": ours, "written_ms": theirs, "ratio": ours / theirs, "difference": difference}
        )
        print(f"{steps:6d}   {ours:9.1f} ms   {theirs:9.1f} ms   {ours / theirs:.3f}   {difference:.1e}")
    return {"batch": _BATCH, "rows": rows}


def _written_loop(
    pipeline: DiffusionPipeline, latents: torch.Tensor, embeds: torch.Tensor, steps: int
) -> Callable[[], torch.Tensor]:
    unet, vae, scheduler = pipeline.unet, pipeline.vae, pipeline.scheduler

    def loop() -> torch.Tensor:
        scheduler.set_timesteps(steps)
        sample = latents * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            doubled = scheduler.scale_model_input(torch.cat([sample, sample]), timestep)
            prediction = unet(doubled, timestep, encoder_hidden_states=embeds, return_dict=False)[0]
            away, toward = prediction.chunk(2)
            sample = scheduler.step(away + _GUIDANCE * (toward - away), timestep, sample, return_dict=False)[0]
        images = vae.decode(sample / vae.config.scaling_factor, return_dict=False)[0]
        return (images / 2 + 0.5).clamp(0, 1)

    return loop
