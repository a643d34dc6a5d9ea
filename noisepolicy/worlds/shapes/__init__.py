"""The embedded world: a small text-to-image model, its captions, and an exact reward.

It exists so that everything here can be run, tested and measured with no download: `model/` is a Stable Diffusion
pipeline in diffusers' format (64 x 64 pictures of three coloured shapes), trained by `pretrain.py`.
"""

from pathlib import Path

from noisepolicy.worlds.shapes.captions import Scene, held_out_scenes, parse_caption, train_scenes

NUM_FRAMES = None
"""None: the model makes pictures, not clips."""

__all__ = ["NUM_FRAMES", "Scene", "held_out_scenes", "model_folder", "parse_caption", "train_scenes"]


def model_folder() -> Path:
    """Return the folder of the shipped pipeline, for `StableDiffusionPipeline.from_pretrained`."""
    return Path(__file__).parent / "model"
