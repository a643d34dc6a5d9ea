"""`report.html`: one self-contained file that says what a run did. Everything a user wrote is escaped."""

import base64
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader

from noisepolicy.evaluation.figures import picture_bytes, sweep_plot, training_curves
from noisepolicy.evaluation.sweep import Pair, measured_on
from noisepolicy.rewards.registry import without_folders
from noisepolicy.storage import write_text


def write_report(
    path: Path,
    *,
    config: dict[str, Any],
    summary: dict[str, Any],
    metrics: Sequence[dict[str, Any]],
    pairs: Sequence[Pair],
) -> None:
    """Writes the report atomically.

    Args:
        config: The run's settings as plain values.
        summary: The content of `summary.json`.
        metrics: The lines of `metrics.jsonl`.
        pairs: Same-seed pictures of the sweep, at every step count.
    """
    trained = list(config["num_inference_steps"])
    rows = summary["sweep"]
    # The report's headline is the first step count trained, or the nearest one measured.
    focus = min(rows, key=lambda row: abs(row["num_inference_steps"] - trained[0]), default=None)
    shown = [pair for pair in pairs if pair.num_inference_steps == focus["num_inference_steps"]] if focus else []
    environment = Environment(loader=PackageLoader("noisepolicy.evaluation", "."), autoescape=True)
    environment.filters["short"] = without_folders
    html = environment.get_template("report.html.j2").render(
        config=config,
        summary=summary,
        focus=focus,
        trained=", ".join(map(str, trained)),
        measured_on=measured_on(config),
        pairs=[_embed(pair) for pair in shown],
        sweep_svg=sweep_plot(rows, trained) if rows else "",
        curves_svg=training_curves(metrics),
        config_text=yaml.safe_dump(config, sort_keys=False),
    )
    write_text(path, html)


def _embed(pair: Pair) -> dict[str, Any]:
    images = {
        side: f"data:image/{suffix};base64,{base64.b64encode(data).decode()}"
        for side in ("base", "policy")
        for data, suffix in [picture_bytes(getattr(pair, f"{side}_image"))]
    }
    return {**{field.name: getattr(pair, field.name) for field in dataclasses.fields(pair)}, **images}
