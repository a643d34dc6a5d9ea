"""A run's metrics and pictures in the trackers that Accelerate knows: TensorBoard, Trackio, W&B, MLflow and others.

A tracker looks on. One that cannot be started is an error before the first image; one that fails later is left out,
with a warning, and the run goes on.
"""

import json
import uuid
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image

from noisepolicy.evaluation.sweep import Sweep
from noisepolicy.storage import write_json

_PROJECT = "noisepolicy"


def check_trackers(names: Sequence[str]) -> None:
    """Raise `ValueError` if Accelerate does not know a tracker, or the tracker's package is not installed."""
    known = [name for name in LoggerType.list() if name != "all"]
    for name in names:
        if name not in known:
            raise ValueError(f"--trackers: unknown tracker {name!r}; choose from {', '.join(known)}")
        if name not in map(str, get_available_trackers()):
            package = "'noisepolicy[tensorboard]'" if name == "tensorboard" else name.replace("_", "-")
            raise ValueError(f"--trackers {name} needs a package that is not installed: pip install {package}")


class Trackers:
    """The trackers of one run, on its main process.

    Args:
        accelerator: Accelerate's object.
        names: Names of the trackers.
        folder: The run folder. TensorBoard writes to its `tensorboard`, the others to places of their own.
        config: The run's settings.

    Raises:
        RuntimeError: if a tracker cannot be started.
    """

    def __init__(self, accelerator: Accelerator, names: Sequence[str], folder: Path, config: dict[str, Any]) -> None:
        run_id = _run_id(folder / "tracker.json")
        name = f"{folder.name}-{run_id[:6]}"
        accelerator.project_configuration.set_directories(str(folder))
        accelerator.log_with = [
            TensorBoardTracker("tensorboard", str(folder)) if tracker == "tensorboard" else LoggerType(tracker)
            for tracker in names
        ]
        simple = {
            key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in config.items()
        }
        try:
            accelerator.init_trackers(
                _PROJECT,
                config=simple,
                init_kwargs={
                    "wandb": {"id": run_id, "name": name, "resume": "allow"},
                    "trackio": {"name": name, "resume": "allow"},
                    "mlflow": {"run_name": name},
                },
            )
        except Exception as error:  # a service may raise anything
            raise RuntimeError(f"--trackers {' '.join(names)}: {type(error).__name__}: {error}") from error
        self._trackers = list(accelerator.trackers)
        accelerator.trackers = []  # they are closed here

    def log(self, values: dict[str, float], step: int) -> None:
        """Show numbers by name."""
        self._each(lambda tracker: tracker.log(values, step=step))

    def log_picture(self, name: str, path: Path, step: int) -> None:
        """Show a picture from a file."""
        if path.is_file():
            self._each(lambda tracker: _log_picture(tracker, name, path, step))

    def log_result(self, sweep: Sweep, report: Path, step: int) -> None:
        """Show the final table, and the report where a tracker can hold it."""
        values = {
            f"evaluation/{row['num_inference_steps']}_steps/{name}": value
            for row in sweep.rows
            for name, value in (
                ("base", row["base"]["reward"]),
                ("policy", row["policy"]["reward"]),
                ("gain", row["gain"]),
            )
        }
        if values:
            self.log(values, step)
        columns = ["steps", "base", "policy", "gain", "gain, low", "gain, high"]
        data = [
            [row["num_inference_steps"], row["base"]["reward"], row["policy"]["reward"], row["gain"], *row["gain_ci95"]]
            for row in sweep.rows
        ]
        self._each(lambda tracker: _log_result(tracker, columns, data, report, step))

    def close(self) -> None:
        """Finish all trackers."""
        self._each(lambda tracker: tracker.finish())
        self._trackers = []

    def _each(self, function: Callable[[GeneralTracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                function(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                warnings.warn(
                    f"the tracker {tracker.name} fails and is left out from now on ({type(error).__name__}: {error})",
                    stacklevel=4,
                )


def _run_id(path: Path) -> str:
    """Return the run's name for trackers, by which a resumed run goes on in the same place."""
    try:
        return str(json.loads(path.read_text("utf-8"))["id"])
    except (OSError, ValueError, LookupError, TypeError):  # there is none yet, or it is damaged
        write_json(path, {"id": uuid.uuid4().hex})
        return _run_id(path)


def _log_picture(tracker: GeneralTracker, name: str, path: Path, step: int) -> None:
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    if tracker.name == "trackio":
        import trackio

        tracker.log({name: trackio.Image(pixels)}, step=step)
    elif tracker.name == "tensorboard":
        tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
    elif hasattr(tracker, "log_images"):
        tracker.log_images({name: [pixels]}, step=step)
    elif hasattr(tracker, "log_artifact"):
        tracker.log_artifact(str(path), name)


def _log_result(tracker: GeneralTracker, columns: list[str], data: list[list[Any]], report: Path, step: int) -> None:
    if tracker.name == "trackio":
        import trackio

        tracker.log({"evaluation": trackio.Table(columns=columns, data=data)}, step=step)
    elif tracker.name == "tensorboard":
        lines = [columns, ["---"] * len(columns), *([f"{value:.4g}" for value in row] for row in data)]
        tracker.log({"evaluation": "\n".join(f"| {' | '.join(line)} |" for line in lines)}, step=step)
    elif hasattr(tracker, "log_table"):
        tracker.log_table("evaluation", columns=columns, data=data, step=step)
    if tracker.name == "wandb":
        import wandb

        tracker.log({"report": wandb.Html(str(report))}, step=step)
    elif hasattr(tracker, "log_artifact"):
        tracker.log_artifact(str(report))
