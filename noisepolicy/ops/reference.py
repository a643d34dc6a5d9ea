"""Backend `"torch"`: every op in plain PyTorch, on any device. It is the definition; speed is for the others.

Noise goes through float64, so it is the exact value that the other backends' float32 polynomials approach.
"""

import math

import torch

from noisepolicy.ops.layout import PpoRows, Spectrum, dct_basis

DEVICES = None  # any

_WORD = 0xFFFFFFFF


def unavailable_reason() -> str | None:
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


def _expand(log_std: torch.Tensor, size: int) -> torch.Tensor:
    repeats = size // max(log_std.shape[1], 1)
    return log_std.float().repeat_interleave(repeats, dim=1)


def gaussian_sample(mean, log_std, seed, offset):
    noise = standard_normal(*mean.shape, seed, offset, mean.device)
    return _shift_and_scale(noise, mean, log_std)


def _shift_and_scale(noise, mean, log_std):
    log_std = _expand(log_std, mean.shape[1])
    log_prob = (-0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)).double().sum(1).float()
    return mean.float() + log_std.exp() * noise, log_prob


def spectral_sample(mean, log_std, spectrum: Spectrum, seed, offset):
    latent_size = spectrum.channels * math.prod(spectrum.extent)
    noise = standard_normal(mean.shape[0], latent_size, seed, offset, mean.device)
    basis = [dct_basis(b, n, mean.device) for b, n in zip(spectrum.bands, spectrum.extent, strict=True)]
    white = noise.reshape(-1, spectrum.channels, *spectrum.extent)
    low_band = torch.einsum("bcfyx,tf,vy,ux->bctvu", white, *basis).reshape(mean.shape)
    coefficients, log_prob = _shift_and_scale(low_band, mean, log_std)
    shift = (coefficients - low_band).reshape(-1, spectrum.channels, *spectrum.bands)
    latents = white + torch.einsum("bctvu,tf,vy,ux->bcfyx", shift, *basis)
    return latents.reshape(mean.shape[0], latent_size), coefficients, log_prob


def gaussian_log_prob(latents, mean, log_std):
    log_std = _expand(log_std, mean.shape[1])
    noise = (latents - mean.float()) * (-log_std).exp()
    return (-0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)).double().sum(1).float()


def gaussian_log_prob_backward(latents, mean, log_std, grad_output):
    """Gradients with respect to latents, mean and log_std, float32, of `sum(grad_output * log_prob)`."""
    inputs = [tensor.detach().float().requires_grad_() for tensor in (latents, mean, log_std)]
    with torch.enable_grad():
        return torch.autograd.grad(gaussian_log_prob(*inputs), inputs, grad_output)


def ppo_clip_loss(latents, mean, log_std, old_log_prob, advantages, clip_range, kl_coef):
    inputs = [tensor.detach().float().requires_grad_() for tensor in (mean, log_std)]
    with torch.enable_grad():
        log_prob = gaussian_log_prob(latents, *inputs)
        ratio = (log_prob - old_log_prob).exp()
        clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range)
        objective = torch.minimum(ratio * advantages, clipped_ratio * advantages)
        wide_log_std = _expand(inputs[1], mean.shape[1])
        kl = 0.5 * (inputs[0] ** 2 + (2 * wide_log_std).exp() - 1) - wide_log_std
        kl_to_prior = kl.double().sum(1).float()
        loss = (kl_coef * kl_to_prior - objective).sum() / max(mean.shape[0], 1)
        grad_mean, grad_log_std = torch.autograd.grad(loss, inputs)
    rows = (tensor.detach() for tensor in (log_prob, ratio, kl_to_prior, objective))
    return PpoRows(*rows, grad_mean, grad_log_std)
