"""Sampling and log-density: every backend, dtype and shape, against torch.distributions in float64."""

import pytest
import torch
from scipy import fft
from torch.distributions import Normal, kl_divergence

from noisepolicy.ops import gaussian_kl, gaussian_log_prob, gaussian_sample, num_counters, spectral_sample

BACKENDS = ["cpp", "torch"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 4), (5, 123), (2, 4, 64, 64), (3, 8, 8, 8), (2, 4, 3, 5, 7)]


def make_policy(shape, dtype=torch.float32, log_std_shape=None):
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(shape, generator=generator).to(dtype)
    log_std = (0.3 * torch.randn(log_std_shape or shape, generator=generator)).to(dtype)
    return mean, log_std


def exact(mean, log_std):
    return Normal(mean.double(), log_std.double().exp().expand(mean.shape))


def row_sum(values):
    return values.flatten(1).sum(1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sample_log_prob_is_exact(backend, dtype, shape):
    mean, log_std = make_policy(shape, dtype)
    latents, log_prob = gaussian_sample(mean, log_std, seed=3, offset=11, backend=backend)
    assert latents.dtype == torch.float32 and latents.shape == mean.shape
    expected = row_sum(exact(mean, log_std).log_prob(latents.double()))
    torch.testing.assert_close(log_prob.double(), expected, rtol=2e-6, atol=2e-5)
    torch.testing.assert_close(
        gaussian_log_prob(latents, mean, log_std, backend=backend).double(), expected, rtol=1e-6, atol=1e-5
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_backends_give_the_same_latents(dtype, shape):
    mean, log_std = make_policy(shape, dtype)
    ours, our_log_prob = gaussian_sample(mean, log_std, seed=2**40 + 5, offset=2**33, backend="cpp")
    reference, log_prob = gaussian_sample(mean, log_std, seed=2**40 + 5, offset=2**33, backend="torch")
    torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(our_log_prob, log_prob, rtol=1e-6, atol=1e-5)


def test_backends_agree_where_the_counter_wraps():
    mean, log_std = make_policy((3, 10))
    for offset in (2**32 - 2, 2**63 - 2, 2**64 - 2):
        ours, reference = (
            gaussian_sample(mean, log_std, seed=2**64 - 1, offset=offset, backend=backend)[0] for backend in BACKENDS
        )
        torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(8, 123), (8, 4, 6, 5)])
def test_batch_splits_change_nothing(backend, shape):
    mean, log_std = make_policy(shape)
    whole, _ = gaussian_sample(mean, log_std, seed=9, offset=4, backend=backend)
    rest_offset = 4 + 3 * num_counters(shape[1:])
    first, _ = gaussian_sample(mean[:3], log_std[:3], seed=9, offset=4, backend=backend)
    rest, _ = gaussian_sample(mean[3:], log_std[3:], seed=9, offset=rest_offset, backend=backend)
    assert torch.equal(whole, torch.cat([first, rest]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("log_std_shape", [(), (1,), (3, 1, 1, 1), (3, 4, 1, 1), (1, 4, 1, 1), (1, 1, 1, 5), (6, 5)])
def test_log_std_broadcasts(backend, log_std_shape):
    mean, log_std = make_policy((3, 4, 6, 5), log_std_shape=log_std_shape)
    wide = log_std.expand(mean.shape).contiguous()
    narrow_result = gaussian_sample(mean, log_std, seed=1, backend=backend)
    for narrow, expected in zip(narrow_result, gaussian_sample(mean, wide, seed=1, backend=backend), strict=True):
        torch.testing.assert_close(narrow, expected)
    leaf = log_std.clone().requires_grad_()
    gaussian_log_prob(narrow_result[0], mean, leaf, backend=backend).sum().backward()
    exact_leaf = log_std.double().clone().requires_grad_()
    Normal(mean.double(), exact_leaf.exp()).log_prob(narrow_result[0].double()).sum().backward()
    torch.testing.assert_close(leaf.grad.double(), exact_leaf.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_log_prob_gradients(backend, shape):
    mean, log_std = make_policy(shape)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    weights = torch.linspace(-1, 2, shape[0])
    ours = [tensor.clone().requires_grad_() for tensor in (latents, mean, log_std)]
    (gaussian_log_prob(*ours, backend=backend) * weights).sum().backward()
    oracle = [tensor.double().requires_grad_() for tensor in (latents, mean, log_std)]
    (row_sum(Normal(oracle[1], oracle[2].exp()).log_prob(oracle[0])) * weights).sum().backward()
    for leaf, expected in zip(ours, oracle, strict=True):
        torch.testing.assert_close(leaf.grad.double(), expected.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_and_empty(backend):
    mean, log_std = make_policy((6, 4, 5))
    view = mean.transpose(1, 2)[::2]
    latents, log_prob = gaussian_sample(view, log_std.transpose(1, 2)[::2], seed=0, backend=backend)
    dense_latents, dense_log_prob = gaussian_sample(
        view.contiguous(), log_std.transpose(1, 2)[::2].contiguous(), seed=0, backend=backend
    )
    assert torch.equal(latents, dense_latents) and torch.equal(log_prob, dense_log_prob)
    empty = torch.zeros(0, 4, 8, 8)
    latents, log_prob = gaussian_sample(empty, torch.zeros(()), seed=0, backend=backend)
    assert latents.shape == empty.shape and log_prob.shape == (0,)


def dct_low_band(latents, bands):
    axes = tuple(range(2, latents.ndim))
    coefficients = fft.dctn(latents.double().numpy(), axes=axes, norm="ortho")
    index = (slice(None), slice(None), *(slice(count) for count in bands))
    return torch.from_numpy(coefficients[index].copy())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("latent_shape", "bands"),
    [((8, 8, 8), (8, 8)), ((4, 64, 64), (8, 8)), ((3, 5, 7), (2, 3)), ((4, 6, 8, 10), (2, 4, 4))],
)
def test_spectral_sample(backend, dtype, latent_shape, bands):
    mean, log_std = make_policy((3, latent_shape[0], *bands), dtype)
    latents, coefficients, log_prob = spectral_sample(
        mean, log_std, latent_shape=latent_shape, seed=4, offset=7, backend=backend
    )
    # scipy's DCT of the latents finds the policy's action in the low band ...
    torch.testing.assert_close(dct_low_band(latents, bands), coefficients.double(), rtol=1e-5, atol=1e-5)
    # ... drawn by the noise's own low band, and the rest of the noise untouched.
    prior = torch.zeros(3, *latent_shape)
    noise, _ = gaussian_sample(prior, torch.zeros(()), seed=4, offset=7, backend=backend)
    expected = mean.double() + log_std.double().exp() * dct_low_band(noise, bands)
    torch.testing.assert_close(coefficients.double(), expected, rtol=1e-5, atol=1e-5)
    axes = tuple(range(2, latents.ndim))
    rest = torch.from_numpy(fft.dctn((latents - noise).double().numpy(), axes=axes, norm="ortho"))
    rest[(slice(None), slice(None), *(slice(count) for count in bands))] = 0
    assert rest.abs().max() < 1e-5
    exact_log_prob = row_sum(exact(mean, log_std).log_prob(coefficients.double()))
    torch.testing.assert_close(log_prob.double(), exact_log_prob, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("latent_shape", [(8, 8, 8), (4, 3, 16, 12)])
def test_untrained_spectral_policy_is_the_prior_bit_for_bit(backend, latent_shape):
    mean = torch.zeros(5, latent_shape[0], *(2 for _ in latent_shape[1:]))
    latents, _, _ = spectral_sample(mean, torch.zeros(()), latent_shape=latent_shape, seed=8, backend=backend)
    prior, _ = gaussian_sample(torch.zeros(5, *latent_shape), torch.zeros(()), seed=8, backend=backend)
    assert torch.equal(latents, prior)


def test_kl_is_exact():
    mean, log_std = make_policy((4, 3, 5))
    other_mean, other_log_std = mean.flip(0) * 0.5, log_std.flip(0)
    expected = row_sum(kl_divergence(exact(mean, log_std), exact(other_mean, other_log_std)))
    kl = gaussian_kl(mean, log_std, other_mean, other_log_std)
    torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=1e-5)
    prior = row_sum(kl_divergence(exact(mean, log_std), Normal(torch.zeros_like(mean).double(), 1.0)))
    torch.testing.assert_close(gaussian_kl(mean, log_std).double(), prior, rtol=1e-5, atol=1e-5)
    shared_std = gaussian_kl(mean, torch.tensor(0.1))
    torch.testing.assert_close(shared_std, gaussian_kl(mean, torch.full_like(mean, 0.1)))


def test_long_rows_are_summed_accurately():
    mean, log_std = make_policy((2, 262_144))
    latents, _ = gaussian_sample(mean, log_std, seed=0)
    expected = row_sum(exact(mean, log_std).log_prob(latents.double()))
    torch.testing.assert_close(gaussian_log_prob(latents, mean, log_std).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_std": torch.zeros(7)}, "does not broadcast"),
        ({"log_std": torch.zeros((), dtype=torch.float16)}, "dtype"),
        ({"mean": torch.zeros(4)}, "at least 2 dimensions"),
        ({"mean": torch.zeros(2, 4, dtype=torch.float64)}, "float64"),
        ({"seed": -1}, "seed must be"),
        ({"offset": 2**64}, "offset must be"),
        ({"backend": "fortran"}, "unknown backend"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"mean": torch.zeros(2, 4), "log_std": torch.zeros(()), "seed": 0} | change
    with pytest.raises(ValueError, match=message):
        gaussian_sample(arguments.pop("mean"), arguments.pop("log_std"), **arguments)


def test_rounded_latents_are_refused():
    mean, log_std = make_policy((2, 4))
    with pytest.raises(ValueError, match="float32"):
        gaussian_log_prob(mean.half(), mean, log_std)


def test_bands_beyond_the_latents_are_refused():
    with pytest.raises(ValueError, match="low band"):
        spectral_sample(torch.zeros(1, 4, 9, 8), torch.zeros(()), latent_shape=(4, 8, 8), seed=0)
