"""The backend `"triton"` without its kernels, which tests/emulation and, on a GPU, test_gpu.py run."""

import sys

from noisepolicy.ops import triton_backend as backend


def test_a_missing_triton_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install triton" in backend.unavailable_reason.__wrapped__()


def test_seeds_are_passed_as_32_bit_words():
    for value in (0, 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1):
        low, high = backend._words(value)
        assert all(-(2**31) <= word < 2**31 for word in (low, high))
        assert (high % 2**32 << 32) + low % 2**32 == value
