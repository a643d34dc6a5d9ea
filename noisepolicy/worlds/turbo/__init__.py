"""The turbo world: a small distilled text-to-image model for one to four steps, its captions, and an exact reward.

`model/` is a Stable Diffusion pipeline in diffusers' format (192 x 192 pictures of three to five objects, latents of
24 x 24), trained and distilled by `pretrain.py`. It is used without guidance, as the distilled models that people run.
"""

from pathlib import Path

from noisepolicy.worlds.turbo.captions import Scene, held_out_scenes, parse_caption, train_scenes

NUM_FRAMES = None
"""None: the model makes pictures, not clips."""

__all__ = ["NUM_FRAMES", "Scene", "held_out_scenes", "model_folder", "parse_caption", "train_scenes"]


def model_folder() -> Path:
    """Return the folder of the shipped pipeline, for `StableDiffusionPipeline.from_pretrained`."""
    return Path(__file__).parent / "model"
