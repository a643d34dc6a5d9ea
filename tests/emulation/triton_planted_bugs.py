"""Lines of the Triton kernels changed for the worse: the check that guards against each must fail.

`test_triton_interpreter.py` runs this in a process of its own, where Triton's interpreter stands for the GPU.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
from triton_checks import (
    GuardedAllocator,
    check_backward,
    check_guards,
    check_nan_is_reported,
    check_ppo,
    check_prior,
    check_sample,
    check_spectral,
)

from noisepolicy.ops import triton_backend, triton_kernels, triton_kernels_spectral

BASE, SPECTRAL = triton_kernels, triton_kernels_spectral
# So small that every loop over blocks runs more than once.
MAX_BLOCK = {BASE: 8, SPECTRAL: 32}


def many_blocks():
    check_sample((2, 65))


def many_rows():
    check_ppo((9, 2))


def carried_counter():
    check_sample(offset=2**32)


def channels():
    check_sample((2, 4, 3), (2, 4))


def channels_backward():
    check_backward((3, 4, 3), (3, 4))


def blocks_of_lines():
    check_spectral((1, 6, 8), (2, 1))


def many_bands():
    check_spectral((1, 18, 4), (17, 1))


# Module, line, what becomes of it, the check that must fail.
PLANTED_BUGS = {
    "swapped Box-Muller outputs": (
        BASE,
        "return radius * cosine, radius * sine",
        "return radius * sine, radius * cosine",
        check_sample,
    ),
    "quads interleaved wrongly": (
        BASE,
        "tl.join(tl.join(n0, n2), tl.join(n1, n3))",
        "tl.join(tl.join(n0, n1), tl.join(n2, n3))",
        check_sample,
    ),
    "rows share a counter": (BASE, "(size + 3) // 4", "size // 4", check_sample),
    "high word of the counter lost": (
        BASE,
        "high = (counter >> 32).to(tl.uint32)",
        "high = tl.zeros_like(low)",
        carried_counter,
    ),
    "high word of the seed lost": (BASE, "return high_part | ", "return ", check_sample),
    "tail mask one too long": (BASE, "mask = index < size", "mask = index < size + 1", check_guards),
    "tail mask one too short": (BASE, "mask = index < size", "mask = index < size - 1", check_sample),
    "partials of the next row": (BASE, "index < num_partials", "index < num_partials + 1", check_sample),
    "blocks of partials not added": (BASE, "total += values", "total = values", many_blocks),
    "blocks of rows not added": (BASE, "loss += (", "loss = (", many_rows),
    "tail counted in the KL": (BASE, "tl.where(mask, kl, 0.0)", "kl + 1.0", check_ppo),
    "log_std of another channel": (BASE, "index // run", "index % run", channels),
    "weights of another row": (
        BASE,
        "grad_kl + segment // segments_per_row",
        "grad_kl + segment % segments_per_row",
        channels_backward,
    ),
    "sign of latents' gradient": (BASE, "-of_value, mask", "of_value, mask", check_backward),
    "sign in log_std's gradient": (BASE, "noise * noise - 1.0", "noise * noise + 1.0", check_backward),
    "sign of the KL's gradient": (BASE, "of_value + of_kl * m", "of_value - of_kl * m", check_backward),
    "gradient of clipped rows": (
        BASE,
        "tl.where(is_free, -unclipped / divisor, 0.0)",
        "-unclipped / divisor",
        many_rows,
    ),
    "NaN clipped away": (
        BASE,
        "ratio < 1.0 - clip_range, 1.0 - clip_range, ratio",
        "ratio > 1.0 - clip_range, ratio, 1.0 - clip_range",
        check_nan_is_reported,
    ),
    "elements before a line": (SPECTRAL, "(column >= 0) & (column < width)", "(column < width)", check_spectral),
    "lines of the next channel": (SPECTRAL, " & (line < num_lines)[:, None]", "", check_guards),
    "blocks of lines not added": (SPECTRAL, "noise += tl.load(", "noise = tl.load(", blocks_of_lines),
    "tiles of bands not added": (SPECTRAL, "line_change += ", "line_change = ", many_bands),
    "columns not added": (SPECTRAL, "change += line_change[:, None]", "change = line_change[:, None]", check_spectral),
    "noise left in the shift": (SPECTRAL, "action - noise, mask", "action, mask", check_prior),
}


def load_patched(name: str, text: str, folder: Path):
    """A module of the package, from changed source: Triton reads a kernel's source from its file."""
    path = folder / f"{name.rpartition('.')[2]}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Every fourth on an everyday run: some of each file, of values, bounds, sums and signs.
@pytest.mark.parametrize("bug", list(PLANTED_BUGS)[:: 1 if os.environ["EVERY_BUG"] == "1" else 4])
def test_planted_bug_is_caught(bug, monkeypatch, tmp_path):
    module, line, replacement, check = PLANTED_BUGS[bug]
    monkeypatch.setattr(triton_backend, "MAX_BLOCK", MAX_BLOCK[module])
    monkeypatch.setattr(triton_backend, "_empty", GuardedAllocator())
    check()  # passes with the kernels as they are
    kernels = {}
    for original in (BASE, SPECTRAL):
        text = Path(original.__file__).read_text()
        if original is module:
            assert line in text, f"no such line to change: {line}"
            text = text.replace(line, replacement)
        patched = load_patched(original.__name__, text, tmp_path)
        monkeypatch.setitem(sys.modules, original.__name__, patched)
        kernels |= vars(patched)
    monkeypatch.setattr(triton_backend, "_kernels", lambda: kernels)
    with pytest.raises(AssertionError):
        check()
