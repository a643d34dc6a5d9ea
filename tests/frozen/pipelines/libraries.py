"""diffusers and transformers, of whose classes the lowest releases lack some: what needs one is skipped there."""

import importlib
from typing import Any

import pytest


class _Missing:
    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        pytest.skip(f"there is no {self._name} in the installed release")

    def __getattr__(self, name: str) -> "_Missing":
        return _Missing(f"{self._name}.{name}")


class _Library:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return part_of(self._name, name)


def part_of(module: str, name: str) -> Any:
    """Import `name` from a module; what is not there skips the test that calls it."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return _Missing(f"{module}.{name}")


diffusers, transformers = _Library("diffusers"), _Library("transformers")
