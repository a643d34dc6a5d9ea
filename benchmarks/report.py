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
"""By a key that only this benchmark's result has: the folder of the template, and what the template shows."""


def write_report(path: Path, result: Mapping[str, Any]) -> None:
    """Writes the report of what `noisepolicy-bench kernels`, `latency` or `algorithms` measured, atomically.

    Raises:
        ValueError: if the result is none of these.
    """
    known = [entry for key, entry in _REPORTS.items() if key in result]
    if not known:
        raise ValueError("there is no report of this result; it is for those of kernels, latency and algorithms")
    [(folder, values)] = known
    environment = Environment(
        loader=PackageLoader("noisepolicy.benchmarks", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    write_text(path, environment.get_template(f"{folder}/report.html.j2").render(result=result, **values(result)))
