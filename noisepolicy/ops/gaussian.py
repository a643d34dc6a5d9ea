"""The ops of a diagonal Gaussian over initial latents: sampling, log-density, the PPO loss, and their gradients.

For a row with mean m, log standard deviation s and noise e ~ N(0, I):

    latents = m + exp(s) e        log_prob = sum_d( -e_d^2 / 2 - s_d - log(2 pi) / 2 )

The noise is Philox4x32-10 addressed by counter: element d of row r is normal d % 4 of counter
`offset + r * ceil(D / 4) + d // 4`. The same seed and offset give the same latents on every backend (to about 5e-7)
and however a batch is split; rows r and up of a batch are a batch with the offset moved by `r * ceil(D / 4)`.

    ratio = exp(log_prob - old_log_prob)
    loss  = mean( -min(ratio A, clip(ratio, 1 - c, 1 + c) A) ) + kl_coef mean( KL(N(mean, std^2), N(0, I)) )

(Schulman et al., arXiv 1707.06347, equation 7.) Log-densities are sums over the action's dimensions, so the clip
binds at a total mean shift of about `clip_range` standard deviations, whatever the dimension.

A call goes straight to its backend, through an `autograd.Function` where a gradient is wanted. torch.compile and
torch.export trace the registered ops of `library.py` instead.
"""

import math
from typing import NamedTuple

import torch

from noisepolicy.ops.dispatch import choose
from noisepolicy.ops.layout import check_counter, check_fp32, make_spectrum, needs_gradient, policy_rows


def gaussian_sample(
    mean: torch.Tensor, log_std: torch.Tensor, *, seed: int, offset: int = 0, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw `latents ~ N(mean, exp(log_std)^2)` and compute their exact log-density in one pass, without gradient.

    Args:
        mean: `(batch, *latent_shape)`; float32, float16 or bfloat16.
        log_std: the same dtype, of a shape that broadcasts to `mean`'s.
        seed: 64-bit key of the generator.
        offset: first counter; a batch uses `batch * ceil(D / 4)` of them.
        backend: `"auto"`, or one of `available_backends()`: `"cpp"`, `"cuda"`, `"triton"`, `"torch"`.

    Returns:
        latents: float32, shaped as `mean`.
        log_prob: float32 `(batch,)`, summed over a row's elements.

    Raises:
        ValueError: for shapes, dtypes, devices or counters that do not fit, or NaN in `log_std` (on a GPU, where the
            check would stall the stream, NaN reaches `log_prob` instead).
        RuntimeError: if the named backend cannot run here.
    """
    check_counter(seed, offset)
    mean, log_std = policy_rows(mean, log_std)
    if torch.compiler.is_compiling():
        return torch.ops.noisepolicy.gaussian_sample(
            mean.detach(), log_std.detach(), _to_int64(seed), _to_int64(offset), backend
        )
    return choose(backend, mean.device).gaussian_sample(mean, log_std, seed, offset)


def spectral_sample(
    mean: torch.Tensor,
    log_std: torch.Tensor,
    *,
    latent_shape: tuple[int, ...],
    seed: int,
    offset: int = 0,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw white noise and replace its low band (an orthonormal DCT-II per channel) by the policy's, without gradient.

    With zero `mean` and `log_std` the latents are `gaussian_sample`'s of the prior, bit for bit.

    Args:
        mean: mean of the coefficients, `(batch, channels, bands, bands)`, for video `(batch, channels, frame_bands,
            bands, bands)`; float32, float16 or bfloat16.
        log_std: the same dtype, of a shape that broadcasts to `mean`'s.
        latent_shape: `(channels, height, width)` or `(channels, frames, height, width)`.
        seed, offset, backend: as in `gaussian_sample`; a row uses `ceil(prod(latent_shape) / 4)` counters.

    Returns:
        latents: float32 `(batch, *latent_shape)`.
        coefficients: the latents' low band, which is the action; float32, shaped as `mean`.
        log_prob: log-density of the coefficients, float32 `(batch,)`. The rest of the noise has the prior's
            distribution under every policy, so it cancels from a ratio.

    Raises:
        ValueError: for shapes, dtypes, devices or counters that do not fit.
        RuntimeError: if the named backend cannot run here.
    """
    check_counter(seed, offset)
    spectrum = make_spectrum(tuple(mean.shape[1:]), tuple(latent_shape))
    mean, log_std = policy_rows(mean, log_std)
    if torch.compiler.is_compiling():
        latents, coefficients, log_prob = torch.ops.noisepolicy.spectral_sample(
            mean.detach(),
            log_std.detach(),
            list(spectrum.extent),
            list(spectrum.bands),
            _to_int64(seed),
            _to_int64(offset),
            backend,
        )
    else:
        latents, coefficients, log_prob = choose(backend, mean.device).spectral_sample(
            mean, log_std, spectrum, seed, offset
        )
    return latents.reshape(-1, *latent_shape), coefficients, log_prob


def gaussian_log_prob(
    latents: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor, *, backend: str = "auto"
) -> torch.Tensor:
    """Compute the log-density of `latents` under `N(mean, exp(log_std)^2)`, differentiable in all three.

    Args:
        latents: float32, shaped as `mean`. Lower precisions are refused: rounding an action changes its ratio.
        mean, log_std, backend: as in `gaussian_sample`.

    Returns:
        float32 `(batch,)`, summed over a row's elements.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit.
        RuntimeError: if the named backend cannot run here.
    """
    latents = check_fp32("latents", latents, tuple(mean.shape), mean.device)
    mean, log_std = policy_rows(mean, log_std)
    if torch.compiler.is_compiling():
        return torch.ops.noisepolicy.gaussian_log_prob(latents, mean, log_std, backend)
    if needs_gradient(latents, mean, log_std):
        return EagerLogProb.apply(latents, mean, log_std, backend)
    return choose(backend, mean.device).gaussian_log_prob(latents, mean, log_std)


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
        totals, *rows, _ = torch.ops.noisepolicy.ppo_clip_loss(*arguments, backend)
        return _result(totals, [row.detach() for row in rows])
    module = choose(backend, mean.device)
    if not needs_gradient(mean, log_std):
        totals, *rows, _ = module.ppo_clip_loss(*arguments)
        return _result(totals, rows)
    gradients = None
    if hasattr(module, "ppo_clip_loss_and_gradients"):
        (totals, *rows, grad_log_prob), gradients = module.ppo_clip_loss_and_gradients(*arguments)
    else:
        totals, *rows, grad_log_prob = module.ppo_clip_loss(*arguments)
    loss, stats = _result(totals, rows)
    pending = PpoBackward(loss, latents, grad_log_prob, float(kl_coef), backend, gradients)
    return EagerPpoGradient.apply(mean, log_std, pending), stats


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


def gaussian_kl(
    mean: torch.Tensor,
    log_std: torch.Tensor,
    other_mean: torch.Tensor | float = 0.0,
    other_log_std: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """Compute the exact KL(N(mean, std^2), N(other_mean, other_std^2)) of each row in nats: `(batch,)`, differentiable.
    All arguments broadcast to `mean`'s shape `(batch, ...)`; the default for the second is the prior N(0, I).
    """
    mean, log_std = mean.float(), torch.as_tensor(log_std, device=mean.device).float()
    difference = log_std - other_log_std
    precision = torch.exp(-2 * torch.as_tensor(other_log_std, device=mean.device).float())
    kl = 0.5 * ((mean - other_mean) ** 2 * precision + torch.exp(2 * difference) - 1) - difference
    return kl.expand(mean.shape).flatten(1).sum(1)


def num_counters(shape: tuple[int, ...]) -> int:
    """Return the number of counters that one row of noise of this shape uses."""
    return math.ceil(math.prod(shape) / 4)


def save_log_prob(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def log_prob_backward(ctx, grad_output, run_backward):
    needs_latents = ctx.needs_input_grad[0]
    weights = grad_output.contiguous(), torch.zeros_like(grad_output)
    grad_mean, grad_log_std, grad_latents = run_backward(*ctx.saved_tensors, *weights, needs_latents, ctx.backend)
    return grad_latents if needs_latents else None, grad_mean, grad_log_std, None


def ppo_gradients(ctx, grad_loss, run_backward):
    latents, mean, log_std, grad_log_prob = ctx.saved_tensors
    grad_kl = (grad_loss * (ctx.kl_coef / max(mean.shape[0], 1))).repeat(mean.shape[0])
    return run_backward(latents, mean, log_std, grad_loss * grad_log_prob, grad_kl, False, ctx.backend)[:2]


def _eager_backward(latents, mean, log_std, grad_log_prob, grad_kl, needs_latents, backend):
    module = choose(backend, mean.device)
    return module.gaussian_backward(latents, mean, log_std, grad_log_prob, grad_kl, needs_latents)


def _once(backward):
    """Apply `once_differentiable`, which costs ten microseconds, only where a second derivative could be asked for."""
    guarded = torch.autograd.function.once_differentiable(backward)

    def either(ctx, grad_output):
        return (guarded if torch.is_grad_enabled() else backward)(ctx, grad_output)

    return either


class EagerLogProb(torch.autograd.Function):
    """`gaussian_log_prob` with its gradient."""

    @staticmethod
    def forward(ctx, latents, mean, log_std, backend):
        save_log_prob(ctx, (latents, mean, log_std, backend), None)
        return choose(backend, mean.device).gaussian_log_prob(latents, mean, log_std)

    @staticmethod
    @_once
    def backward(ctx, grad_output):
        return log_prob_backward(ctx, grad_output, _eager_backward)


class PpoBackward(NamedTuple):
    """A computed loss and the inputs of its gradient, or the gradients if the backend has them ready."""

    loss: torch.Tensor
    latents: torch.Tensor
    grad_log_prob: torch.Tensor
    kl_coef: float
    backend: str
    gradients: tuple[torch.Tensor, torch.Tensor] | None


class EagerPpoGradient(torch.autograd.Function):
    """Attaches the gradient of `ppo_clip_loss` to a computed loss; one argument, since each costs microseconds."""

    @staticmethod
    def forward(ctx, mean, log_std, pending: PpoBackward):
        ctx.save_for_backward(pending.latents, mean, log_std, pending.grad_log_prob)
        ctx.kl_coef, ctx.backend, ctx.gradients = pending[3:]
        return pending.loss.clone()

    @staticmethod
    @_once
    def backward(ctx, grad_loss):
        # Given away once: what receives them may keep them as its own and add to them.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            gradients = ppo_gradients(ctx, grad_loss, _eager_backward)
        elif grad_loss.item() != 1:
            gradients = [gradient.mul_(grad_loss) for gradient in gradients]
        return *gradients, None


def _to_int64(value: int) -> int:
    """Convert a 64-bit counter to the signed integer that an op's schema can hold."""
    return value - 2**64 if value >= 2**64 // 2 else value
