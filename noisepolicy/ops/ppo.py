"""The clipped PPO loss of a Gaussian policy, with its exact KL to the prior.

    ratio = exp(log_prob - old_log_prob)
    loss  = mean( -min(ratio A, clip(ratio, 1 - c, 1 + c) A) ) + kl_coef mean( KL(N(mean, std^2), N(0, I)) )

(Schulman et al., arXiv 1707.06347, equation 7.) Log-densities are sums over the action's dimensions, so the clip
binds at a total mean shift of about `clip_range` standard deviations, whatever the dimension.
"""

from typing import NamedTuple

import torch

from noisepolicy.ops.dispatch import resolve
from noisepolicy.ops.layout import check_fp32, policy_rows


class PpoStats(NamedTuple):
    """Of one `ppo_clip_loss` call, detached."""

    log_prob: torch.Tensor
    """`(batch,)`, under the current policy."""
    ratio: torch.Tensor
    """`(batch,)`"""
    kl_to_prior: torch.Tensor
    """`(batch,)`, nats, exact."""
    approx_kl: torch.Tensor
    """Scalar, nats: mean of `ratio - 1 - log(ratio)`, an estimate of KL(old, new)."""
    clip_fraction: torch.Tensor
    """Scalar: the share of rows whose ratio is outside the clip range."""


def ppo_clip_loss(
    latents: torch.Tensor,
    mean: torch.Tensor,
    log_std: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip_range: float,
    kl_coef: float = 0.0,
    backend: str = "auto",
) -> tuple[torch.Tensor, PpoStats]:
    """The loss above, differentiable in `mean` and `log_std`; the gradients are computed with it, in one call.

    Args:
        latents: the action taken (latents or coefficients), float32, shaped as `mean`.
        mean: `(batch, *action_shape)`; float32, float16 or bfloat16.
        log_std: the same dtype, of a shape that broadcasts to `mean`'s.
        old_log_prob: float32 `(batch,)`, stored when the action was drawn.
        advantages: float32 `(batch,)`.
        clip_range: how far the ratio may leave 1 before its gradient stops; positive.
        kl_coef: loss per nat of KL to the prior.
        backend: `"auto"`, `"cpp"` or `"torch"`.

    Returns:
        The scalar loss (0 for an empty batch) and `PpoStats`.

    Raises:
        ValueError: for shapes, dtypes, devices that do not fit, or a clip range that is not positive.
        RuntimeError: if the named backend cannot run here.
    """
    if not clip_range > 0:
        raise ValueError(f"clip_range must be positive, got {clip_range!r}")
    mean_rows, log_std_rows = policy_rows(mean, log_std)
    latents = check_fp32("latents", latents, tuple(mean.shape), mean.device)
    batch = (mean.shape[0],)
    old_log_prob = check_fp32("old_log_prob", old_log_prob, batch, mean.device)
    advantages = check_fp32("advantages", advantages, batch, mean.device)
    module = resolve(backend, mean)
    loss, *rows = _PpoClipLoss.apply(
        module, latents.reshape(mean_rows.shape), mean_rows, log_std_rows, old_log_prob, advantages,
        float(clip_range), float(kl_coef),
    )  # fmt: skip
    log_prob, ratio, kl_to_prior = rows
    divisor = max(batch[0], 1)
    return loss, PpoStats(
        log_prob=log_prob,
        ratio=ratio,
        kl_to_prior=kl_to_prior,
        approx_kl=(ratio - 1 - (log_prob - old_log_prob)).sum() / divisor,
        clip_fraction=((ratio - 1).abs() > clip_range).sum() / divisor,
    )


class _PpoClipLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, module, latents, mean, log_std, old_log_prob, advantages, clip_range, kl_coef):
        rows = module.ppo_clip_loss(latents, mean, log_std, old_log_prob, advantages, clip_range, kl_coef)
        ctx.save_for_backward(rows.grad_mean.to(mean.dtype), rows.grad_log_std.to(log_std.dtype))
        ctx.mark_non_differentiable(rows.log_prob, rows.ratio, rows.kl_to_prior)
        loss = (kl_coef * rows.kl_to_prior - rows.objective).sum() / max(mean.shape[0], 1)
        return loss, rows.log_prob, rows.ratio, rows.kl_to_prior

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        grad_mean, grad_log_std = ctx.saved_tensors
        return None, None, grad_loss * grad_mean, grad_loss * grad_log_std, None, None, None, None
