"""Backend `"cpp"`: the compiled kernels of csrc/, on CPU tensors. Tensors cross as addresses."""

import math

import torch

from noisepolicy.ops.layout import PpoRows, Spectrum, dct_basis

try:
    from noisepolicy import _C
except ImportError as error:
    _C = None
    _LOAD_ERROR: ImportError | None = error
else:
    _LOAD_ERROR = None

DEVICES = ("cpu",)

_STORAGE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def unavailable_reason() -> str | None:
    if _LOAD_ERROR is None:
        return None
    return f"the compiled extension did not load ({_LOAD_ERROR}); reinstall with `pip install .`"


def _gaussian(mean: torch.Tensor, log_std: torch.Tensor):
    return _C.Gaussian(mean.data_ptr(), log_std.data_ptr(), _STORAGE[mean.dtype], *mean.shape, log_std.shape[1])


def gaussian_sample(mean, log_std, seed, offset):
    latents = torch.empty(mean.shape, dtype=torch.float32)
    log_prob = torch.empty(mean.shape[0])
    _C.gaussian_sample(_gaussian(mean, log_std), seed, offset, latents.data_ptr(), log_prob.data_ptr())
    return latents, log_prob


def spectral_sample(mean, log_std, spectrum: Spectrum, seed, offset):
    latents = torch.empty(mean.shape[0], spectrum.channels * math.prod(spectrum.extent))
    coefficients = torch.empty(mean.shape, dtype=torch.float32)
    log_prob = torch.empty(mean.shape[0])
    basis = [dct_basis(b, n, mean.device) for b, n in zip(spectrum.bands, spectrum.extent, strict=True)]
    native_spectrum = _C.Spectrum(spectrum.channels, spectrum.extent, spectrum.bands, [b.data_ptr() for b in basis])
    _C.spectral_sample(
        _gaussian(mean, log_std), native_spectrum, seed, offset,
        latents.data_ptr(), coefficients.data_ptr(), log_prob.data_ptr(),
    )  # fmt: skip
    return latents, coefficients, log_prob


def gaussian_log_prob(latents, mean, log_std):
    log_prob = torch.empty(mean.shape[0])
    _C.gaussian_log_prob(_gaussian(mean, log_std), latents.data_ptr(), log_prob.data_ptr())
    return log_prob


def gaussian_log_prob_backward(latents, mean, log_std, grad_output):
    """Gradients with respect to latents, mean and log_std, float32, of `sum(grad_output * log_prob)`."""
    grads = [torch.empty(tensor.shape, dtype=torch.float32) for tensor in (latents, mean, log_std)]
    _C.gaussian_log_prob_backward(
        _gaussian(mean, log_std), latents.data_ptr(), grad_output.data_ptr(), *(grad.data_ptr() for grad in grads)
    )
    return grads


def ppo_clip_loss(latents, mean, log_std, old_log_prob, advantages, clip_range, kl_coef):
    rows = [torch.empty(mean.shape[0]) for _ in range(4)]
    grads = [torch.empty(tensor.shape, dtype=torch.float32) for tensor in (mean, log_std)]
    _C.ppo_clip_loss(
        _gaussian(mean, log_std), latents.data_ptr(), old_log_prob.data_ptr(), advantages.data_ptr(),
        clip_range, kl_coef, *(tensor.data_ptr() for tensor in (*rows, *grads)),
    )  # fmt: skip
    return PpoRows(*rows, *grads)
