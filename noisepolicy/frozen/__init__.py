"""Frozen models: what the trainer starts from noise and never changes."""

from noisepolicy.frozen.base import FrozenModel, PromptEmbeds
from noisepolicy.frozen.diffusers_pipeline import FrozenDiffusersPipeline

__all__ = ["FrozenDiffusersPipeline", "FrozenModel", "PromptEmbeds"]
