"""The sixteen-lane CPU kernels on any processor: their intrinsics written out lane by lane (avx512/immintrin.h)."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from noisepolicy.ops import dct_basis, reference
from noisepolicy.ops.layout import Spectrum

from ..sampling import everyday

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
STORAGE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SEED, OFFSET = 2**63 + 7, 2**64 - 9  # the counter wraps
LAYOUTS = ["full", "runs", "row"]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


FLAGS = [
    "g++",
    "-std=c++17",
    "-O1",
    "-w",
    "-ffp-contract=off",
    "-fPIC",
    "-pthread",
    f"-I{HERE / 'avx512'}",
    f"-I{CSRC}",
    "-DNOISEPOLICY_ISA=avx512",
    '-DNOISEPOLICY_SIMD="simd_avx512.h"',
]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Compiles the kernels, with some text of simd_avx512.h replaced."""
    common = tmp_path_factory.mktemp("avx512") / "common.o"
    sources = [CSRC / "cpu" / name for name in ("gaussian.cpp", "spectral.cpp", "parallel.cpp")]
    subprocess.run([*FLAGS, "-r", "-nostdlib", "-o", common, *sources, HERE / "avx512_ops.cpp"], check=True)

    def compile_with(old="", new=""):
        folder = tmp_path_factory.mktemp("avx512")
        for name in ("blocks.cpp", "blocks.h", "vector_math.h", "simd_avx512.h"):
            text = (CSRC / "cpu" / name).read_text("utf-8").replace('"../storage.h"', '"storage.h"')
            if name == "simd_avx512.h" and old:
                assert old in text
                text = text.replace(old, new, 1)
            (folder / name).write_text(text, "utf-8")
        subprocess.run([*FLAGS, "-shared", "-o", folder / "ops.so", common, folder / "blocks.cpp"], check=True)
        return ctypes.CDLL(str(folder / "ops.so"))

    return compile_with


@pytest.fixture(scope="module")
def ops(build):
    return build()


def call(function, *arguments):
    """Tensors as addresses, sizes as int64 arrays, seeds as uint64."""

    def convert(value):
        if isinstance(value, torch.Tensor):
            return ctypes.c_void_p(value.data_ptr())
        if isinstance(value, tuple):
            return (ctypes.c_int64 * len(value))(*value)
        return ctypes.c_uint64(value) if value > 2**31 else ctypes.c_int(value)

    function(*map(convert, arguments))


def make_policy(batch, size, layout, dtype):
    generator = torch.Generator().manual_seed(batch + size)
    groups = {"full": size, "runs": 5 if size % 5 == 0 else 1, "row": 1}[layout]
    mean = torch.randn(batch, size, generator=generator).to(dtype)
    log_std = (0.3 * torch.randn(batch, groups, generator=generator)).to(dtype)
    return mean, log_std, (STORAGE[dtype], (batch, size, groups))


def sample(ops, mean, log_std, sizes):
    latents, log_prob = torch.full(mean.shape, torch.nan), torch.full((len(mean),), torch.nan)
    call(ops.gaussian_sample, mean, log_std, *sizes, SEED, OFFSET, latents, log_prob)
    return latents, log_prob


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", list(STORAGE))
@pytest.mark.parametrize(("batch", "size"), [(1, 1), (3, 15), (2, 63), (2, 65), (3, 1025), (2, 5 * 450)])
def test_sampling(ops, batch, size, layout, dtype):
    mean, log_std, sizes = make_policy(batch, size, layout, dtype)
    latents, log_prob = sample(ops, mean, log_std, sizes)
    expected, expected_log_prob = reference.gaussian_sample(mean, log_std, SEED, OFFSET)
    torch.testing.assert_close(latents, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_prob, expected_log_prob, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("height", "width", "rows", "columns"), [(8, 8, 8, 8), (12, 37, 9, 5), (16, 32, 3, 17)])
def test_spectral_sampling(ops, height, width, rows, columns):
    mean, log_std, sizes = make_policy(2, 3 * rows * columns, "full", torch.float32)
    device = torch.device("cpu")
    spectrum = Spectrum(3, (1, height, width), (1, rows, columns))
    out = [torch.empty(2, 3, 1, height, width), torch.empty(mean.shape), torch.empty(2)]
    call(
        ops.spectral_sample,
        mean,
        log_std,
        *sizes,
        (3, height, width, rows, columns),
        dct_basis(rows, height, device),
        dct_basis(columns, width, device),
        SEED,
        OFFSET,
        *out,
    )
    shape = (2, 3, 1, rows, columns)
    expected = reference.spectral_sample(mean.reshape(shape), log_std.reshape(shape), spectrum, SEED, OFFSET)
    for ours, value in zip(out, expected, strict=True):
        torch.testing.assert_close(ours.reshape(value.shape), value, rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", list(STORAGE))
@pytest.mark.parametrize(("batch", "size"), [(3, 15), (2, 65), (3, 1025)])
def test_loss_and_gradients(ops, batch, size, layout, dtype):
    mean, log_std, sizes = make_policy(batch, size, layout, dtype)
    latents, old_log_prob = reference.gaussian_sample(mean, log_std, 3, 0)
    old_log_prob = old_log_prob + torch.linspace(-0.4, 0.4, batch)
    advantages = torch.linspace(-1, 1, batch)
    totals, rows = torch.empty(3), torch.empty(4, batch)
    call(ops.ppo_clip_loss, mean, log_std, *sizes, latents, old_log_prob, advantages, totals, rows)
    expected = reference.ppo_clip_loss(latents, mean, log_std, old_log_prob, advantages, 0.2, 0.1)
    for ours, value in zip((totals, *rows), expected, strict=True):
        torch.testing.assert_close(ours, value, rtol=1e-3, atol=1e-5)

    grad_kl = torch.linspace(0.1, 0.3, batch)
    grads = [torch.empty_like(mean), torch.empty_like(log_std), torch.empty(mean.shape)]
    call(ops.gaussian_backward, mean, log_std, *sizes, latents, advantages, grad_kl, *grads)
    expected = reference.gaussian_backward(latents, mean, log_std, advantages, grad_kl, True)
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    for ours, value in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, value, **tolerance)


@pytest.mark.parametrize(
    ("old", "new"),
    everyday(
        [
            ("_mm512_set_epi64(14, 12, 10, 8, 6, 4, 2, 0)", "_mm512_set_epi64(0, 2, 4, 6, 8, 10, 12, 14)"),
            ("(1u << count) - 1u", "(1u << (count - 1)) - 1u"),
            ("shuffle_f32x4(low_ab, low_cd, 0xDD)", "shuffle_f32x4(low_ab, low_cd, 0x77)"),
            ("_mm512_slli_epi64(odd, 32)", "odd"),
            ("_mm512_slli_epi32(next, 30)", "_mm512_slli_epi32(count, 30)"),
            ("_mm512_srli_epi64(counters, 32)", "_mm512_setzero_si512()"),
        ],
        2,
    ),
)
def test_a_planted_bug_is_seen(build, old, new):
    mean, log_std, sizes = make_policy(2, 133, "full", torch.float32)
    latents, _ = sample(build(old, new), mean, log_std, sizes)
    expected, _ = reference.gaussian_sample(mean, log_std, SEED, OFFSET)
    assert not torch.allclose(latents, expected, rtol=1e-6, atol=1e-6)
