"""The Triton kernels in Triton's interpreter; `test_triton_interpreter.py` runs this in a process of its own."""

import pytest
import torch
from triton_checks import (
    GuardedAllocator,
    assert_same,
    check_backward,
    check_nan_is_reported,
    check_ppo,
    check_prior,
    check_sample,
    check_spectral,
    make_policy,
)

from noisepolicy import ops
from noisepolicy.ops import layout, triton_backend

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [1, 3, 4, 5, 127, 1023, 1025, 4103]


@pytest.fixture(autouse=True)
def guards(monkeypatch):
    allocator = GuardedAllocator()
    monkeypatch.setattr(triton_backend, "_empty", allocator)
    yield
    allocator.check()


@pytest.mark.parametrize("size", SIZES)
def test_every_size(size):
    for check in (check_sample, check_ppo, check_backward):
        check((3, size))
        check((3, size), (3,))
        check((1, size))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("log_std_shape", [(2, 3, 2, 5), (2, 3, 2), (2, 3), (2,)], ids=str)
def test_storage_types_and_log_std_layouts(dtype, log_std_shape):
    for check in (check_sample, check_ppo, check_backward):
        check((2, 3, 2, 5), log_std_shape, dtype)
    check_backward((2, 3, 2, 5), log_std_shape, dtype, needs_latents=False)
    check_spectral((3, 4, 6), (2, 5), log_std_shape, dtype)


@pytest.mark.parametrize(
    ("latent_shape", "bands"),
    [((2, 8, 8), (3, 4)), ((1, 18, 4), (17, 2)), ((2, 5, 7), (2, 3)), ((1, 3, 4, 6), (3, 4, 2)), ((1, 3, 1), (3, 1))],
    ids=str,
)
def test_spectral_shapes(latent_shape, bands, monkeypatch):
    check_spectral(latent_shape, bands)
    check_prior(latent_shape, bands)
    monkeypatch.setattr(triton_backend, "MAX_BLOCK", 32)
    check_spectral(latent_shape, bands)


def test_many_blocks(monkeypatch):
    """Blocks of partial sums, and of rows, beyond the first."""
    monkeypatch.setattr(triton_backend, "MAX_BLOCK", 8)
    for log_std_shape in ((2, 65), (2,)):
        check_sample((2, 65), log_std_shape)
        check_backward((2, 65), log_std_shape)
    check_ppo((9, 2), (9,))


def test_empty_batch():
    for log_std_shape in ((0,), (0, 5)):
        for check in (check_sample, check_ppo, check_backward):
            check((0, 5), log_std_shape)
    spectrum = layout.make_spectrum((2, 2, 2), (2, 4, 4))
    latents, coefficients, log_prob = triton_backend.spectral_sample(
        torch.zeros(0, 2, 2, 2), torch.zeros(0), spectrum, 0, 0
    )
    assert latents.shape == (0, 2, 1, 4, 4) and coefficients.shape == (0, 2, 2, 2) and log_prob.shape == (0,)


@pytest.mark.parametrize("offset", [2**31 - 1, 2**32 - 2, 2**63 - 2, 2**64 - 2])
def test_counters_wrap(offset):
    check_sample((3, 10), seed=2**64 - 1, offset=offset)


def test_batch_splits_change_nothing():
    mean, log_std = make_policy((5, 123), (5,))
    whole = triton_backend.gaussian_sample(mean, log_std, 9, 4)
    first = triton_backend.gaussian_sample(mean[:2], log_std[:2], 9, 4)
    rest = triton_backend.gaussian_sample(mean[2:], log_std[2:], 9, 4 + 2 * ops.num_counters((123,)))
    for split_whole, *parts in zip(whole, first, rest, strict=True):
        assert torch.equal(split_whole, torch.cat(parts))


def test_long_rows_are_summed_accurately(monkeypatch):
    monkeypatch.setattr(triton_backend, "MAX_BLOCK", 8192)
    mean, log_std = make_policy((1, 262_144), (1,))
    latents = mean + torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    exact = torch.distributions.Normal(mean.double(), log_std.double().exp()).log_prob(latents.double()).sum(1)
    log_prob = triton_backend.gaussian_log_prob(latents, mean, log_std)
    torch.testing.assert_close(log_prob.double(), exact, rtol=1e-6, atol=0)


def test_nan_is_reported():
    check_nan_is_reported()


def test_public_ops_and_their_gradients():
    mean, log_std = make_policy((3, 4, 3, 5), (1, 4, 1, 1))
    latents, old_log_prob = ops.gaussian_sample(mean, log_std, seed=1, backend="triton")
    results = {}
    for backend in ("triton", "torch"):
        leaves = [tensor.clone().requires_grad_() for tensor in (mean, log_std)]
        log_prob = ops.gaussian_log_prob(latents, *leaves, backend=backend)
        loss, _ = ops.ppo_clip_loss(
            latents, *leaves, old_log_prob + 0.1, torch.ones(3), clip_range=0.2, kl_coef=0.1, backend=backend
        )
        (loss + 0.1 * log_prob.sum()).backward()
        results[backend] = [loss.detach(), *(leaf.grad for leaf in leaves)]
    assert_same(results["triton"], results["torch"], ["loss", "grad_mean", "grad_log_std"], 2e-5, 2e-5)
