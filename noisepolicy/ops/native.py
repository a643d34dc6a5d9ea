"""Backend `"cpp"`: the compiled kernels of csrc/cpu, on CPU tensors. Tensors cross as addresses."""

import torch

from noisepolicy.ops.layout import PpoForward, Spectrum, kernel_policy

try:
    from noisepolicy import _C
except ImportError as error:
    _C = None
    _LOAD_ERROR: ImportError | None = error
else:
    _LOAD_ERROR = None

DEVICES = ("cpu",)


def unavailable_reason() -> str | None:
    if _LOAD_ERROR is None:
        return None
    return f"the compiled extension did not load ({_LOAD_ERROR}); reinstall with `pip install .`"


def _empty(*shape):
    """Allocate a kernel's output: float32 on the CPU, whatever torch's defaults are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def gaussian_sample(mean, log_std, seed, offset):
    latents = torch.empty_like(mean, dtype=torch.float32)
    log_prob = _empty(mean.shape[0])
    _C.gaussian_sample(
        *kernel_policy(mean, log_std), seed, offset, torch.get_num_threads(), latents.data_ptr(), log_prob.data_ptr()
    )
    return latents, log_prob


def spectral_sample(mean, log_std, spectrum: Spectrum, seed, offset):
    latents = _empty(mean.shape[0], spectrum.channels, *spectrum.extent)
    coefficients = _empty(*mean.shape)
    log_prob = _empty(mean.shape[0])
    basis = spectrum.bases(mean.device)
    _C.spectral_sample(
        *kernel_policy(mean, log_std),
        spectrum.channels,
        spectrum.extent,
        spectrum.bands,
        [b.data_ptr() for b in basis],
        seed,
        offset,
        torch.get_num_threads(),
        latents.data_ptr(),
        coefficients.data_ptr(),
        log_prob.data_ptr(),
    )
    return latents, coefficients, log_prob


def gaussian_log_prob(latents, mean, log_std):
    log_prob = _empty(mean.shape[0])
    _C.gaussian_log_prob(
        *kernel_policy(mean, log_std), torch.get_num_threads(), latents.data_ptr(), log_prob.data_ptr()
    )
    return log_prob


def ppo_clip_loss_and_gradients(latents, mean, log_std, old_log_prob, advantages, clip_range, kl_coef):
    """Return `ppo_clip_loss` and its gradients for mean and log_std; each row is read again while in the cache."""
    gradients = torch.empty_like(mean), torch.empty_like(log_std)
    arguments = latents, mean, log_std, old_log_prob, advantages, clip_range, kl_coef
    return ppo_clip_loss(*arguments, *gradients), gradients


def ppo_clip_loss(
    latents, mean, log_std, old_log_prob, advantages, clip_range, kl_coef, grad_mean=None, grad_log_std=None
) -> PpoForward:
    batch = mean.shape[0]
    out = PpoForward(_empty(3), _empty(batch), _empty(batch), _empty(batch), _empty(batch))
    _C.ppo_clip_loss(
        *kernel_policy(mean, log_std),
        torch.get_num_threads(),
        latents.data_ptr(),
        old_log_prob.data_ptr(),
        advantages.data_ptr(),
        clip_range,
        kl_coef,
        *(tensor.data_ptr() for tensor in out),
        *(0 if tensor is None else tensor.data_ptr() for tensor in (grad_mean, grad_log_std)),
    )
    return out


def gaussian_backward(latents, mean, log_std, grad_log_prob, grad_kl, needs_latents):
    """Return the gradients of `sum(grad_log_prob * log_prob + grad_kl * kl_to_prior)`; the weights are `(batch,)`.

    Returns:
        Gradients for mean and log_std, in their dtype and shape; for latents, float32, or None.
    """
    grad_mean, grad_log_std = torch.empty_like(mean), torch.empty_like(log_std)
    grad_latents = torch.empty_like(latents) if needs_latents else None
    _C.gaussian_backward(
        *kernel_policy(mean, log_std),
        torch.get_num_threads(),
        latents.data_ptr(),
        grad_log_prob.data_ptr(),
        grad_kl.data_ptr(),
        grad_mean.data_ptr(),
        grad_log_std.data_ptr(),
        0 if grad_latents is None else grad_latents.data_ptr(),
    )
    return grad_mean, grad_log_std, grad_latents
