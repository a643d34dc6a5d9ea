"""Long parametrisations: a sample runs every day, the whole with --mutants."""

from collections.abc import Collection
from typing import Any

import pytest


def everyday(values: Collection[Any], count: int) -> list[Any]:
    """All of `values` for `parametrize`; those beyond `count` of them, evenly spaced, wait for --mutants."""
    kept = {round(index * (len(values) - 1) / max(count - 1, 1)) for index in range(count)}
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=() if index in kept else pytest.mark.mutants,
        )
        for index, value in enumerate(values)
    ]
