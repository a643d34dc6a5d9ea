"""Sampling and log-density of a diagonal Gaussian over initial latents.

For a row with mean m, log standard deviation s and noise e ~ N(0, I):

    latents = m + exp(s) e        log_prob = sum_d( -e_d^2 / 2 - s_d - log(2 pi) / 2 )

The noise is Philox4x32-10 addressed by counter: element d of row r is normal d % 4 of counter
`offset + r * ceil(D / 4) + d // 4`. The same seed and offset give the same latents on every backend (to about 5e-7)
and however a batch is split; rows r and up of a batch are a batch with the offset moved by `r * ceil(D / 4)`.
"""

import math

import torch

from noisepolicy.ops import library
from noisepolicy.ops.dispatch import resolve
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
        return library.gaussian_sample(
            mean.detach(), log_std.detach(), library.to_int64(seed), library.to_int64(offset), backend
        )
    return resolve(backend, mean).gaussian_sample(mean, log_std, seed, offset)


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
        latents, coefficients, log_prob = library.spectral_sample(
            mean.detach(),
            log_std.detach(),
            list(spectrum.extent),
            list(spectrum.bands),
            library.to_int64(seed),
            library.to_int64(offset),
            backend,
        )
    else:
        latents, coefficients, log_prob = resolve(backend, mean).spectral_sample(mean, log_std, spectrum, seed, offset)
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
        return library.gaussian_log_prob(latents, mean, log_std, backend)
    if needs_gradient(latents, mean, log_std):
        return library.EagerLogProb.apply(latents, mean, log_std, backend)
    return resolve(backend, mean).gaussian_log_prob(latents, mean, log_std)


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
