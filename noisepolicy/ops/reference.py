"""Backend `"torch"`: every op in plain PyTorch, on any device. It defines the results; the other backends are faster.

Noise goes through float64, so it is the exact value that the other backends' float32 polynomials approach.
"""

import math

import torch

from noisepolicy.ops.layout import PpoForward, Spectrum

DEVICES = None  # any

_WORD = 0xFFFFFFFF


def unavailable_reason() -> str | None:
    """Return None: this backend runs wherever PyTorch does."""
    return None


def philox4x32(counter: list[torch.Tensor], key: tuple[int, int]) -> list[torch.Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011) on four int64 tensors that hold 32-bit words."""

    def multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        high_part, low_part = (b >> 16) * a, (b & 0xFFFF) * a
        return (high_part + (low_part >> 16)) >> 16, (a * b) & _WORD

    x, y, z, w = counter
    key0, key1 = key
    for _ in range(10):
        high0, low0 = multiply(0xD2511F53, x)
        high1, low1 = multiply(0xCD9E8D57, z)
        x, y, z, w = high1 ^ y ^ key0, low1, high0 ^ w ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return [x, y, z, w]


def standard_normal(batch: int, size: int, seed: int, offset: int, device: torch.device) -> torch.Tensor:
    """Counter-addressed white noise, float32 `(batch, size)`; see csrc/philox.h."""
    num_quads = (size + 3) // 4
    # The 64-bit counter wraps; int64 addition wraps the same way.
    start = offset - 2**64 if offset >= 2**63 else offset
    counter = torch.arange(batch * num_quads, device=device) + start
    zero = torch.zeros_like(counter)
    words = philox4x32([counter & _WORD, (counter >> 32) & _WORD, zero, zero], (seed & _WORD, seed >> 32))
    u = [(word >> 8).double() * 2.0**-24 for word in words]
    normals = []
    for first, second in ((u[0], u[1]), (u[2], u[3])):
        radius = (-2 * (first + 2.0**-24).log()).sqrt()
        normals += [radius * (2 * math.pi * second).cos(), radius * (2 * math.pi * second).sin()]
    return torch.stack(normals, 1).reshape(batch, num_quads * 4)[:, :size].float()


@torch.no_grad()
def gaussian_sample(mean, log_std, seed, offset):
    """Draw latents and compute their log-density; see `gaussian.gaussian_sample`."""
    noise = standard_normal(mean.shape[0], math.prod(mean.shape[1:]), seed, offset, mean.device)
    return _shift_and_scale(noise.reshape(mean.shape), mean, log_std)


@torch.no_grad()
def spectral_sample(mean, log_std, spectrum: Spectrum, seed, offset):
    """Draw noise and replace its low band; see `gaussian.spectral_sample`."""
    shape = (mean.shape[0], spectrum.channels, *spectrum.extent)
    white = standard_normal(shape[0], math.prod(shape[1:]), seed, offset, mean.device).reshape(shape)
    basis = spectrum.bases(mean.device)
    low_band = torch.einsum("bcfyx,tf,vy,ux->bctvu", white, *basis).reshape(mean.shape)
    coefficients, log_prob = _shift_and_scale(low_band, mean, log_std)
    shift = (coefficients - low_band).reshape(shape[0], spectrum.channels, *spectrum.bands)
    latents = white + torch.einsum("bctvu,tf,vy,ux->bcfyx", shift, *basis)
    return latents, coefficients, log_prob


@torch.no_grad()
def gaussian_log_prob(latents, mean, log_std):
    """Compute the log-density of each row; see `gaussian.gaussian_log_prob`."""
    log_std = _expand(log_std, mean)
    noise = (latents - mean.float()) * (-log_std).exp()
    return _row_sum(-0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi))


@torch.no_grad()
def ppo_clip_loss(latents, mean, log_std, old_log_prob, advantages, clip_range, kl_coef):
    """Compute the PPO loss and its statistics; see `gaussian.ppo_clip_loss`."""
    log_prob = gaussian_log_prob(latents, mean, log_std)
    kl_to_prior = _row_sum(_kl_to_prior(mean.float(), _expand(log_std, mean)))
    ratio = (log_prob - old_log_prob).exp()
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    divisor = max(mean.shape[0], 1)
    totals = [
        (kl_coef * kl_to_prior - torch.minimum(unclipped, clipped)).sum(),
        (ratio - 1 - (log_prob - old_log_prob)).sum(),
        ((ratio - 1).abs() > clip_range).sum(),
    ]
    # Where the clipped branch is the smaller one the ratio has no gradient.
    grad_log_prob = torch.where(unclipped <= clipped, -unclipped / divisor, 0.0)
    return PpoForward(torch.stack(totals) / divisor, log_prob, ratio, kl_to_prior, grad_log_prob)


@torch.no_grad()
def gaussian_backward(latents, mean, log_std, grad_log_prob, grad_kl, needs_latents):
    """Return the gradients of `sum(grad_log_prob * log_prob + grad_kl * kl_to_prior)`; the weights are `(batch,)`.

    Returns:
        Gradients for mean and log_std, in their dtype and shape; for latents, float32, or None.
    """
    wide_log_std = _expand(log_std, mean)
    noise = (latents - mean.float()) * (-wide_log_std).exp()
    column = (-1,) + (1,) * (mean.ndim - 1)
    grad_log_prob, grad_kl = grad_log_prob.reshape(column), grad_kl.reshape(column)
    of_value = grad_log_prob * noise * (-wide_log_std).exp()
    grad_mean = of_value + grad_kl * mean.float()
    grad_log_std = grad_log_prob * (noise**2 - 1) + grad_kl * ((2 * wide_log_std).exp() - 1)
    runs = grad_log_std.reshape(log_std.numel(), -1) if mean.numel() else grad_log_std.new_zeros(log_std.numel(), 1)
    grad_log_std = runs.double().sum(1).reshape(log_std.shape)
    return grad_mean.to(mean.dtype), grad_log_std.to(log_std.dtype), -of_value if needs_latents else None


def _expand(log_std, mean):
    """Check `log_std` and expand it to float32 of `mean`'s shape."""
    if not mean.numel():
        return mean.float()
    if log_std.device.type == "cpu" and log_std.isnan().any():
        raise ValueError("log_std must not hold NaN")
    repeats = mean.numel() // log_std.numel()
    return log_std.float().flatten().repeat_interleave(repeats).reshape(mean.shape)


def _row_sum(values):
    return values.flatten(1).double().sum(1).float()


def _kl_to_prior(mean, log_std):
    return 0.5 * (mean**2 + (2 * log_std).exp() - 1) - log_std


def _shift_and_scale(noise, mean, log_std):
    log_std = _expand(log_std, mean)
    log_prob = _row_sum(-0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi))
    return mean.float() + log_std.exp() * noise, log_prob
