"""Compiles the Triton kernels to machine code, for every supported GPU and without one, and gates what comes out.

The kernels are compiled for the very arguments that the backend passes, specialised as Triton's launcher would:
integers of 1 are constants, pointers and multiples of 16 are known to be so. Not covered: running any of it.
"""

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from noisepolicy.ops import triton_backend
from noisepolicy.ops.layout import make_spectrum

from ..sampling import everyday

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on"),
    pytest.mark.slow,
]

ARCHITECTURES = [75, 80, 86, 89, 90, 100, 120]
POINTER = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
MAX_REGISTERS = 64
"""128 threads of 64 registers: 8 programs on a multiprocessor of 65,536."""
LATENT_SHAPE, BANDS = (4, 64, 64), (8, 8)
# Of rows of a multiple of 16 elements; the other kernels move row sums and coefficients.
WIDE_LOADS = {"gaussian_sample_kernel", "density_kernel", "backward_kernel", "project_kernel", "replace_band_kernel"}
WIDE_STORES = {"gaussian_sample_kernel", "backward_kernel", "replace_band_kernel"}


@pytest.fixture
def launches(monkeypatch, tmp_path):
    """Filled with (kernel, arguments, constants) by the backend's calls."""
    recorded = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(
        triton_backend,
        "_launch",
        lambda name, _, *arguments, **constants: recorded.append((name, arguments, constants)),
    )
    return recorded


def call_every_op(dtype, log_std_shape, latent_shape=LATENT_SHAPE, bands=BANDS):
    batch = log_std_shape[0]
    mean, log_std = torch.zeros(batch, *latent_shape, dtype=dtype), torch.zeros(log_std_shape, dtype=dtype)
    latents, rows = torch.zeros(batch, *latent_shape), torch.zeros(batch)
    triton_backend.gaussian_sample(mean, log_std, 2**40 + 1, 16)
    triton_backend.ppo_clip_loss(latents, mean, log_std, rows, rows, 0.2, 0.1)
    triton_backend.gaussian_backward(latents, mean, log_std, rows, rows, len(log_std_shape) == 4)
    action = torch.zeros(batch, latent_shape[0], *bands, dtype=dtype)
    spectrum = make_spectrum(tuple(action.shape[1:]), latent_shape)
    triton_backend.spectral_sample(action, torch.zeros(batch, dtype=dtype), spectrum, 2**40 + 1, 16)


def compile_launch(name, arguments, constants, architecture):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = triton_backend._kernels()[name]
    signature, constexprs, attributes = {}, {}, {}
    for place, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=False)):
        if value is None or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constexprs[(place,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTER[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if type(value) is int and value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(place,)] = [["tt.divisibility", 16]]
    for constant, value in constants.items():
        signature[constant], constexprs[(kernel.arg_names.index(constant),)] = "constexpr", value
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options=triton_backend.COMPILE_OPTIONS)


def resource_usage(cubin: bytes, folder: Path) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL (spills), as the wheel's cuobjdump reads them from the machine code."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text))
    assert len(usage) == 4, text
    return {key: int(value) for key, value in usage.items()}


def assert_compiles_well(launches, architecture, folder, is_aligned=True):
    seen = set()
    for name, arguments, constants in launches:
        compiled = compile_launch(name, arguments, constants, architecture)
        usage, ptx = resource_usage(compiled.asm["cubin"], folder), compiled.asm["ptx"]
        where = f"{name} for sm_{architecture} with {constants}: {usage}"
        assert usage["STACK"] == usage["LOCAL"] == 0, f"spills or a stack frame: {where}"
        assert usage["REG"] <= MAX_REGISTERS, where
        if is_aligned:
            assert name not in WIDE_LOADS or "ld.global.v4" in ptx, f"no 128-bit loads: {where}"
            assert name not in WIDE_STORES or "st.global.v4" in ptx, f"no 128-bit stores: {where}"
        seen.add(name)
    every_kernel = {name for name in triton_backend._kernels() if name.endswith("_kernel")}
    assert seen == every_kernel, f"not compiled: {every_kernel - seen}"


@pytest.mark.parametrize("architecture", everyday(ARCHITECTURES, 2))
def test_every_architecture(architecture, launches, tmp_path):
    call_every_op(torch.float32, (8, *LATENT_SHAPE))
    assert_compiles_well(launches, architecture, tmp_path)


@pytest.mark.parametrize(("dtype", "log_std_shape"), [(torch.float32, (8, 4)), (torch.bfloat16, (8,))])
def test_shared_log_std(dtype, log_std_shape, launches, tmp_path):
    call_every_op(dtype, log_std_shape)
    assert_compiles_well(launches, 80, tmp_path)


def test_odd_video(launches, tmp_path):
    call_every_op(torch.float32, (8, 3), (3, 5, 6, 7), (2, 3, 3))
    assert_compiles_well(launches, 75, tmp_path, is_aligned=False)
    with pytest.raises(AssertionError, match="no 128-bit loads"):  # the gate bites: nor can there be any
        assert_compiles_well(launches, 75, tmp_path)


def test_one_row_of_one_element(launches, tmp_path):
    """Every size is then 1, which Triton makes a constant, and a constant has fewer methods than a number."""
    call_every_op(torch.float32, (1, 1, 1, 1), (1, 1, 1), (1, 1))
    assert_compiles_well(launches, 90, tmp_path, is_aligned=False)


def test_a_new_seed_compiles_nothing():
    kernels = [kernel for name, kernel in triton_backend._kernels().items() if name.endswith("_kernel")]
    words = [p for kernel in kernels for p in kernel.params if p.name.startswith(("seed_", "offset_"))]
    assert len(words) == 12 and all(parameter.do_not_specialize for parameter in words)
