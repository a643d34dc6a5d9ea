"""Registration of the ops as `torch.ops.noisepolicy.*`, for torch.compile and torch.export.

A registered op costs an eager call tens of microseconds, so eager calls do without. Both have the gradients of
`gaussian.py`. Tensors are those of `layout.policy_rows`; `backend` is a name that `dispatch.choose` knows.
"""

import math

import torch
from torch import Tensor

from noisepolicy.ops.dispatch import choose
from noisepolicy.ops.gaussian import log_prob_backward, ppo_gradients, save_log_prob
from noisepolicy.ops.layout import PpoForward, check_fp32, check_rows, make_spectrum

_UINT64 = 2**64


@torch.library.custom_op("noisepolicy::gaussian_sample", mutates_args=())
def gaussian_sample(mean: Tensor, log_std: Tensor, seed: int, offset: int, backend: str) -> tuple[Tensor, Tensor]:
    check_rows(mean, log_std)
    return choose(backend, mean.device).gaussian_sample(mean, log_std, seed % _UINT64, offset % _UINT64)


@gaussian_sample.register_fake
def _(mean, log_std, seed, offset, backend):
    return torch.empty_like(mean, dtype=torch.float32), _rows(mean)


@torch.library.custom_op("noisepolicy::spectral_sample", mutates_args=())
def spectral_sample(
    mean: Tensor, log_std: Tensor, extent: list[int], bands: list[int], seed: int, offset: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    check_rows(mean, log_std)
    if len(extent) != 3 or len(bands) != 3 or mean.numel() != mean.shape[0] * mean.shape[1] * math.prod(bands):
        raise ValueError(f"coefficients of shape {tuple(mean.shape)} are not of {bands} bands of {extent}")
    spectrum = make_spectrum((mean.shape[1], *bands), (mean.shape[1], *extent))
    return choose(backend, mean.device).spectral_sample(mean, log_std, spectrum, seed % _UINT64, offset % _UINT64)


@spectral_sample.register_fake
def _(mean, log_std, extent, bands, seed, offset, backend):
    latents = mean.new_empty((mean.shape[0], mean.shape[1], *extent), dtype=torch.float32)
    return latents, torch.empty_like(mean, dtype=torch.float32), _rows(mean)


@torch.library.custom_op("noisepolicy::gaussian_log_prob", mutates_args=())
def gaussian_log_prob(latents: Tensor, mean: Tensor, log_std: Tensor, backend: str) -> Tensor:
    check_rows(mean, log_std)
    latents = check_fp32("latents", latents, tuple(mean.shape), mean.device)
    return choose(backend, mean.device).gaussian_log_prob(latents, mean, log_std)


@gaussian_log_prob.register_fake
def _(latents, mean, log_std, backend):
    return _rows(mean)


@torch.library.custom_op("noisepolicy::ppo_clip_loss", mutates_args=())
def ppo_clip_loss(
    latents: Tensor,
    mean: Tensor,
    log_std: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    clip_range: float,
    kl_coef: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_rows(mean, log_std)
    latents = check_fp32("latents", latents, tuple(mean.shape), mean.device)
    old_log_prob = check_fp32("old_log_prob", old_log_prob, tuple(mean.shape[:1]), mean.device)
    advantages = check_fp32("advantages", advantages, tuple(mean.shape[:1]), mean.device)
    module = choose(backend, mean.device)
    return tuple(module.ppo_clip_loss(latents, mean, log_std, old_log_prob, advantages, clip_range, kl_coef))


@ppo_clip_loss.register_fake
def _(latents, mean, log_std, old_log_prob, advantages, clip_range, kl_coef, backend):
    return PpoForward(mean.new_empty(3, dtype=torch.float32), *(_rows(mean) for _ in range(4)))


@torch.library.custom_op("noisepolicy::gaussian_backward", mutates_args=())
def gaussian_backward(
    latents: Tensor,
    mean: Tensor,
    log_std: Tensor,
    grad_log_prob: Tensor,
    grad_kl: Tensor,
    needs_latents: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    check_rows(mean, log_std)
    latents = check_fp32("latents", latents, tuple(mean.shape), mean.device)
    grad_log_prob = check_fp32("grad_log_prob", grad_log_prob, tuple(mean.shape[:1]), mean.device)
    grad_kl = check_fp32("grad_kl", grad_kl, tuple(mean.shape[:1]), mean.device)
    module = choose(backend, mean.device)
    grads = module.gaussian_backward(latents, mean, log_std, grad_log_prob, grad_kl, needs_latents)
    return (*grads[:2], grads[2] if needs_latents else latents.new_empty(0))


@gaussian_backward.register_fake
def _(latents, mean, log_std, grad_log_prob, grad_kl, needs_latents, backend):
    grad_latents = torch.empty_like(latents) if needs_latents else latents.new_empty(0)
    return torch.empty_like(mean), torch.empty_like(log_std), grad_latents


def _rows(mean: Tensor) -> Tensor:
    return mean.new_empty(mean.shape[0], dtype=torch.float32)


def _save_ppo(ctx, inputs, output):
    latents, mean, log_std, *_, ctx.kl_coef, ctx.backend = inputs
    ctx.save_for_backward(latents, mean, log_std, output[-1])
    ctx.set_materialize_grads(False)


def _ppo_backward(ctx, grad_totals):
    """Only the loss, the first of the totals, has a gradient; the others are statistics."""
    if grad_totals is None:
        return (None,) * 8
    return None, *ppo_gradients(ctx, grad_totals[0], gaussian_backward), None, None, None, None, None


gaussian_log_prob.register_autograd(
    lambda ctx, grad: log_prob_backward(ctx, grad, gaussian_backward), setup_context=save_log_prob
)
ppo_clip_loss.register_autograd(lambda ctx, grad, *_: _ppo_backward(ctx, grad), setup_context=_save_ppo)
