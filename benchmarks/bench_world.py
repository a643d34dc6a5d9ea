"""`noisepolicy-bench world`: is the embedded model good, and does its noise matter?

Scores of real scenes, of the same through the autoencoder, and of the base model on held-out captions by denoising
steps with best-of-n; then images/s on one thread.
"""

import time

import torch
from diffusers import AutoencoderTiny

from noisepolicy.evaluation.statistics import expected_best_of
from noisepolicy.frozen import FrozenDiffusersPipeline
from noisepolicy.ops import gaussian_sample
from noisepolicy.worlds.shapes import held_out_scenes, model_folder, train_scenes
from noisepolicy.worlds.shapes.renderer import render
from noisepolicy.worlds.shapes.reward import score

_STEPS = (1, 2, 4, 8, 16, 20)
_NUM_CAPTIONS, _GROUP = 64, 16


def run(guidance_scale: float = 1.5) -> dict:
    """Prints a table and returns its numbers."""
    frozen = FrozenDiffusersPipeline.from_pretrained(model_folder())
    result: dict = {"guidance_scale": guidance_scale, "scenes": _score_scenes(), "steps": []}
    for name, (reward, strict) in result["scenes"].items():
        print(f"{name:24s} reward {reward:.3f}  strict {strict:.3f}")

    prompts = [scene.caption for scene in held_out_scenes()[:_NUM_CAPTIONS]]
    repeated = [prompt for prompt in prompts for _ in range(_GROUP)]
    embeds = frozen.encode(repeated)
    zeros = torch.zeros(len(repeated), *frozen.latent_shape)
    latents, _ = gaussian_sample(zeros, torch.zeros(()), seed=7)
    print(f"base model, {len(prompts)} held-out captions x {_GROUP}, guidance {guidance_scale}")
    print(" steps  reward  strict  best of 2, 4, 8, 16")
    for steps in _STEPS:
        images = frozen.generate(latents, embeds, num_inference_steps=steps, guidance_scale=guidance_scale)
        scores = score(images, repeated)
        rewards = scores.reward.reshape(-1, _GROUP)
        best = [expected_best_of(rewards, n) for n in (2, 4, 8, 16)]
        row = {"steps": steps, "reward": rewards.mean().item(), "strict": scores.strict.mean().item(), "best_of": best}
        result["steps"].append(row)
        print(f"{steps:6d}  {row['reward']:.3f}   {row['strict']:.3f}   " + " ".join(f"{value:.3f}" for value in best))
    result["images_per_second"] = _speed(frozen, guidance_scale)
    print(f"2 steps with guidance, one thread: {result['images_per_second']:.1f} images/s")
    return result


def _score_scenes() -> dict[str, tuple[float, float]]:
    scenes = (*held_out_scenes(), *train_scenes()[:256])
    captions = [scene.caption for scene in scenes]
    vae = AutoencoderTiny.from_pretrained(model_folder(), subfolder="vae")
    images = render(scenes, torch.Generator().manual_seed(1))
    with torch.no_grad():
        decoded = (vae.decoder(vae.encoder(images * 2 - 1)) / 2 + 0.5).clamp(0, 1)
    return {
        name: (result.reward.mean().item(), result.strict.mean().item())
        for name, result in (
            ("real scenes", score(images, captions)),
            ("through the autoencoder", score(decoded, captions)),
        )
    }


def _speed(frozen: FrozenDiffusersPipeline, guidance_scale: float) -> float:
    """Images a second at 2 steps, one thread, median of 5."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    embeds = frozen.encode([scene.caption for scene in held_out_scenes()[:64]])
    latents = torch.randn(64, *frozen.latent_shape, generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        frozen.generate(latents, embeds, num_inference_steps=2, guidance_scale=guidance_scale)
        seconds.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return 64 / sorted(seconds[1:])[2]
