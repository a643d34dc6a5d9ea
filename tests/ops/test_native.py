"""Tests of the compiled kernels alone: threads, instruction sets, precision, forks, NaN, memory layout."""

import os
import subprocess
import sys

import pytest
import torch

from noisepolicy.ops import (
    gaussian_log_prob,
    gaussian_sample,
    native,
    num_counters,
    ppo_clip_loss,
    reference,
    spectral_sample,
)
from noisepolicy.ops.layout import _cached_basis, make_spectrum

BACKENDS = ["cpp", "torch"]
LOG_STD_SHAPES = [(8, 3, 64, 67), (8, 3, 1, 1), (8, 1, 1, 1)]


def make_policy(shape=(8, 3, 64, 67), log_std_shape=None):
    generator = torch.Generator().manual_seed(2)
    mean = torch.randn(shape, generator=generator)
    return mean, 0.3 * torch.randn(log_std_shape or shape, generator=generator)


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("log_std_shape", LOG_STD_SHAPES)
def test_threads_do_not_change_a_bit(set_threads, log_std_shape):
    mean, log_std = make_policy(log_std_shape=log_std_shape)
    band, band_log_std = mean[..., :8, :8], log_std[..., :8, :8]

    def everything():
        latents, log_prob = gaussian_sample(mean, log_std, seed=1)
        spectral = spectral_sample(band, band_log_std, latent_shape=(3, 64, 67), seed=1)
        leaves = [tensor.clone().requires_grad_() for tensor in (mean, log_std)]
        loss, stats = ppo_clip_loss(
            latents, *leaves, log_prob + 0.1, torch.linspace(-1, 1, 8), clip_range=0.2, kl_coef=0.1
        )
        loss.backward()
        return [latents, log_prob, *spectral, loss, *stats, *(leaf.grad for leaf in leaves)]

    set_threads(1)
    expected = everything()
    for count in (2, 3, 7):
        set_threads(count)
        for ours, value in zip(everything(), expected, strict=True):
            assert torch.equal(ours, value)


@pytest.mark.parametrize("log_std_shape", LOG_STD_SHAPES)
def test_a_split_batch_is_the_batch(log_std_shape):
    mean, log_std = make_policy(log_std_shape=log_std_shape)
    whole, log_prob = gaussian_sample(mean, log_std, seed=4, offset=10)
    first = gaussian_sample(mean[:4], log_std[:4], seed=4, offset=10)
    second = gaussian_sample(mean[4:], log_std[4:], seed=4, offset=10 + 4 * num_counters((3, 64, 67)))
    assert torch.equal(whole, torch.cat([first[0], second[0]]))
    assert torch.equal(log_prob, torch.cat([first[1], second[1]]))


def test_every_instruction_set_agrees(tmp_path):
    script = (
        "import sys, torch\n"
        "from safetensors.torch import save_file\n"
        "from noisepolicy import _C\n"
        "from noisepolicy.ops import native\n"
        "from noisepolicy.ops.layout import Spectrum\n"
        "g = torch.Generator().manual_seed(0)\n"
        "mean, log_std = torch.randn(3, 1031, generator=g), torch.randn(3, 1031, generator=g) * 0.3\n"
        "x, lp = native.gaussian_sample(mean, log_std, 2**63 + 1, 2**64 - 5)\n"
        "a = torch.randn(2, 2, 9, 5, generator=g)\n"
        "y, c, _ = native.spectral_sample(a, a * 0.1, Spectrum(2, (1, 12, 37), (1, 9, 5)), 3, 0)\n"
        "kl = torch.linspace(0.1, 0.2, 3)\n"
        "gm, gs, gx = native.gaussian_backward(x, mean, log_std, kl, kl, True)\n"
        "save_file({'x': x, 'lp': lp, 'y': y, 'c': c, 'gm': gm, 'gs': gs, 'gx': gx}, sys.argv[1])\n"
        "print(_C.instruction_set())\n"
    )
    from safetensors.torch import load_file

    outputs = {}
    for limit in ("portable", "avx2", "avx512"):
        file = tmp_path / f"{limit}.safetensors"
        environment = {**os.environ, "NOISEPOLICY_CPU": limit}
        command = [sys.executable, "-c", script, str(file)]
        done = subprocess.run(command, env=environment, cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True)
        name = done.stdout.strip()
        outputs[name] = load_file(file)
    assert "portable" in outputs
    for tensors in outputs.values():
        for key, value in tensors.items():
            torch.testing.assert_close(value, outputs["portable"][key], rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize("layout", ["full", "row"])
def test_long_rows_are_summed_accurately(layout):
    size = 262_144
    mean, log_std = make_policy((2, size), (2, size) if layout == "full" else (2, 1))
    latents, log_prob = gaussian_sample(mean, log_std, seed=0, backend="cpp")
    policy = torch.distributions.Normal(mean.double(), log_std.double().exp().expand(mean.shape))
    expected = policy.log_prob(latents.double()).sum(1)
    assert ((log_prob - expected) / expected).abs().max() < 1e-6
    again = gaussian_log_prob(latents, mean, log_std, backend="cpp")
    assert ((again - expected) / expected).abs().max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_log_std_is_refused(backend):
    mean, rows = torch.zeros(3, 5), torch.zeros(3)
    log_std = torch.zeros(3, 5)
    log_std[2, 4] = torch.nan
    calls = [
        lambda: gaussian_sample(mean, log_std, seed=0, backend=backend),
        lambda: spectral_sample(
            mean[:, None, None], log_std[:, None, None], latent_shape=(1, 4, 8), seed=0, backend=backend
        ),
        lambda: gaussian_log_prob(mean, mean, log_std, backend=backend),
        lambda: ppo_clip_loss(mean, mean, log_std, rows, rows, clip_range=0.2, backend=backend),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="log_std must not hold NaN"):
            call()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_input_is_taken(backend):
    mean, log_std = make_policy((4, 6, 8))
    strided_mean, strided_log_std = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (mean, log_std))
    assert not strided_mean.is_contiguous()
    ours = gaussian_sample(strided_mean, strided_log_std, seed=0, backend=backend)
    for value, expected in zip(ours, gaussian_sample(mean, log_std, seed=0, backend=backend), strict=True):
        assert torch.equal(value, expected)


def test_a_run_may_begin_inside_a_counters_four():
    # 5 x 5 places a channel, one log_std each: channels begin at elements 25, 50.
    mean, log_std = make_policy((3, 3, 5, 5), (3, 3, 1, 1))
    for ours, expected in zip(
        gaussian_sample(mean, log_std, seed=0, backend="cpp"),
        gaussian_sample(mean, log_std.expand(mean.shape).contiguous(), seed=0, backend="cpp"),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_a_forked_child_has_its_own_threads(set_threads):
    set_threads(2)
    mean, log_std = make_policy()
    expected, _ = gaussian_sample(mean, log_std, seed=0)
    child = os.fork()
    if child == 0:
        # Nothing but the kernels: torch's own threads do not survive a fork.
        ours, _ = native.gaussian_sample(mean, log_std, 0, 0)
        os._exit(0 if bytes(ours.numpy().data) == bytes(expected.numpy().data) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_the_loss_allocates_nothing_of_the_actions_size_but_its_gradients():
    batch, size = 4, 65_536
    mean, log_std = make_policy((batch, size))
    latents, log_prob = reference.gaussian_sample(mean, log_std, 0, 0)

    def allocated(backend):
        leaves = [tensor.clone().requires_grad_() for tensor in (mean, log_std)]
        with torch.profiler.profile(profile_memory=True) as profile:
            ppo_clip_loss(latents, *leaves, log_prob, torch.ones(batch), clip_range=0.2, kl_coef=0.1, backend=backend)[
                0
            ].backward()
        return sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())

    gradients = 2 * mean.nbytes
    assert gradients <= allocated("cpp") < gradients + 1024 * batch
    assert allocated("torch") > 2 * gradients, "the profiler would see more"


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_torchs_defaults_change_nothing(default):
    """Kernels are given addresses: a result of half the size would be written past its end."""
    mean, log_std, zeros = torch.randn(4, 1, 8, 8), torch.zeros(4, 1, 8, 8), torch.zeros(4)
    spectrum = make_spectrum((1, 8, 8), (1, 32, 32))

    def results():
        latents, log_prob = native.gaussian_sample(mean, log_std, 1, 0)
        loss = native.ppo_clip_loss(latents, mean, log_std, zeros, zeros, 0.2, 0.1)
        spectral = native.spectral_sample(mean, log_std, spectrum, 1, 0)
        return [latents, log_prob, *loss, *spectral, native.gaussian_log_prob(latents, mean, log_std)]

    expected = results()
    _cached_basis.cache_clear()
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"):
            got = results()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, expected, strict=True))
