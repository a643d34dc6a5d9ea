"""A backend is chosen by the call, and one asked for by name is never replaced."""

import pytest
import torch

from noisepolicy.ops import available_backends, dispatch, gaussian_sample, native, reference

CPU = torch.device("cpu")


def test_the_cpu_backends_run_here():
    reasons = available_backends()
    assert reasons["cpp"] is None and reasons["torch"] is None


@pytest.fixture(autouse=True)
def forget_choices():
    dispatch.choose.cache_clear()
    yield
    dispatch.choose.cache_clear()


def test_auto_prefers_cpp_on_the_cpu(monkeypatch):
    monkeypatch.delenv("NOISEPOLICY_BACKEND", raising=False)
    assert dispatch.choose("auto", CPU) is native
    dispatch.choose.cache_clear()
    monkeypatch.setenv("NOISEPOLICY_BACKEND", "torch")
    assert dispatch.choose("auto", CPU) is reference


def test_a_missing_extension_is_refused_with_its_reason(monkeypatch):
    monkeypatch.setattr(native, "_LOAD_ERROR", ImportError("libmissing.so"))
    assert dispatch.choose("auto", CPU) is reference
    with pytest.raises(RuntimeError, match=r"libmissing\.so"):
        gaussian_sample(torch.zeros(1, 4), torch.zeros(()), seed=0, backend="cpp")


def test_a_backend_refuses_another_device():
    with pytest.raises(RuntimeError, match="meta"):
        dispatch.choose("cpp", torch.device("meta"))
