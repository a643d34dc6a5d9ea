"""The generator against its published vectors, and the noise against what noise should be."""

import pytest
import torch
from scipy import stats

from noisepolicy import _C
from noisepolicy.ops import gaussian_sample
from noisepolicy.ops.reference import philox4x32

# Random123's known-answer file (kat_vectors), philox4x32 with 10 rounds: counter, key, result.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_known_answers(counter, key, expected):
    assert tuple(_C.philox4x32(counter, key)) == expected
    words = philox4x32([torch.tensor([word]) for word in counter], key)
    assert tuple(word.item() for word in words) == expected


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_noise_is_standard_normal_and_uncorrelated(backend):
    zeros = torch.zeros(64, 4096)
    noise, _ = gaussian_sample(zeros, torch.zeros(()), seed=5, backend=backend)
    values = noise.flatten().double()
    assert abs(values.mean()) < 4 / len(values) ** 0.5
    assert abs(values.var() - 1) < 4 * (2 / len(values)) ** 0.5
    # Neighbouring elements, the two of a Box-Muller pair, neighbouring rows, neighbouring seeds.
    other_seed, _ = gaussian_sample(zeros, torch.zeros(()), seed=6, backend=backend)
    limit = 5 / len(values) ** 0.5
    for a, b in (
        (noise[:, :-1], noise[:, 1:]),
        (noise[:, ::2], noise[:, 1::2]),
        (noise[:-1], noise[1:]),
        (noise, other_seed),
    ):
        assert abs((a * b).double().mean()) < limit
    assert len(torch.unique(noise[:, :4], dim=0)) == 64


def test_noise_passes_kolmogorov_smirnov_over_seeds():
    zeros = torch.zeros(16, 4096)
    p_values = [
        stats.kstest(gaussian_sample(zeros, torch.zeros(()), seed=seed)[0].flatten().double().numpy(), "norm").pvalue
        for seed in range(100, 140)
    ]
    # Under the null hypothesis p-values are uniform.
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3


def test_no_block_of_noise_comes_twice():
    """Around every place where an address of 32 bits, or of 64, would wrap; and from one seed to the next."""
    zeros = torch.zeros(4, 4096)
    offsets = [base + near for base in (0, 2**31, 2**32, 2**33, 2**34, 2**48, 2**63) for near in (0, 4096)]
    blocks = [gaussian_sample(zeros, torch.zeros(()), seed=1, offset=offset)[0] for offset in offsets]
    blocks += [gaussian_sample(zeros, torch.zeros(()), seed=seed)[0] for seed in (2, 1 + 2**32, 1 + 2**63)]
    quads = torch.cat(blocks).reshape(-1, 4)
    assert len(torch.unique(quads, dim=0)) == len(quads)
