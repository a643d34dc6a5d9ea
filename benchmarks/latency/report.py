"""The plots and the cards of the report of `noisepolicy-bench latency`."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from noisepolicy.benchmarks.latency.cases import engine_name
from noisepolicy.benchmarks.latency.engines import SPLIT
from noisepolicy.evaluation.figures import PLOT_STYLE, figure_svg

_COLORS = {
    "eager": "#6b7280",
    "compile": "#d97706",
    "onnx": "#2563eb",
    "openvino": "#16a34a",
    "tensorrt": "#7c3aed",
    "tensorrt-rtx": "#db2777",
}
_OTHER_COLOR, _BASELINE_COLOR = "#0891b2", "#dc2626"
_DTYPE_STYLES = {"float32": "-", "float16": "--", "bfloat16": ":"}
_PART_COLORS = {
    "text_encoding": "#a78bfa",
    "policy": "#16a34a",
    "denoiser": "#2563eb",
    "scheduler": "#f59e0b",
    "vae": "#7dd3fc",
    "reward": "#d1d5db",
    "frozen_model": "#2563eb",
    "other": "#f59e0b",
}
_HEADLINE_STEPS = 2
_BAR = 0.8

Rows = Sequence[Mapping[str, Any]]


def latency_values(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the template's values for the result of `bench.run`."""
    return {
        "cards": headline_cards(result),
        "plots": {
            "denoiser": denoiser_plot(result["denoiser"]) if result["denoiser"] else None,
            "rollout": rollout_plot(result["rollout"]) if result["rollout"] else None,
        },
        "parts": SPLIT,
        "baselines": _baselines(result["rollout"]),
    }


def headline_cards(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return cards of the fastest engine against its baseline: denoiser, rollout and training."""
    cards = []
    for batch in _outer(row["batch"] for row in result["denoiser"]):
        best = _fastest([row for row in result["denoiser"] if row["batch"] == batch])
        cards.append(
            {
                "speedup": best["speedup_over_eager"],
                "text": f"the denoiser at batch {batch} on {engine_name(best)}, against diffusers' eager one",
            }
        )
    if result["rollout"]:
        steps = _headline_steps(result["rollout"])
        for batch in _outer(row["batch"] for row in result["rollout"]):
            rows = [row for row in result["rollout"] if (row["batch"], row["num_inference_steps"]) == (batch, steps)]
            best = _fastest(rows)
            cards.append(
                {
                    "speedup": best["speedup_over_diffusers"],
                    "text": f"{_count(batch, 'image')} at {_count(steps, 'step')} on {engine_name(best)}, "
                    "embeddings to images, against diffusers' own call",
                }
            )
    trained = [row for row in result["training"] if row["speedup_over_eager"] is not None]
    if trained:
        best = min(trained, key=lambda row: row["iteration_ms"])
        cards.append(
            {
                "speedup": best["speedup_over_eager"],
                "text": f"an iteration of training on {engine_name(best)}, against the eager path",
            }
        )
    return cards


def denoiser_plot(rows: Rows) -> str:
    """Plot the time of a call and rows per second against the batch, for each engine and the baseline, as SVG."""
    with matplotlib.rc_context(PLOT_STYLE):
        figure = Figure(figsize=(10, 3.8), layout="constrained")
        time_axes, rate_axes = figure.subplots(1, 2)
        baseline = {row["batch"]: row["eager_ms"] for row in rows}
        curves = {"diffusers, eager": (list(baseline.items()), _BASELINE_COLOR, "-.", 1.6)}
        for row in rows:
            color = _COLORS.get(row["backend"], _OTHER_COLOR)
            style = _DTYPE_STYLES.get(row["dtype"], "-")
            curves.setdefault(engine_name(row), ([], color, style, 2.4))[0].append((row["batch"], row["median_ms"]))
        handles = []
        for points, color, style, width in curves.values():
            batches, times = zip(*sorted(points), strict=True)
            options = {"color": color, "linestyle": style, "linewidth": width, "marker": "o", "markersize": 4}
            handles += time_axes.plot(batches, times, **options)
            rates = [1e3 * batch / time for batch, time in zip(batches, times, strict=True)]
            rate_axes.plot(batches, rates, **options)
        time_axes.set(yscale="log", ylabel="median time of a call, ms", title="latency")
        rate_axes.set(ylabel="rows a second", title="throughput", ylim=(0, None))
        time_axes.yaxis.set_major_formatter(LogFormatter())
        time_axes.yaxis.set_minor_formatter(LogFormatter())
        for axes in (time_axes, rate_axes):
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted(baseline), [str(batch) for batch in sorted(baseline)])
            axes.set_xlabel("batch, rows handed to the denoiser")
        figure.legend(handles, list(curves), loc="outside lower center", ncols=6)
        return figure_svg(figure)


def rollout_plot(rows: Rows) -> str:
    """Plot the parts of a rollout by step count, stacked, a bar for each engine and axes for each batch, as SVG."""
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    with matplotlib.rc_context(PLOT_STYLE):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        for batch, axes in zip(batches, figure.subplots(1, len(batches), squeeze=False)[0], strict=True):
            _draw_rollouts(axes, [row for row in rows if row["batch"] == batch])
            axes.set(title=_count(batch, "image"), ylabel="ms" if batch == batches[0] else None)
        known = {}
        for axes in figure.axes:
            known |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.legend(list(known.values()), list(known), loc="outside lower center", ncols=8)
        return figure_svg(figure)


def _draw_rollouts(axes: Any, rows: Rows) -> None:
    engines = list(dict.fromkeys(engine_name(row) for row in rows))
    steps = list(dict.fromkeys(row["num_inference_steps"] for row in rows))
    width = _BAR / len(engines)
    ticks: dict[float, str] = {}
    for row in rows:
        place, engine = steps.index(row["num_inference_steps"]), engines.index(engine_name(row))
        left = place + (engine + 0.5) * width - _BAR / 2
        ticks[left] = engine_name(row)
        bottom = 0.0
        for part in SPLIT:
            height = row["split_ms"][part] or 0.0
            axes.bar(
                left,
                height,
                0.9 * width,
                bottom=bottom,
                color=_PART_COLORS[part],
                label=part.replace("_", " "),
                linewidth=0,
            )
            bottom += height
    for place, count in enumerate(steps):
        row = next(row for row in rows if row["num_inference_steps"] == count)
        around = sum(row["split_ms"][part] or 0.0 for part in ("text_encoding", "policy", "reward"))
        level = row["diffusers_ms"] + around
        axes.plot(
            [place - _BAR / 2, place + _BAR / 2],
            [level, level],
            color=_BASELINE_COLOR,
            linestyle="-.",
            label="with diffusers' own call",
        )
    axes.set_xticks(list(ticks), list(ticks.values()), rotation=90, fontsize=8)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    axes.set_axisbelow(True)
    above = axes.secondary_xaxis("top")
    above.set_xticks(range(len(steps)), [_count(count, "step") for count in steps])
    above.tick_params(length=0)
    above.spines["top"].set_visible(False)


def _baselines(rows: Rows) -> list[str]:
    """Return the rows of diffusers' own call, one for each batch and step count."""
    times = {(row["batch"], row["num_inference_steps"]): row["diffusers_ms"] for row in rows}
    return [
        f"{time:,.1f} ms for {_count(batch, 'image')} at {_count(steps, 'step')}"
        for (batch, steps), time in times.items()
    ]


def _fastest(rows: Rows) -> Mapping[str, Any]:
    return min(rows, key=lambda row: row["median_ms"])


def _outer(batches: Any) -> list[int]:
    known = sorted(set(batches))
    return list(dict.fromkeys([*known[:1], *known[-1:]]))


def _headline_steps(rows: Rows) -> int:
    return min({row["num_inference_steps"] for row in rows}, key=lambda count: abs(count - _HEADLINE_STEPS))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
