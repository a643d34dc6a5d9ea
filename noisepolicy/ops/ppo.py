"""The clipped PPO loss of a Gaussian policy, with its exact KL to the prior.

    ratio = exp(log_prob - old_log_prob)
    loss  = mean( -min(ratio A, clip(ratio, 1 - c, 1 + c) A) ) + kl_coef mean( KL(N(mean, std^2), N(0, I)) )

(Schulman et al., arXiv 1707.06347, equation 7.) Log-densities are sums over the action's dimensions, so the clip
binds at a total mean shift of about `clip_range` standard deviations, whatever the dimension.
"""

from typing import NamedTuple

import torch

from noisepolicy.ops import library
from noisepolicy.ops.dispatch import resolve
from noisepolicy.ops.gaussian import gaussian_log_prob
from noisepolicy.ops.layout import check_fp32, needs_gradient, policy_rows


class PpoStats(NamedTuple):
    """Statistics of one `ppo_clip_loss` call, detached."""

    log_prob: torch.Tensor
    """Log-density under the current policy, `(batch,)`."""
    ratio: torch.Tensor
    """`exp(log_prob - old_log_prob)`, `(batch,)`."""
    kl_to_prior: torch.Tensor
    """Exact KL to the prior in nats, `(batch,)`."""
    approx_kl: torch.Tensor
    """Mean of `ratio - 1 - log(ratio)`, an estimate of KL(old, new) in nats; a scalar."""
    clip_fraction: torch.Tensor
    """Share of rows whose ratio is outside the clip range; a scalar."""


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
    """Compute the loss above, differentiable in `mean` and `log_std`: a row reduction forward, one pass backward.

    Args:
        latents: the action taken (latents or coefficients), float32, shaped as `mean`.
        mean: `(batch, *action_shape)`; float32, float16 or bfloat16.
        log_std: the same dtype, of a shape that broadcasts to `mean`'s.
        old_log_prob: float32 `(batch,)`, stored when the action was drawn.
        advantages: float32 `(batch,)`.
        clip_range: how far the ratio may leave 1 before its gradient stops; positive.
        kl_coef: loss per nat of KL to the prior.
        backend: as in `gaussian_sample`.

    Returns:
        The scalar loss (0 for an empty batch) and `PpoStats`.

    Raises:
        ValueError: for shapes, dtypes, devices that do not fit, or a clip range that is not positive.
        RuntimeError: if the named backend cannot run here.
    """
    if not clip_range > 0:
        raise ValueError(f"clip_range must be positive, got {clip_range!r}")
    latents = check_fp32("latents", latents, tuple(mean.shape), mean.device)
    batch = tuple(mean.shape[:1])
    old_log_prob = check_fp32("old_log_prob", old_log_prob, batch, mean.device)
    advantages = check_fp32("advantages", advantages, batch, mean.device)
    mean, log_std = policy_rows(mean, log_std)
    arguments = (latents, mean, log_std, old_log_prob, advantages, float(clip_range), float(kl_coef))
    if torch.compiler.is_compiling():
        totals, *rows, _ = library.ppo_clip_loss(*arguments, backend)
        return _result(totals, [row.detach() for row in rows])
    module = resolve(backend, mean)
    if not needs_gradient(mean, log_std):
        totals, *rows, _ = module.ppo_clip_loss(*arguments)
        return _result(totals, rows)
    gradients = None
    if hasattr(module, "ppo_clip_loss_and_gradients"):
        (totals, *rows, grad_log_prob), gradients = module.ppo_clip_loss_and_gradients(*arguments)
    else:
        totals, *rows, grad_log_prob = module.ppo_clip_loss(*arguments)
    loss, stats = _result(totals, rows)
    pending = library.PpoBackward(loss, latents, grad_log_prob, float(kl_coef), backend, gradients)
    return library.EagerPpoGradient.apply(mean, log_std, pending), stats


def _result(totals: torch.Tensor, rows: list[torch.Tensor]) -> tuple[torch.Tensor, PpoStats]:
    loss, approx_kl, clip_fraction = totals.unbind()
    return loss, PpoStats(*rows, approx_kl.detach(), clip_fraction.detach())


def ppo_ratio(
    latents: torch.Tensor,
    mean: torch.Tensor,
    log_std: torch.Tensor,
    old_log_prob: torch.Tensor,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Compute `exp(log_prob - old_log_prob)`, float32 `(batch,)`, differentiable; arguments as in `ppo_clip_loss`."""
    old_log_prob = check_fp32("old_log_prob", old_log_prob, tuple(mean.shape[:1]), mean.device)
    return (gaussian_log_prob(latents, mean, log_std, backend=backend) - old_log_prob).exp()
