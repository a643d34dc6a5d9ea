"""The cases of `noisepolicy-bench kernels`: inputs of each op, the op in PyTorch, and its limit on a machine.

Bytes are those that must move between memory and processor, counted once:

    gaussian_sample     reads mean and log_std, writes latents                           12 B an element in float32
    spectral_sample     writes latents; the coefficients are few                          4 B
    gaussian_log_prob   reads latents, mean and log_std                                  12 B
    ppo_clip_loss       reads the same, writes two gradients; forward and backward       20 B

The loss reads its inputs twice, because a gradient needs its row's log_prob; the second reading is not counted.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributions import Normal

from noisepolicy import ops
from noisepolicy.ops import dct_basis

OPS = ("gaussian_sample", "spectral_sample", "gaussian_log_prob", "ppo_clip_loss")
SAMPLING_OPS = OPS[:2]
CHANNELS, BANDS = 4, 8
CLIP_RANGE, KL_COEF = 0.2, 1e-3

_SEED = 1
# Log-densities are then small sums of large terms, and a ratio of two of them survives float32.
_LOG_STD = -0.5 - 0.5 * math.log(2 * math.pi)
# Tolerance of the loss and its gradients, relative to their largest value; storage in half precision rounds.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Case:
    """One op at one size."""

    op: str
    batch: int
    dim: int
    dtype: torch.dtype
    inputs: tuple[torch.Tensor, ...]
    """Inputs of `eager`; whole rows of `dim` elements come first."""
    eager: Callable[..., tuple[torch.Tensor, ...]]
    """The op in PyTorch; for the loss the forward alone."""
    call: Callable[[str], tuple[torch.Tensor, ...]]
    """The op on a backend, with gradients for the loss."""
    num_bytes: int

    @property
    def elements(self) -> int:
        return self.batch * self.dim

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device

    def run(self, function: Callable[..., tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        """Run `eager`, or `eager` compiled, on the inputs, with gradients for the loss."""
        result = function(*self.inputs)
        return _with_gradients(result[0], self.inputs) if self.op == "ppo_clip_loss" else result

    def check(
        self, who: str, results: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], slack: float = 1
    ) -> None:
        """Raise RuntimeError if results differ from the reference's by more than rounding, times `slack`."""
        for index, (ours, reference) in enumerate(zip(results, expected, strict=True)):
            difference = (ours.double() - reference.double()).abs().max().item()
            if self.op == "ppo_clip_loss":  # gradients scale with the ratio, which has the rounding of log_prob
                allowed = max(_TOLERANCE[self.dtype], 3e-7 * self.dim) * reference.abs().max().item()
            elif reference.ndim == 1:  # a row's sum: against the size of its terms, not of what is left of them
                allowed = max(1e-5, 1e-6 * self.dim)
            else:
                allowed = 4e-6
            allowed *= slack
            if not difference <= allowed:
                raise RuntimeError(
                    f"{who} computes a wrong {self.op} at batch {self.batch}, dim {self.dim}, {self.dtype}: result "
                    f"{index} differs from the reference by {difference:.3g}, allowed {allowed:.3g}"
                )


def make_case(op: str, batch: int, dim: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Make inputs from a fixed seed; `log_std` has a value for every element.

    Raises:
        ValueError: for a spectral `dim` that is not channels x height x width with room for the bands.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def policy(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = 0.1 * draw(*shape), _LOG_STD + 0.1 * draw(*shape)
        return mean.to(device, dtype), log_std.to(device, dtype)

    item = dtype.itemsize
    if op == "spectral_sample":
        height, width = _plane(dim)
        inputs = policy(batch, CHANNELS, BANDS, BANDS)
        arguments = {"latent_shape": (CHANNELS, height, width), "seed": _SEED}
        basis = dct_basis(BANDS, height, device), dct_basis(BANDS, width, device)
        num_bytes = 4 * batch * dim + (4 + 2 * item) * inputs[0].numel()
        return Case(
            op,
            batch,
            dim,
            dtype,
            (*inputs, *basis),
            eager_spectral_sample,
            lambda backend: ops.spectral_sample(*inputs, **arguments, backend=backend),
            num_bytes,
        )
    mean, log_std = policy(batch, dim)
    if op == "gaussian_sample":
        return Case(
            op,
            batch,
            dim,
            dtype,
            (mean, log_std),
            eager_gaussian_sample,
            lambda backend: ops.gaussian_sample(mean, log_std, seed=_SEED, backend=backend),
            (4 + 2 * item) * batch * dim,
        )
    latents, old_log_prob = ops.gaussian_sample(mean, log_std, seed=_SEED)
    mean = (mean.float() + 0.01 * dim**-0.5 * draw(batch, dim).to(device)).to(dtype)
    if op == "gaussian_log_prob":
        return Case(
            op,
            batch,
            dim,
            dtype,
            (latents, mean, log_std),
            eager_gaussian_log_prob,
            lambda backend: (ops.gaussian_log_prob(latents, mean, log_std, backend=backend),),
            (4 + 2 * item) * batch * dim,
        )
    inputs = latents, mean.requires_grad_(), log_std.requires_grad_(), old_log_prob, draw(batch).to(device)

    def loss(backend: str) -> tuple[torch.Tensor, ...]:
        value, _ = ops.ppo_clip_loss(*inputs, clip_range=CLIP_RANGE, kl_coef=KL_COEF, backend=backend)
        return _with_gradients(value, inputs)

    return Case(op, batch, dim, dtype, inputs, eager_ppo_clip_loss, loss, (4 + 4 * item) * batch * dim)


def _with_gradients(loss: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return loss.detach(), *torch.autograd.grad(loss, inputs[1:3])


def _plane(dim: int) -> tuple[int, int]:
    """Return height and width of latents of `dim` elements, as square as possible."""
    area, rest = divmod(dim, CHANNELS)
    height = next((n for n in range(math.isqrt(area), BANDS - 1, -1) if area % n == 0), 0)
    if rest or not height:
        raise ValueError(
            f"--dim {dim} is not {CHANNELS} x height x width with {BANDS} bands an axis; "
            f"use {CHANNELS} * n * n with n >= {BANDS}, or leave spectral_sample out with --op"
        )
    return height, area // height


def eager_gaussian_sample(mean: torch.Tensor, log_std: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample with `torch.distributions.Normal`, without its check of arguments, which would cost a fifth more."""
    mean, std = mean.float(), log_std.float().exp()
    latents = mean + std * torch.randn(mean.shape, device=mean.device)
    return latents, Normal(mean, std, validate_args=False).log_prob(latents).sum(1)


def eager_spectral_sample(
    mean: torch.Tensor, log_std: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sample with einsums: two project the noise on the low band, two put the difference back."""
    mean, std = mean.float(), log_std.float().exp()
    white = torch.randn(*mean.shape[:2], rows.shape[1], columns.shape[1], device=mean.device)
    low_band = torch.einsum("bcyu,vy->bcvu", torch.einsum("bcyx,ux->bcyu", white, columns), rows)
    coefficients = mean + std * low_band
    shift = torch.einsum("bcvu,vy->bcyu", coefficients - low_band, rows)
    latents = white + torch.einsum("bcyu,ux->bcyx", shift, columns)
    log_prob = Normal(mean, std, validate_args=False).log_prob(coefficients).flatten(1).sum(1)
    return latents, coefficients, log_prob


def eager_gaussian_log_prob(latents: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> tuple[torch.Tensor]:
    mean, log_std = mean.float(), log_std.float()
    noise = (latents - mean) * (-log_std).exp()
    return ((-0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(1),)


def eager_ppo_clip_loss(
    latents: torch.Tensor,
    mean: torch.Tensor,
    log_std: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
) -> tuple[torch.Tensor]:
    (log_prob,) = eager_gaussian_log_prob(latents, mean, log_std)
    ratio = (log_prob - old_log_prob).exp()
    clipped = ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    mean, log_std = mean.float(), log_std.float()
    kl_to_prior = (0.5 * (mean**2 + (2 * log_std).exp() - 1) - log_std).sum(1)
    return ((KL_COEF * kl_to_prior - objective).mean(),)


def machine_limit(case: Case) -> dict[str, tuple[Callable[[], Any], float]]:
    """Return the op's limits on this machine by name: a callable to time, and a factor for its time.

    The limit is the slowest of them. Copying an array of the case's size moves 8 bytes an element.
    """
    target, source = torch.empty(2, case.batch, case.dim, device=case.device).normal_()
    copy = (lambda: target.copy_(source)), case.num_bytes / (8 * case.elements)
    if case.device.type != "cpu" or ops.available_backends()["cpp"]:
        return {"copy": copy}
    from noisepolicy import _C

    threads = torch.get_num_threads()
    if case.op in SAMPLING_OPS:
        return {"random words": ((lambda: _C.bare_words(case.elements)), 1 / threads)}
    if case.op == "ppo_clip_loss":
        return {"copy": copy, "arithmetic": ((lambda: _C.bare_loss(case.elements)), 1 / threads)}
    return {"copy": copy}
