"""Noise policies: Gaussians over the initial latents, conditioned on the prompt; and the reward critic."""

from noisepolicy.policies.base import NoisePolicy, PolicySample
from noisepolicy.policies.dense import DensePolicy
from noisepolicy.policies.spectral import SpectralPolicy
from noisepolicy.policies.table import TablePolicy

__all__ = ["DensePolicy", "NoisePolicy", "PolicySample", "SpectralPolicy", "TablePolicy"]
