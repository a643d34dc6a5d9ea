"""The figures of the report of `noisepolicy-bench algorithms`, and the one of the README."""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from noisepolicy.benchmarks.algorithms.methods import ABLATIONS, METHODS, NUM_INFERENCE_STEPS
from noisepolicy.evaluation.figures import PLOT_STYLE, figure_svg
from noisepolicy.storage import write_bytes

_COLORS = (
    "#2563eb",
    "#0891b2",
    "#7c3aed",
    "#d97706",
    "#dc2626",
    "#16a34a",
    "#84cc16",
    "#0f766e",
    "#db2777",
    "#78716c",
    "#111827",
    "#facc15",
)
_BASE = "#6b7280"

Rows = Sequence[Mapping[str, Any]]


def algorithms_values(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the template's values for the result of `bench.run`."""
    methods = result["methods"]
    learned = [method for method in methods if not method["is_per_prompt"] and method["model"] == "shapes"]
    searched = [method for method in methods if method["is_per_prompt"] and method["model"] == "shapes"]
    videos = [method for method in methods if method["model"] != "shapes"]
    base = result["base"].get("shapes", [])
    plots = {}
    with matplotlib.rc_context(PLOT_STYLE):
        if learned:
            plots["learned"] = _curves_figure(learned, base)
        if searched:
            plots["searched"] = _curves_figure(searched, None)
        if learned or searched:
            plots["steps"] = _steps_figure([*learned, *searched])
            plots["exchange"] = _exchange_figure([*learned, *searched])
        if videos:
            plots["video"] = _steps_figure(videos)
        svgs = {name: figure_svg(figure) for name, figure in plots.items()}
    tables = [(model, rows, [m for m in methods if m["model"] == model]) for model, rows in result["base"].items()]
    return {"plots": svgs, "tables": tables}


def write_story(path: Path, result: Mapping[str, Any]) -> None:
    """Draw the figure of docs/results.md: reward against images by method, and gain by denoising steps.

    It shows the methods that learn pictures once for all captions; without such methods nothing is written.
    """
    learned = [method for method in result["methods"] if not method["is_per_prompt"] and method["model"] == "shapes"]
    if not learned:
        return
    with matplotlib.rc_context(PLOT_STYLE):
        figure = Figure(figsize=(10, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_curves(left, learned, result["base"]["shapes"], "images")
        left.legend(fontsize=8, loc="upper left")
        _draw_steps(right, learned)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    write_bytes(path, buffer.getvalue())


def _curves_figure(methods: Rows, base: Rows | None) -> Figure:
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    by_images, by_seconds = figure.subplots(1, 2, sharey=True)
    _draw_curves(by_images, methods, base, "images")
    _draw_curves(by_seconds, methods, base, "seconds")
    by_images.legend(fontsize=8)
    return figure


def _draw_curves(axes: Axes, methods: Rows, base: Rows | None, against: str) -> None:
    """Draw reward at 2 steps against images generated or seconds of training, a line per seed."""
    for method in methods:
        for number, run in enumerate(method["runs"]):
            points = [(row[against], row["reward"]) for row in run["curve"] if row[against] > 0]
            label = method["title"] if number == 0 else None
            axes.plot(*zip(*points, strict=True), color=_color(method["name"]), linewidth=1.5, label=label)
    if base is not None:
        row = _at(base, NUM_INFERENCE_STEPS)
        axes.axhline(row["reward"], color=_BASE, linewidth=1)
        for n in ("2", "4"):
            if (value := _best_of(row, n)) is not None:
                axes.axhline(value, color=_BASE, linewidth=1, linestyle="--" if n == "2" else ":")
                axes.annotate(
                    f"best of {n}",
                    (0.99, value),
                    xycoords=("axes fraction", "data"),
                    ha="right",
                    va="bottom",
                    fontsize=8,
                    color=_BASE,
                )
    is_per_prompt = any(method["is_per_prompt"] for method in methods)
    unit = "images of a caption" if is_per_prompt else "images generated"
    axes.set(xscale="log", xlabel=unit if against == "images" else "seconds of training", ylabel="reward at 2 steps")


def _steps_figure(methods: Rows) -> Figure:
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    axes = figure.subplots()
    _draw_steps(axes, methods)
    axes.legend(fontsize=8)
    return figure


def _draw_steps(axes: Axes, methods: Rows) -> None:
    """Draw the seeds' mean gain over the base model by denoising steps, with the widest of their intervals."""
    for method in methods:
        sweeps = [run["sweep"] for run in method["runs"]]
        steps = [row["num_inference_steps"] for row in sweeps[0]]
        columns = list(zip(*sweeps, strict=True))
        gains = [sum(row["gain"] for row in column) / len(column) for column in columns]
        low = [min(row["gain_ci95"][0] for row in column) for column in columns]
        high = [max(row["gain_ci95"][1] for row in column) for column in columns]
        color = _color(method["name"])
        axes.plot(steps, gains, color=color, marker="o", markersize=4, label=method["title"])
        axes.fill_between(steps, low, high, color=color, alpha=0.1, linewidth=0)
        axes.set_xticks(steps, [str(step) for step in steps])
    axes.axhline(0, color=_BASE, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps, [str(step) for step in steps])
    axes.set(xlabel="denoising steps", ylabel="gain in reward (95% intervals of all seeds)")


def _exchange_figure(methods: Rows) -> Figure:
    """Draw reward against the variety kept at 2 steps, a point per seed."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    axes = figure.subplots()
    for method in methods:
        rows = [_at(run["sweep"], NUM_INFERENCE_STEPS) for run in method["runs"]]
        axes.scatter(
            [100 * row["diversity_kept"] for row in rows],
            [row["gain"] for row in rows],
            color=_color(method["name"]),
            label=method["title"],
            s=24,
        )
    axes.set(xlabel="variety kept, % of the base model's", ylabel="gain in reward at 2 steps")
    axes.legend(fontsize=8)
    return figure


def _color(name: str) -> str:
    """Return a method's colour, the same in every figure."""
    return _COLORS[[method.name for method in (*METHODS, *ABLATIONS)].index(name) % len(_COLORS)]


def _at(rows: Iterable[Mapping[str, Any]], steps: int) -> Mapping[str, Any]:
    return next(row for row in rows if row["num_inference_steps"] == steps)


def _best_of(row: Mapping[str, Any], n: str) -> float | None:
    """Return a base model's best-of-n; in JSON the keys are text."""
    return {str(key): value for key, value in row["best_of"].items()}.get(n)
