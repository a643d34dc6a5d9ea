"""Export of a frozen model's parts, and the engines that run them."""

from noisepolicy.export.apply import DENOISERS, Choice, available_denoisers, choose_denoiser, use_denoiser

__all__ = ["DENOISERS", "Choice", "available_denoisers", "choose_denoiser", "use_denoiser"]
