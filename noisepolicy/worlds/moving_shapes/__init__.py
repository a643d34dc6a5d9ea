"""The embedded video world: a small text-to-video model, its captions, and an exact reward.

`model/` is a text-to-video pipeline in diffusers' format (6 frames of 48 x 48 pixels, two shapes that move), trained by
`pretrain.py`.
"""

from pathlib import Path

from noisepolicy.worlds.moving_shapes.captions import MovingScene, held_out_scenes, parse_caption, train_scenes
from noisepolicy.worlds.moving_shapes.renderer import NUM_FRAMES

__all__ = ["NUM_FRAMES", "MovingScene", "held_out_scenes", "model_folder", "parse_caption", "train_scenes"]


def model_folder() -> Path:
    """Return the folder of the shipped pipeline, for `TextToVideoSDPipeline.from_pretrained`."""
    return Path(__file__).parent / "model"
