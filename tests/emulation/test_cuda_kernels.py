"""The CUDA kernels, run on the CPU through the product's bindings and backend module, against the torch reference.

Each check is then shown to catch the faults it is there for, planted one at a time in the source.
"""

import math

import pytest
import torch

from noisepolicy.ops import reference
from noisepolicy.ops.layout import Spectrum

from ..sampling import everyday

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

# (mean's shape, log_std's): full, per channel, per row; rows that begin anywhere, one chunk (512) and several.
POLICIES = [
    *(((3, size), (3, size)) for size in (1, 3, 4, 5, 127, 512, 1023, 1024, 1025, 4103)),
    *(((3, size), (3,)) for size in (1, 5, 1024, 4103)),
    ((3, 5, 7), (3, 5)),
    ((3, 4, 6, 2), (3, 4)),
    ((1, 3, 2, 515), (1, 3, 2)),
    ((2, 4, 3, 6), (2, 4, 3)),
    ((0, 5), (0, 5)),
    ((0, 5), (0,)),
    ((2, 0), (2,)),
]
# channels, extent, bands: whole quads to a line, lines that split quads, video, all bands, a long line in pieces.
SPECTRA = [
    (8, (1, 8, 8), (1, 8, 8)),
    (2, (1, 40, 64), (1, 4, 8)),
    (3, (1, 5, 7), (1, 2, 3)),
    (2, (4, 6, 9), (2, 3, 4)),
    (1, (3, 70, 33), (3, 2, 5)),
    (2, (1, 1, 4101), (1, 1, 6)),
]


def make_policy(shape, log_std_shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(shape, generator=generator).to(dtype)
    return mean, (0.3 * torch.randn(log_std_shape, generator=generator)).to(dtype)


def assert_same(ours, expected, rtol=1e-6, atol=1e-6):
    for tensor, other in zip(ours, expected, strict=True):
        assert tensor.dtype == other.dtype
        torch.testing.assert_close(tensor, other.reshape(tensor.shape), rtol=rtol, atol=atol)


def check_sample(cuda, shape, log_std_shape, dtype=torch.float32, seed=2**40 + 5, offset=2**33):
    policy = make_policy(shape, log_std_shape, dtype)
    latents, log_prob = cuda.gaussian_sample(*policy, seed, offset)
    expected_latents, expected_log_prob = reference.gaussian_sample(*policy, seed, offset)
    # A unit in the last place of exp differs between processors, so latents far from 0 have a relative tolerance.
    assert_same([latents], [expected_latents], rtol=1e-6, atol=1e-6)
    assert_same([log_prob], [expected_log_prob], rtol=1e-6, atol=1e-5)


def check_log_prob(cuda, shape, log_std_shape, dtype=torch.float32):
    policy = make_policy(shape, log_std_shape, dtype)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    arguments = (latents, *policy)
    assert_same([cuda.gaussian_log_prob(*arguments)], [reference.gaussian_log_prob(*arguments)], atol=1e-5)


def check_ppo(cuda, shape, log_std_shape, dtype=torch.float32):
    policy = make_policy(shape, log_std_shape, dtype)
    latents, _ = reference.gaussian_sample(*policy, 3, 0)
    generator = torch.Generator().manual_seed(2)
    # The same log_prob on both sides, up to its own rounding: the ratio would magnify it.
    old = cuda.gaussian_log_prob(latents, *policy) + torch.randn(shape[0], generator=generator)
    advantages = torch.randn(shape[0], generator=generator)
    arguments = (latents, *policy, old, advantages, 0.2, 0.05)
    ours, expected = cuda.ppo_clip_loss(*arguments), reference.ppo_clip_loss(*arguments)
    assert torch.equal(ours.log_prob, cuda.gaussian_log_prob(latents, *policy))
    error = 1e-6 * float(expected.log_prob.abs().max()) if shape[0] else 0.0
    assert_same([ours.log_prob, ours.kl_to_prior], [expected.log_prob, expected.kl_to_prior], atol=1e-5)
    assert_same(ours, expected, rtol=1e-5 + error, atol=1e-5 + error)


def check_backward(cuda, shape, log_std_shape, dtype=torch.float32):
    policy = make_policy(shape, log_std_shape, dtype)
    generator = torch.Generator().manual_seed(2)
    latents, weights = torch.randn(shape, generator=generator), torch.randn(2, shape[0], generator=generator)
    ours = cuda.gaussian_backward(latents, *policy, *weights, True)
    expected = reference.gaussian_backward(latents, *policy, *weights, True)
    run = max(1, math.prod(shape) // max(policy[1].numel(), 1))
    assert_same(ours[:2], expected[:2], rtol=2 * ROUNDING[dtype], atol=1e-5 * run**0.5)
    assert_same(ours[2:], expected[2:], rtol=1e-5, atol=1e-5)
    assert cuda.gaussian_backward(latents, *policy, *weights, False)[2] is None


def check_spectral(cuda, channels, extent, bands, batch=3, dtype=torch.float32, per_channel=False):
    shape = (batch, channels, *bands)
    policy = make_policy(shape, shape[:2] if per_channel else shape, dtype)
    arguments = (*policy, Spectrum(channels, extent, bands), 4, 2**64 - 3)
    latents, coefficients, log_prob = cuda.spectral_sample(*arguments)
    expected = reference.spectral_sample(*arguments)
    assert_same((latents, coefficients), expected[:2], rtol=1e-6, atol=4e-6)
    assert_same([log_prob], expected[2:], rtol=1e-6, atol=1e-4)


def check_prior(cuda, channels, extent, bands):
    spectrum = Spectrum(channels, extent, bands)
    shape = (3, channels, *bands)
    latents, _, _ = cuda.spectral_sample(torch.zeros(shape), torch.zeros(3), spectrum, 8, 5)
    prior, _ = cuda.gaussian_sample(torch.zeros(3, channels, *extent), torch.zeros(3), 8, 5)
    assert torch.equal(latents, prior)


def check_rows_differ(cuda):
    """Every row has counters of its own, also where its size is no multiple of four."""
    noise, _ = cuda.gaussian_sample(torch.zeros(64, 5), torch.zeros(64), 7, 0)
    assert len(torch.unique(noise)) == noise.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("check", [check_sample, check_log_prob, check_ppo, check_backward])
def test_gaussian_ops(emulated, check, dtype):
    for shape, log_std_shape in POLICIES:
        check(emulated, shape, log_std_shape, dtype)


@pytest.mark.parametrize("case", SPECTRA)
def test_spectral_sample(emulated, case):
    check_spectral(emulated, *case)
    check_spectral(emulated, *case, dtype=torch.bfloat16, per_channel=True)
    check_spectral(emulated, *case, batch=0)
    check_prior(emulated, *case)


def test_rows_differ(emulated):
    check_rows_differ(emulated)


def test_too_many_bands_are_refused(emulated):
    mean = torch.zeros(1, 1, 1, 1, 2049)
    with pytest.raises(ValueError, match="bands on the last axis"):
        emulated.spectral_sample(mean, mean, Spectrum(1, (1, 1, 2049), (1, 1, 2049)), 0, 0)


@pytest.mark.parametrize("offset", [2**32 - 2, 2**63 - 2, 2**64 - 2])
def test_the_counter_wraps(emulated, offset):
    check_sample(emulated, (3, 10), (3,), seed=2**64 - 1, offset=offset)


def test_batch_splits_change_nothing(emulated):
    mean, log_std = make_policy((8, 1023), (8, 1023))
    whole, log_prob = emulated.gaussian_sample(mean, log_std, 9, 4)
    parts = [emulated.gaussian_sample(mean[s], log_std[s], 9, 4 + s.start * 256) for s in (slice(0, 3), slice(3, 8))]
    assert torch.equal(whole, torch.cat([latents for latents, _ in parts]))
    assert torch.equal(log_prob, torch.cat([part for _, part in parts]))


def test_a_misaligned_start_changes_nothing(emulated):
    buffer = torch.randn(2 * 1024 + 1)
    aligned, shifted = buffer[1:].reshape(2, 1024).clone(), buffer[1:].reshape(2, 1024)
    log_std = torch.zeros(2)
    for ours, other in zip(
        emulated.gaussian_sample(aligned, log_std, 1, 0), emulated.gaussian_sample(shifted, log_std, 1, 0), strict=True
    ):
        assert torch.equal(ours, other)


def test_more_rows_than_a_grid_is_high(emulated):
    check_log_prob(emulated, (66_000, 1), (66_000,))


def test_long_rows_are_summed_accurately(emulated):
    mean, log_std = make_policy((1, 262_144), (1,))
    latents = torch.randn(1, 262_144)
    exact = reference.gaussian_log_prob(latents, mean, log_std)
    torch.testing.assert_close(emulated.gaussian_log_prob(latents, mean, log_std), exact, rtol=5e-7, atol=0)


def test_nan_reaches_the_results(emulated):
    nan, zeros = torch.full((2, 3), math.nan), torch.zeros(2, 3)
    assert emulated.gaussian_sample(zeros, nan, 0, 0)[1].isnan().all()
    forward = emulated.ppo_clip_loss(zeros, nan, zeros, torch.zeros(2), torch.ones(2), 0.2, 0.0)
    assert forward.totals[0].isnan() and forward.ratio.isnan().all()


def test_neither_order_nor_grid_changes_a_bit(emulated, monkeypatch):
    mean, log_std = make_policy((5, 3, 4, 230), (5, 3))
    latents, weights = torch.randn(mean.shape), torch.randn(2, 5)
    spectrum = Spectrum(3, (4, 20, 35), (4, 10, 23))
    policy = (mean, log_std)

    def results():
        yield from emulated.gaussian_sample(*policy, 1, 2)
        yield from emulated.spectral_sample(*policy, spectrum, 1, 2)
        yield from emulated.ppo_clip_loss(latents, *policy, *weights, 0.2, 0.1)
        yield from emulated.gaussian_backward(latents, *policy, *weights, True)

    expected = list(results())
    for order, processors in ((1, 1), (2, 3), (7, 132)):
        monkeypatch.setenv("CUDA_ON_CPU_ORDER", str(order))
        monkeypatch.setenv("CUDA_ON_CPU_PROCESSORS", str(processors))
        assert all(torch.equal(a, b) for a, b in zip(results(), expected, strict=True))


# file, its text, what it becomes, and the unit to compile: see Bug in conftest.py
PLANTED = {
    "swapped Box-Muller outputs": (
        (
            "philox.h",
            "box_muller(words.z, words.w, normals.z, normals.w)",
            "box_muller(words.z, words.w, normals.w, normals.z)",
            "gaussian.cu",
        ),
        lambda cuda: check_sample(cuda, (3, 8), (3, 8)),
    ),
    "counters overlap between rows": (
        ("cuda/gaussian.cu", "quads = (size + 3) / 4", "quads = size / 4", "gaussian.cu"),
        check_rows_differ,
    ),
    "counter cut to 32 bits": (
        (
            "cuda/gaussian.cu",
            "offset + static_cast<uint64_t>(row * quads + quad)",
            "static_cast<uint32_t>(offset + row * quads + quad)",
            "gaussian.cu",
        ),
        lambda cuda: check_sample(cuda, (3, 8), (3, 8)),
    ),
    "wrong tail of a row": (
        (
            "cuda/device.h",
            "if (i < count) quad.v[i] = to_float(from[i]);",
            "if (i + 1 < count) quad.v[i] = to_float(from[i]);",
            "gaussian.cu",
        ),
        lambda cuda: check_log_prob(cuda, (3, 5), (3, 5)),
    ),
    "run of a log_std one too long": (
        ("cuda/device.h", "if (left == 0) {", "if (left < 0) {", "gaussian.cu"),
        lambda cuda: check_log_prob(cuda, (3, 5, 7), (3, 5)),
    ),
    "a row's last partial sum left out": (
        ("cuda/device.cu", "i < num_partials; i += kWarp", "i < num_partials - 1; i += kWarp", "device.cu"),
        lambda cuda: check_log_prob(cuda, (3, 1025), (3,)),
    ),
    "wrong sign of the mean's gradient": (
        ("cuda/gaussian.cu", "of_value + kl_weight * m.v[k]", "of_value - kl_weight * m.v[k]", "gaussian.cu"),
        lambda cuda: check_backward(cuda, (3, 5), (3, 5)),
    ),
    "wrong sign of the loss's gradient": (
        ("cuda/ppo.cu", "? -unclipped / divisor", "? unclipped / divisor", "ppo.cu"),
        lambda cuda: check_ppo(cuda, (64, 5), (64, 5)),
    ),
    "clipped on one side only": (
        ("cuda/ppo.cu", "ratio < low ? low", "ratio < -low ? low", "ppo.cu"),
        lambda cuda: check_ppo(cuda, (64, 5), (64, 5)),
    ),
    "noise drawn twice from different counters": (
        (
            "cuda/spectral.cu",
            "Quad value = draw4(seed, counter +",
            "Quad value = draw4(seed, 1 + counter +",
            "spectral.cu",
        ),
        lambda cuda: check_spectral(cuda, *SPECTRA[0]),
    ),
    "the shift rounded through the action": (
        (
            "cuda/spectral.cu",
            "shift[row * size + k] = action - low;",
            "shift[row * size + k] = action - low + 1e-7f;",
            "spectral.cu",
        ),
        lambda cuda: check_prior(cuda, *SPECTRA[0]),
    ),
}


@pytest.mark.parametrize("name", everyday(PLANTED, 3))
def test_a_planted_bug_is_caught(cuda_build, as_backend, name):
    bug, check = PLANTED[name]
    with pytest.raises(AssertionError, match=r"not close|torch\.equal|unique"):
        check(as_backend(cuda_build.module(bug)))
