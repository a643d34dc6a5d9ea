"""The model card of a policy: its training and its gain, in the run's own numbers."""

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from noisepolicy.evaluation.sweep import measured_on
from noisepolicy.rewards.registry import without_folders
from noisepolicy.storage import write_text

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def write_model_card(folder: Path, *, config: dict[str, Any], summary: dict[str, Any]) -> None:
    """Writes `README.md` beside the policy, atomically, with `before_after.png` if the folder has one.

    Args:
        config: The run's settings as plain values.
        summary: The content of `summary.json`.
    """
    rows = summary["sweep"]
    trained = config["num_inference_steps"]
    environment = Environment(loader=PackageLoader("noisepolicy.evaluation", "."), autoescape=False)
    environment.filters["code"] = _code
    environment.filters["short"] = without_folders
    text = environment.get_template("model_card.md.j2").render(
        config=config,
        summary=summary,
        trained=", ".join(map(str, trained)),
        measured_on=measured_on(config),
        base_model=config["model"] if _HUB_ID.fullmatch(config["model"]) else None,
        focus=min(rows, key=lambda row: abs(row["num_inference_steps"] - trained[0]), default=None),
        has_strict=bool(rows) and rows[0]["base"]["strict"] is not None,
        has_picture=(folder / "before_after.png").is_file(),
    )
    write_text(folder / "README.md", text)


def _code(text: str) -> str:
    """Format any text as Markdown code on one line."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"
