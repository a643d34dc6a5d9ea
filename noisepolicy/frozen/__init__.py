"""Frozen models, which are started from noise and never changed."""

from typing import TYPE_CHECKING, Any

from noisepolicy.frozen.base import FrozenModel, PlainModel, PromptEmbeds, as_frozen_model

if TYPE_CHECKING:
    from noisepolicy.frozen.diffusers_pipeline import FrozenDiffusersPipeline

__all__ = ["FrozenDiffusersPipeline", "FrozenModel", "PlainModel", "PromptEmbeds", "as_frozen_model"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: the contract alone needs nothing but torch.
    if name == "FrozenDiffusersPipeline":
        from noisepolicy.frozen.diffusers_pipeline import FrozenDiffusersPipeline

        return FrozenDiffusersPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
