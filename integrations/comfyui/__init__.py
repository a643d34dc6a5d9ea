"""ComfyUI nodes that start a sampler from the learned noise of a noisepolicy policy."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
