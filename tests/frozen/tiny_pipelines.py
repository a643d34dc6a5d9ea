"""The tiny pipelines that most tests of frozen models use; `pipelines` holds these and many more."""

from .pipelines import TABLE, build_pipeline

__all__ = ["SIZE", "build_pipeline"]

_NAMES = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "PixArtSigmaPipeline",
    "SanaPipeline",
    "SanaSprintPipeline",
    "TextToVideoSDPipeline",
    "AnimateDiffPipeline",
    "WanPipeline",
    "LTXPipeline",
)
SIZE: dict[str, dict[str, int]] = {
    name: {key: TABLE[name][1][key] for key in ("height", "width", "num_frames") if key in TABLE[name][1]}
    for name in _NAMES
}
"""Size that each pipeline is asked for: small, and not square."""
