"""The run folder: config.yaml, policy/, checkpoints/, metrics.jsonl, samples/, summary.json and report.html."""

import json
import time
from pathlib import Path
from typing import Any

from noisepolicy.storage import write_text
from noisepolicy.training.config import TrainConfig, load_config

_RUNS = Path("runs")


class RunFolder:
    """Paths of one run and its metrics file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.policy = path / "policy"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples"
        self.summary = path / "summary.json"
        self.report = path / "report.html"
        self.launch = path / "launch.txt"
        self.tensorboard = path / "tensorboard"

    @classmethod
    def create(cls, config: TrainConfig) -> "RunFolder":
        """A new run's folder, with its `config.yaml`; see `choose`."""
        run = cls.choose(config)
        config.save(run.config)
        return run

    @classmethod
    def choose(cls, config: TrainConfig) -> "RunFolder":
        """Where a new run is to be: in runs/, named by the time, unless `config` says where. Writes nothing.

        Raises:
            ValueError: as `check_free`.
        """
        check_free(config.output_dir)
        return cls(config.output_dir or _RUNS / time.strftime("%Y%m%d-%H%M%S"))

    @classmethod
    def open(cls, path: Path) -> tuple["RunFolder", TrainConfig]:
        """An existing run and its settings.

        Raises:
            ValueError: if `path` does not hold a run.
        """
        run = cls(path)
        if not run.config.is_file():
            raise ValueError(f"{path} is not a run folder (there is no {run.config})")
        return run, load_config(run.config)

    @classmethod
    def find(cls, config: TrainConfig, launch_id: str | None, *, is_restart: bool) -> "RunFolder | None":
        """The run that an earlier start of the same launch began with `config`: in its folder, or the newest in runs/.

        Args:
            launch_id: the launcher's name for all starts; without one, `is_restart` tells, and settings must do.
        """
        if launch_id is None and not is_restart:
            return None
        runs = [cls(path) for path in ([config.output_dir] if config.output_dir else sorted(_RUNS.glob("*")))]
        return next((run for run in reversed(runs) if run._is_of(config, launch_id)), None)

    def _is_of(self, config: TrainConfig, launch_id: str | None) -> bool:
        if not self.config.is_file():
            return False
        if launch_id is not None:
            if not self.launch.is_file() or self.launch.read_text("utf-8") != launch_id:
                return False
        elif config.output_dir is None and self.summary.is_file():
            return False
        theirs = load_config(self.config).plain()
        # What was left to the algorithm (None), or to the machine, may be anything there.
        return all(
            value in (None, theirs[name]) or (name == "denoiser" and value == "auto")
            for name, value in config.plain().items()
            if name != "output_dir"
        )

    def begin(self, config: TrainConfig, launch_id: str | None) -> None:
        """Makes the folder a run's, with its settings; those come last."""
        if launch_id is not None:
            write_text(self.launch, launch_id)
        config.save(self.config)

    def checked_policy(self) -> Path:
        """The policy's folder.

        Raises:
            ValueError: if the run has not written one yet.
        """
        if not (self.policy / "config.json").is_file():
            raise ValueError(f"{self.path} has no policy yet; go on with: noisepolicy-train --resume {self.path}")
        return self.policy

    def read_summary(self) -> dict[str, Any]:
        """`summary.json`, or what is known of a run that has not ended."""
        if self.summary.is_file():
            return json.loads(self.summary.read_text("utf-8"))
        metrics = self.read_metrics()
        return {"images_trained": metrics[-1]["images"] if metrics else 0, "train_seconds": 0.0, "seconds": {}}

    def append_metrics(self, values: dict[str, Any]) -> None:
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The whole lines, in order; a last line cut by a crash is left out."""
        if not self.metrics.exists():
            return []
        values = []
        for line in self.metrics.read_text("utf-8").splitlines():
            try:
                values.append(json.loads(line))
            except ValueError:
                break
        return values

    def truncate_metrics(self, num_iterations: int) -> None:
        """Forgets the iterations that a resumed run makes again."""
        lines = [json.dumps(values) + "\n" for values in self.read_metrics() if values["iteration"] <= num_iterations]
        write_text(self.metrics, "".join(lines))


def check_free(output_dir: Path | None) -> None:
    """Raises ValueError if a run could not be made in `output_dir`: it holds one, or is a file."""
    if output_dir is None:
        return
    if RunFolder(output_dir).config.exists():
        raise ValueError(
            f"{output_dir} already holds a run; go on with --resume {output_dir}, or choose another --output-dir"
        )
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output-dir {output_dir} is a file; give a folder")
