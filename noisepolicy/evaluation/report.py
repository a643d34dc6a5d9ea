"""`report.html`, one self-contained file that says what a run did, and the model card of its policy.

Everything a user wrote is escaped.
"""

import base64
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, Template

from noisepolicy.evaluation.figures import picture_bytes, sweep_plot, training_curves
from noisepolicy.evaluation.sweep import Pair, measured_on, sampler_noise_text
from noisepolicy.rewards.registry import without_folders
from noisepolicy.storage import write_text

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


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
    rows, common = summary["sweep"], _common(config, summary)
    focus = common["focus"]
    shown = [pair for pair in pairs if pair.num_inference_steps == focus["num_inference_steps"]] if focus else []
    html = _template("report.html.j2", is_html=True).render(
        **common,
        pairs=[_embed(pair) for pair in shown],
        noise_notes=[(row["num_inference_steps"], note) for row in rows if (note := sampler_noise_text(row))],
        sweep_svg=sweep_plot(rows, config["num_inference_steps"]) if rows else "",
        curves_svg=training_curves(metrics),
        config_text=yaml.safe_dump(config, sort_keys=False),
    )
    write_text(path, html)


def write_model_card(folder: Path, *, config: dict[str, Any], summary: dict[str, Any]) -> None:
    """Writes `README.md` beside the policy, atomically, with `before_after.png` if the folder has one.

    Args:
        config, summary: As in `write_report`.
    """
    rows = summary["sweep"]
    text = _template("model_card.md.j2", is_html=False).render(
        **_common(config, summary),
        base_model=config["model"] if _HUB_ID.fullmatch(config["model"]) else None,
        has_strict=bool(rows) and rows[0]["base"]["strict"] is not None,
        has_picture=(folder / "before_after.png").is_file(),
    )
    write_text(folder / "README.md", text)


def _template(name: str, *, is_html: bool) -> Template:
    environment = Environment(loader=PackageLoader("noisepolicy.evaluation", "."), autoescape=is_html)
    environment.filters |= {"short": without_folders, "code": _code}
    return environment.get_template(name)


def _common(config: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    """Return the values that both templates show."""
    trained = config["num_inference_steps"]
    return {
        "config": config,
        "summary": summary,
        "trained": ", ".join(map(str, trained)),
        "measured_on": measured_on(config, max((row.get("variety", 0.0) for row in summary["sweep"]), default=0.0)),
        # The headline is the first step count trained, or the nearest one measured.
        "focus": min(summary["sweep"], key=lambda row: abs(row["num_inference_steps"] - trained[0]), default=None),
    }


def _code(text: str) -> str:
    """Format any text as Markdown code on one line."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


def _embed(pair: Pair) -> dict[str, Any]:
    images = {
        side: f"data:image/{suffix};base64,{base64.b64encode(data).decode()}"
        for side in ("base", "policy")
        for data, suffix in [picture_bytes(getattr(pair, f"{side}_image"))]
    }
    return {**{field.name: getattr(pair, field.name) for field in dataclasses.fields(pair)}, **images}
