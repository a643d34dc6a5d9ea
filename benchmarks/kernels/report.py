"""The plot and the cards of the report of `noisepolicy-bench kernels`."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from noisepolicy.evaluation.figures import PLOT_STYLE, figure_svg

_COLORS = {
    "cpp": "#2563eb",
    "cuda": "#2563eb",
    "triton": "#16a34a",
    "torch": "#9ca3af",
    "eager": "#dc2626",
    "compile": "#d97706",
    "randn": "#7c3aed",
}
_LABELS = {
    "torch": "torch (the reference)",
    "eager": "eager PyTorch",
    "compile": "torch.compile",
    "randn": "torch.randn alone",
}
_PREFERRED_BATCH = 8


def kernels_values(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the template's values for the result of `bench.run`, with the machine under `machine`."""
    rows = result["results"]
    batches = {row["batch"] for row in rows}
    batch = _PREFERRED_BATCH if _PREFERRED_BATCH in batches else max(batches)
    dtype = rows[0]["dtype"]
    shown = [row for row in rows if row["batch"] == batch and row["dtype"] == dtype]
    return {
        "batch": batch,
        "dtype": dtype,
        "cards": _cards(shown),
        "svg": time_plot(shown),
        "failures": sorted({failure["reason"] for failure in result["compile_failures"]}),
    }


def _cards(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a card for each op: the speed-up of its preferred backend over eager, from worst to best size."""
    cards = []
    for op in dict.fromkeys(row["op"] for row in rows):
        backend = next(row["backend"] for row in rows if row["op"] == op)
        ours = [row for row in rows if row["op"] == op and row["backend"] == backend]
        speedups = [row["speedup"]["eager"] for row in ours]
        dims = [row["dim"] for row in ours]
        cards.append(
            {
                "op": op,
                "backend": backend,
                "lowest": min(speedups),
                "highest": max(speedups),
                "first_dim": min(dims),
                "last_dim": max(dims),
            }
        )
    return cards


def time_plot(rows: Sequence[dict[str, Any]]) -> str:
    """Plot median time against the size of a row, both logarithmic, with axes for each op, as SVG."""
    op_names = list(dict.fromkeys(row["op"] for row in rows))
    with matplotlib.rc_context(PLOT_STYLE):
        num_columns = min(2, len(op_names))
        num_rows = -(-len(op_names) // num_columns)
        figure = Figure(figsize=(5 * num_columns, 3.4 * num_rows), layout="constrained")
        grid = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
        for axes in grid[len(op_names) :]:
            axes.set_visible(False)
        handles = {}
        for op, axes in zip(op_names, grid, strict=False):
            for name, points in _curves([row for row in rows if row["op"] == op]).items():
                is_baseline = name in ("eager", "compile", "randn")
                (handles[name],) = axes.plot(
                    *zip(*sorted(points), strict=True),
                    color=_COLORS[name],
                    marker="o",
                    markersize=4,
                    linewidth=1.6 if is_baseline else 2.4,
                    linestyle="--" if is_baseline else "-",
                )
            dims = sorted({row["dim"] for row in rows})
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(dims, [f"{dim:,}" for dim in dims])
            axes.minorticks_off()
            axes.set(title=op, xlabel="elements of a row", ylabel="median time, microseconds")
        figure.legend(
            list(handles.values()), [_LABELS.get(name, name) for name in handles], loc="outside lower center", ncols=6
        )
        return figure_svg(figure)


def _curves(rows: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Return points (dim, microseconds) of each backend, then of each baseline that was measured."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        curves.setdefault(row["backend"], []).append((row["dim"], row["median_us"]))
    for row in rows:
        for name, value in row["baselines_us"].items():
            if value is not None and (row["dim"], value) not in curves.setdefault(name, []):
                curves[name].append((row["dim"], value))
    return {name: points for name, points in curves.items() if points}
