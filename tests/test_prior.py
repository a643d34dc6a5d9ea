"""Noise by seed and index: the same bits in every batch, and the noise that evaluations and policies start from."""

import numpy as np
import pytest
import torch

import noisepolicy
from noisepolicy.ops import gaussian_sample
from noisepolicy.prior import noise


def test_the_package_offers_it():
    assert noisepolicy.noise is noise  # and no module of that name hides it


@pytest.mark.parametrize("shape", [(4, 64, 64), (3, 5, 123), (2, 5, 7, 9), (1,)])
def test_a_row_is_the_same_in_every_batch(shape):
    batch = noise(seed=7, index=range(6), shape=shape)
    assert batch.shape == (6, *shape) and batch.dtype == torch.float32
    assert torch.equal(noise(seed=7, index=4, shape=shape), batch[4:5])
    assert torch.equal(noise(seed=7, index=[5, 0, 3], shape=list(shape)), batch[[5, 0, 3]])
    assert torch.equal(noise(seed=7, index=np.arange(2, 4), shape=shape), batch[2:4])
    assert torch.equal(noise(seed=7, shape=shape), batch[:1])
    assert noise(seed=7, index=[], shape=shape).shape == (0, *shape)


def test_the_last_bit_depends_on_no_setting_of_torch():
    expected = noise(seed=2**64 - 1, index=5, shape=(4, 32, 32))
    num_threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    try:
        torch.set_num_threads(1 if num_threads > 1 else 2)
        torch.set_default_dtype(torch.float64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(noise(seed=2**64 - 1, index=5, shape=(4, 32, 32)), expected)
        with torch.device("meta"):  # the device of tensors that are made without naming one
            assert torch.equal(noise(seed=2**64 - 1, index=5, shape=(4, 32, 32)), expected)
    finally:
        torch.set_num_threads(num_threads)
        torch.set_default_dtype(dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gets_the_bits_of_the_cpu():
    on_gpu = noise(seed=3, index=range(3), shape=(4, 64, 64), device="cuda")
    assert on_gpu.is_cuda and torch.equal(on_gpu.cpu(), noise(seed=3, index=range(3), shape=(4, 64, 64)))


@pytest.mark.parametrize("backend", ["auto", "cpp", "torch"])
def test_an_evaluation_starts_from_the_same_noise(backend):
    prior = torch.zeros(5, 4, 16, 16)
    latents, _ = gaussian_sample(prior, prior.new_zeros(()), seed=11, backend=backend)
    torch.testing.assert_close(noise(seed=11, index=range(5), shape=(4, 16, 16)), latents, atol=1e-6, rtol=0)


def test_seeds_and_indices_are_different_noise():
    rows = torch.cat([noise(seed=seed, index=range(8), shape=(4, 8, 8)) for seed in (0, 1, 2**32, 2**63)]).flatten(1)
    assert (torch.corrcoef(rows) - torch.eye(len(rows))).abs().max() < 0.35  # 5.6 standard deviations of 256 elements
    assert len(rows.reshape(-1, 4).unique(dim=0)) == rows.numel() // 4


def test_the_last_index_is_the_last_that_has_counters():
    last = 2**64 // (4 * 64 * 64 // 4) - 1
    assert noise(seed=1, index=last, shape=(4, 64, 64)).isfinite().all()
    with pytest.raises(ValueError, match=rf"index must be from 0 to {last} for latents of shape \(4, 64, 64\), got"):
        noise(seed=1, index=[0, last + 1], shape=(4, 64, 64))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 1.5),
        ("index", -1),
        ("index", [0, -3]),
        ("index", "0"),
        ("index", 0.5),
        ("shape", ()),
        ("shape", (4, 0)),
        ("shape", (4, -1)),
        ("shape", 4),
        ("shape", (4, 8.0)),
    ],
)
def test_errors_name_the_argument(argument, value):
    arguments = {"seed": 0, "index": 0, "shape": (4, 8)} | {argument: value}
    with pytest.raises(ValueError, match=rf"^{argument} must .*got"):
        noise(**arguments)
