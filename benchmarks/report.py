"""The HTML report of a result: one self-contained file, made from the numbers in its JSON."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from noisepolicy.benchmarks.algorithms.report import algorithms_values
from noisepolicy.benchmarks.kernels.report import kernels_values
from noisepolicy.benchmarks.latency.report import latency_values
from noisepolicy.storage import write_text

_REPORTS = {
    "rollout": ("latency", latency_values),
    "methods": ("algorithms", algorithms_values),
    "results": ("kernels", kernels_values),
}
"""Folder and values of each benchmark's template, by a key that only its results have."""


def write_report(path: Path, result: Mapping[str, Any]) -> None:
    """Write the report of a result of `noisepolicy-bench kernels`, `latency` or `algorithms`, atomically.

    Raises:
        ValueError: if the result is not one of these.
    """
    known = [entry for key, entry in _REPORTS.items() if key in result]
    if not known:
        raise ValueError("there is no report of this result; it is for those of kernels, latency and algorithms")
    [(folder, values)] = known
    environment = Environment(
        loader=PackageLoader("noisepolicy.benchmarks", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    write_text(path, environment.get_template(f"{folder}/report.html.j2").render(result=result, **values(result)))
