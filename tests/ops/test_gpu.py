"""Backends "cuda" and "triton" on a real GPU, against the reference. What runs without one is in tests/emulation."""

import pytest
import torch

from noisepolicy.ops import (
    cuda,
    gaussian_log_prob,
    gaussian_sample,
    num_counters,
    ppo_clip_loss,
    spectral_sample,
    triton_backend,
)

BACKENDS = {"cuda": cuda, "triton": triton_backend}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (5, 123), (3, 1025), (2, 4, 64, 64), (2, 4, 3, 5, 7), (0, 5)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Its name."""
    return request.param


@pytest.fixture
def device(backend):
    if reason := BACKENDS[backend].unavailable_reason():
        pytest.skip(reason)
    if not torch.cuda.is_available():
        pytest.skip("this torch finds no CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


def make_policy(shape, device, dtype=torch.float32, log_std_shape=None):
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(shape, generator=generator).to(device, dtype)
    return mean, (0.3 * torch.randn(log_std_shape or shape, generator=generator)).to(device, dtype)


def log_std_shapes(shape):
    return shape, shape[:2] + (1,) * (len(shape) - 2), shape[:1] + (1,) * (len(shape) - 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refused_by_name_where_there_is_no_gpu(backend):
    if "cpu" in BACKENDS[backend].DEVICES:
        pytest.skip("Triton's interpreter is on")
    with pytest.raises(RuntimeError, match=f"'{backend}' is not available"):
        gaussian_sample(torch.zeros(1, 4), torch.zeros(()), seed=0, backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sample_matches_the_reference(shape, dtype, device, backend):
    for log_std_shape in log_std_shapes(shape):
        mean, log_std = make_policy(shape, device, dtype, log_std_shape)
        arguments = {"seed": 2**63 + 5, "offset": 2**64 - 3}
        latents, log_prob = gaussian_sample(mean, log_std, **arguments, backend=backend)
        expected, expected_log_prob = gaussian_sample(mean, log_std, **arguments, backend="torch")
        torch.testing.assert_close(latents, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(log_prob, expected_log_prob, rtol=1e-6, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_match_the_reference(shape, dtype, device, backend):
    for log_std_shape in log_std_shapes(shape):
        mean, log_std = make_policy(shape, device, dtype, log_std_shape)
        latents, old_log_prob = gaussian_sample(mean, log_std, seed=1, backend="torch")
        advantages = torch.linspace(-1, 2, shape[0], device=device)
        results = {}
        for name in (backend, "torch"):
            leaves = [tensor.clone().requires_grad_() for tensor in (latents, mean, log_std)]
            loss, stats = ppo_clip_loss(
                latents, *leaves[1:], old_log_prob + 0.1, advantages, clip_range=0.2, kl_coef=0.1, backend=name
            )
            log_prob = gaussian_log_prob(*leaves, backend=name)
            gradients = (*torch.autograd.grad(loss, leaves[1:]), *torch.autograd.grad(log_prob.sum(), leaves))
            results[name] = [loss.detach(), *stats, *gradients]
        # A rounding of log_prob, 6e-8 of it, is in the ratio and all that follows.
        slack = 1e-5 + 2.5e-7 * max(old_log_prob.abs().tolist(), default=0.0)
        for ours, expected in zip(results[backend], results["torch"], strict=True):
            # Or one unit in the last place of half-precision gradients.
            rtol = slack + {torch.float32: 0.0, torch.float16: 2**-10, torch.bfloat16: 2**-7}[ours.dtype]
            # Elements may be what is left of terms as large as the largest.
            atol = slack * max([10.0, *expected.abs().flatten().tolist()])
            torch.testing.assert_close(ours, expected, rtol=rtol, atol=atol)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("latent_shape", "bands"),
    [((4, 64, 64), (8, 8)), ((3, 5, 7), (2, 3)), ((4, 6, 8, 10), (2, 4, 4)), ((4, 16, 32, 32), (4, 8, 8))],
)
def test_spectral_sample(latent_shape, bands, device, backend):
    mean, log_std = make_policy((3, latent_shape[0], *bands), device)
    arguments = {"latent_shape": latent_shape, "seed": 4, "offset": 7}
    ours = spectral_sample(mean, log_std, **arguments, backend=backend)
    for tensor, expected in zip(ours, spectral_sample(mean, log_std, **arguments, backend="torch"), strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=2e-5)
    zero = torch.zeros((), device=device)
    untrained, _, _ = spectral_sample(mean * 0, zero, **arguments, backend=backend)
    prior = torch.zeros(3, *latent_shape, device=device)
    assert torch.equal(untrained, gaussian_sample(prior, zero, seed=4, offset=7, backend=backend)[0])


@pytest.mark.gpu
def test_cpu_and_gpu_give_the_same_latents(device, backend):
    mean, log_std = make_policy((4, 4, 64, 64), "cpu")
    expected, _ = gaussian_sample(mean, log_std, seed=3)
    latents, _ = gaussian_sample(mean.to(device), log_std.to(device), seed=3, backend=backend)
    torch.testing.assert_close(latents.cpu(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
def test_the_ratio_of_an_unchanged_policy_is_one(device, backend):
    mean, log_std = make_policy((32, 4, 64, 64), device, log_std_shape=())
    latents, _ = gaussian_sample(mean, log_std, seed=0, backend=backend)
    old_log_prob = gaussian_log_prob(latents, mean, log_std, backend=backend)
    _, stats = ppo_clip_loss(latents, mean, log_std, old_log_prob, mean[:, 0, 0, 0], clip_range=0.2, backend=backend)
    assert (stats.ratio == 1).all() and stats.approx_kl == 0


@pytest.mark.gpu
def test_long_rows_are_summed_accurately(device, backend):
    for log_std_shape in ((2, 262_144), ()):
        mean, log_std = make_policy((2, 262_144), device, log_std_shape=log_std_shape)
        latents, log_prob = gaussian_sample(mean, log_std, seed=0, backend=backend)
        exact = torch.distributions.Normal(mean.double(), log_std.double().exp()).log_prob(latents.double()).sum(1)
        torch.testing.assert_close(log_prob.double(), exact, rtol=1e-6, atol=0)
        ours = gaussian_log_prob(latents, mean, log_std, backend=backend)
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.gpu
def test_many_rows_the_same_bits_and_batch_splits(device, backend):
    mean, log_std = make_policy((70_000, 9), device)
    latents, log_prob = gaussian_sample(mean, log_std, seed=2, backend=backend)
    again, again_log_prob = gaussian_sample(mean, log_std, seed=2, backend=backend)
    assert torch.equal(latents, again) and torch.equal(log_prob, again_log_prob)
    offset = 66_000 * num_counters((9,))
    rest, _ = gaussian_sample(mean[66_000:], log_std[66_000:], seed=2, offset=offset, backend=backend)
    assert torch.equal(latents[66_000:], rest)


@pytest.mark.gpu
def test_offsets_beyond_2_31_elements(device, backend):
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GB of GPU memory")
    batch, size = 2049, 2**20
    mean = torch.zeros(batch, size, device=device, dtype=torch.float16)
    latents, _ = gaussian_sample(mean, torch.zeros((), device=device, dtype=mean.dtype), seed=5, backend=backend)
    zero = torch.zeros((), device=device)
    offset = (batch - 1) * num_counters((size,))
    last, _ = gaussian_sample(torch.zeros(1, size, device=device), zero, seed=5, offset=offset, backend="torch")
    torch.testing.assert_close(latents[-1:], last, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
def test_in_a_cuda_graph(device, backend):
    mean, log_std = make_policy((8, 4, 64, 64), device)
    coefficients = make_policy((8, 4, 8, 8), device)
    rows = torch.linspace(-1, 1, 8, device=device)
    latents = torch.zeros_like(mean)

    def run():
        drawn, log_prob = gaussian_sample(mean, log_std, seed=6, backend=backend)
        spectral = spectral_sample(*coefficients, latent_shape=(4, 64, 64), seed=6, backend=backend)
        loss, stats = ppo_clip_loss(latents, mean, log_std, rows, rows, clip_range=0.2, kl_coef=0.1, backend=backend)
        gradients = BACKENDS[backend].gaussian_backward(latents, mean, log_std, rows, rows, True)
        return [drawn, log_prob, *spectral, loss, *stats, *gradients]

    expected = [tensor.clone() for tensor in run()]  # Triton compiles; a capture must not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(2):
        for tensor in captured:
            tensor.zero_()
        graph.replay()
        for ours, same in zip(captured, expected, strict=True):
            assert torch.equal(ours, same)


@pytest.mark.gpu
def test_runs_on_the_callers_stream(device, backend):
    """Input that another stream is late to write is read only then."""
    source = torch.ones(64, 4096, device=device)
    expected, _ = gaussian_sample(source, torch.zeros((), device=device), seed=1, backend=backend)
    zero, mean = torch.zeros((), device=device), torch.zeros_like(source)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        mean.copy_(source)
        latents, _ = gaussian_sample(mean, zero, seed=1, backend=backend)
    stream.synchronize()
    assert torch.equal(latents, expected)


@pytest.mark.gpu
def test_on_a_device_that_is_not_current(device, backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = torch.device("cuda", (device.index + 1) % torch.cuda.device_count())
    mean, log_std = make_policy((2, 1025), device)
    expected, _ = gaussian_sample(mean, log_std, seed=1, backend=backend)
    latents, _ = gaussian_sample(mean.to(other), log_std.to(other), seed=1, backend=backend)
    assert latents.device == other and torch.equal(latents.to(device), expected)
