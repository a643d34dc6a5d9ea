"""The policy's arithmetic: sampling, log-density and the PPO loss of a diagonal Gaussian over initial latents."""

from noisepolicy.ops import library  # noqa: F401  # registers the ops
from noisepolicy.ops.dispatch import available_backends
from noisepolicy.ops.gaussian import (
    PpoStats,
    gaussian_kl,
    gaussian_log_prob,
    gaussian_sample,
    num_counters,
    ppo_clip_loss,
    ppo_ratio,
    spectral_sample,
)
from noisepolicy.ops.layout import dct_basis

__all__ = [
    "PpoStats",
    "available_backends",
    "dct_basis",
    "gaussian_kl",
    "gaussian_log_prob",
    "gaussian_sample",
    "num_counters",
    "ppo_clip_loss",
    "ppo_ratio",
    "spectral_sample",
]
