"""Comparison of two latency reports: finds what has become slower by more than noise.

A row's noise is half the distance from its p20 to its p95, over its median; that of both runs is added, and is taken
for at least 5%.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from noisepolicy.benchmarks.machine import SAME_MACHINE

LEAST_NOISE = 0.05
_KEYS = {
    "denoiser": ("backend", "dtype", "batch"),
    "rollout": ("backend", "dtype", "batch", "num_inference_steps"),
}


class Comparison(NamedTuple):
    """Lines to print, and the number of rows that were compared."""

    regressions: list[str]
    warnings: list[str]
    num_compared: int


def read_report(path: Path) -> dict[str, Any]:
    """Read a `latency.json`.

    Raises:
        ValueError: if the file is not one.
    """
    try:
        report = json.loads(path.read_text("utf-8"))
        for part, keys in _KEYS.items():
            for row in report[part]:
                _noise(row)
                _key(row, keys)
        report["machine"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"--compare {path} is not a latency.json of noisepolicy-bench ({reason})") from error
    return report


def compare_reports(old: Mapping[str, Any], new: Mapping[str, Any]) -> Comparison:
    """Compares the medians of the rows that both have."""
    regressions, num_compared = [], 0
    for part, keys in _KEYS.items():
        before = {_key(row, keys): row for row in old[part]}
        for row in new[part]:
            if (earlier := before.get(_key(row, keys))) is None:
                continue
            num_compared += 1
            change = row["median_ms"] / earlier["median_ms"] - 1
            noise = max(_noise(row) + _noise(earlier), LEAST_NOISE)
            if change > noise:
                regressions.append(
                    f"slower: {part} {_describe(row, keys)}: {row['median_ms']:.2f} ms, before "
                    f"{earlier['median_ms']:.2f} ms ({change:+.0%}; noise {noise:.0%})"
                )
    warnings = [
        f"the machine's {name} was {old['machine'].get(name)} and is {new['machine'].get(name)}: the times may differ "
        "for that alone"
        for name in SAME_MACHINE
        if old["machine"].get(name) != new["machine"].get(name)
    ]
    return Comparison(regressions, warnings, num_compared)


def _key(row: Mapping[str, Any], names: Sequence[str]) -> tuple[Any, ...]:
    return tuple(row[name] for name in names)


def _noise(row: Mapping[str, Any]) -> float:
    return (row["p95_ms"] - row["p20_ms"]) / row["median_ms"] / 2


def _describe(row: Mapping[str, Any], names: Sequence[str]) -> str:
    words = [f"{row['backend']} {row['dtype']}, batch {row['batch']}"]
    if "num_inference_steps" in names:
        words.append(f"{row['num_inference_steps']} step{'' if row['num_inference_steps'] == 1 else 's'}")
    return ", ".join(words)
