"""Backend `"cuda"`: the kernels of csrc/cuda, on the caller's stream. Tensors cross as addresses.

No call waits for the GPU, so each can be captured in a CUDA graph; results and scratch come from torch's allocator.
"""

import functools
from contextlib import nullcontext

import torch

from noisepolicy.ops.layout import PpoForward, Spectrum, kernel_policy

try:
    from noisepolicy import _C
except ImportError as error:
    _cuda, _LOAD_ERROR = None, str(error)
else:
    _cuda, _LOAD_ERROR = getattr(_C, "cuda", None), None

DEVICES = ("cuda",)


@functools.cache  # and not at import: asking starts the driver, which does not survive a fork
def unavailable_reason() -> str | None:
    if _LOAD_ERROR:
        return f"the compiled extension did not load ({_LOAD_ERROR}); reinstall with `pip install .`"
    if _cuda is None:
        return "the extension was built without nvcc; reinstall with NOISEPOLICY_CUDA=1 where the CUDA toolkit is"
    if torch.version.cuda is None:
        return "this torch is no CUDA build"
    problem = _cuda.device_problem()
    return f"no GPU that this build can use ({problem})" if problem else None


def gaussian_sample(mean, log_std, seed, offset):
    policy = kernel_policy(mean, log_std)
    latents, log_prob = _empty(mean, mean.shape), _rows(mean)
    with _on_device_of(mean):
        scratch = _empty(mean, _cuda.gaussian_sample_scratch(policy))
        _cuda.gaussian_sample(policy, seed, offset, *_addresses(latents, log_prob, scratch), _stream(mean))
    return latents, log_prob


def spectral_sample(mean, log_std, spectrum: Spectrum, seed, offset):
    policy = kernel_policy(mean, log_std)
    basis = spectrum.bases(mean.device)
    fields = (spectrum.channels, *spectrum.extent, *spectrum.bands, *_addresses(*basis))
    latents = _empty(mean, (mean.shape[0], spectrum.channels, *spectrum.extent))
    coefficients, log_prob = _empty(mean, mean.shape), _rows(mean)
    with _on_device_of(mean):
        scratch = _empty(mean, _cuda.spectral_sample_scratch(policy, fields))
        results = _addresses(latents, coefficients, log_prob, scratch)
        _cuda.spectral_sample(policy, fields, seed, offset, *results, _stream(mean))
    return latents, coefficients, log_prob


def gaussian_log_prob(latents, mean, log_std):
    policy = kernel_policy(mean, log_std)
    log_prob = _rows(mean)
    with _on_device_of(mean):
        scratch = _empty(mean, _cuda.gaussian_log_prob_scratch(policy))
        _cuda.gaussian_log_prob(policy, *_addresses(latents, log_prob, scratch), _stream(mean))
    return log_prob


def ppo_clip_loss(latents, mean, log_std, old_log_prob, advantages, clip_range, kl_coef):
    policy = kernel_policy(mean, log_std)
    forward = PpoForward(_empty(mean, 3), *(_rows(mean) for _ in range(4)))
    with _on_device_of(mean):
        scratch = _empty(mean, _cuda.ppo_clip_loss_scratch(policy))
        inputs = _addresses(latents, old_log_prob, advantages)
        _cuda.ppo_clip_loss(policy, *inputs, clip_range, kl_coef, *_addresses(*forward, scratch), _stream(mean))
    return forward


def gaussian_backward(latents, mean, log_std, grad_log_prob, grad_kl, needs_latents):
    policy = kernel_policy(mean, log_std)
    grad_mean, grad_log_std = torch.empty(mean.shape, dtype=mean.dtype, device=mean.device), torch.empty_like(log_std)
    grad_latents = _empty(mean, mean.shape) if needs_latents else None
    with _on_device_of(mean):
        scratch = _empty(mean, _cuda.gaussian_backward_scratch(policy))
        inputs = _addresses(latents, grad_log_prob, grad_kl)
        results = _addresses(grad_mean, grad_log_std, grad_latents, scratch)
        _cuda.gaussian_backward(policy, *inputs, *results, _stream(mean))
    return grad_mean, grad_log_std, grad_latents


def _empty(like, shape):
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _rows(mean):
    return _empty(mean, mean.shape[0])


def _addresses(*tensors) -> tuple[int, ...]:
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


def _stream(tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream


def _on_device_of(tensor):
    """Make the tensor's device current, where it is not: kernels are launched on the current device."""
    is_current = tensor.device.index == torch.cuda.current_device()
    return nullcontext() if is_current else torch.cuda.device(tensor.device)
