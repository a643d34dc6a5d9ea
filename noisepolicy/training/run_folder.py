"""The run folder: config.yaml, policy/, checkpoints/, history/, prompts/, metrics.jsonl, samples/, summary.json
and report.html.

One process at a time writes to it: it holds a lock on RUN/lock, which the system takes back when the process ends,
however it ends.
"""

import dataclasses
import fcntl
import json
import os
import socket
import tempfile
import time
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from noisepolicy.prompt import metadata_of
from noisepolicy.storage import HALF_WRITTEN, DamagedFileError, file_within, make_new_folder, write_text
from noisepolicy.training.checkpoint import whole_checkpoints
from noisepolicy.training.config import FROM_PYTHON, TrainConfig, is_model_object, load_config
from noisepolicy.training.prompt_list import PromptList
from noisepolicy.training.task import Given

_RUNS = Path("runs")
_PLOTTED = ("iteration", "images", "reward", "kl_to_prior")
"""Metrics of every line that a report needs."""
_PROMPTS = ("prompts", "eval_prompts")
"""Settings whose prompts may be given from Python; the folder keeps them in files of these names."""
_PROMPT_FIELD = "noisepolicy:prompt"  # no other field of a record has this name
OF_THE_RESULT = ("kl_budget", "num_candidates")
"""Settings that decide only how the finished policy is made of a run's weights."""
MAY_CHANGE_ON_RESUME = {
    *("num_iterations", "checkpoint_every", "sample_every", "trackers", "tensorboard", "timeout", "license"),
    *("device", "engine", "cuda_graph", "cpu_offload", "vae_slicing", "overlap"),
    *("rollout_batch_size", "gradient_accumulation_steps"),
    *("eval_steps", "eval_num_prompts", "eval_group_size", "eval_rewards", "eval_prompts"),
    *OF_THE_RESULT,
    *("model", "prompts"),
}
"""Settings that may differ when a run is resumed; the run keeps the new values. They affect rounding, the run's length
(and with it when the critic's learning rate falls), its evaluation and its result, or are places of the model and the
prompts, whose hashes are checked."""


class RunFolder:
    """Paths of one run, its lock and its metrics file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.policy = path / "policy"
        self.checkpoints = path / "checkpoints"
        self.history = path / "history"
        self.prompts = path / "prompts"
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples"
        self.summary = path / "summary.json"
        self.report = path / "report.html"
        self.launch = path / "launch.txt"
        self._lock: IO[str] | None = None
        self.tensorboard = path / "tensorboard"

    @classmethod
    def choose(cls, config: TrainConfig, *, is_temporary: bool = False) -> "RunFolder":
        """Choose a new run's folder: `config`'s, or a new one, which is made: a temporary one, or runs/ and the time.

        Raises:
            ValueError: as `check_free`.
        """
        check_free(config.output_dir)
        if config.output_dir is not None:
            return cls(config.output_dir)
        if is_temporary:
            return cls(Path(tempfile.mkdtemp(prefix="noisepolicy-")))
        return cls(make_new_folder(_RUNS / time.strftime("%Y%m%d-%H%M%S")))

    def give_up(self) -> None:
        """Remove the folder that `choose` made for a run that could not be started, unless there are files in it."""
        with suppress(OSError):
            self.path.rmdir()

    @classmethod
    def open(cls, path: Path) -> tuple["RunFolder", TrainConfig]:
        """Open an existing run; return it and its settings.

        Raises:
            ValueError: if `path` does not hold a run, or its settings cannot work.
        """
        run = cls(path)
        if not run.config.is_file():
            raise ValueError(f"{path} is not a run folder (there is no {run.config})")
        config = load_config(file_within(path, run.config.name))
        try:
            config.check()
        except ValueError as error:
            raise ValueError(f"{run.config}: {error}") from error
        return run, config

    def lock(self) -> None:
        """Keep others from writing here until `unlock` or the end of the process, and remove half-written files.

        Raises:
            ValueError: if another process holds the lock, or a file that a run writes to is a link.
        """
        if self._lock is not None:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        folders = (self.policy, self.checkpoints, self.history, self.prompts, self.samples, self.tensorboard)
        inside = [path for folder in folders for path in folder.glob("*")]
        for path in (self.path / "lock", self.metrics, *folders, *inside):
            if path.is_symlink():
                raise ValueError(f"{path} is a link; a run writes to files of its own folder only")
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        file = open(descriptor, "r+", encoding="utf-8")  # noqa: SIM115  # held until `unlock`
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            user = file.read().strip() or "another process"
            file.close()
            raise ValueError(f"{self.path} is in use by {user}; wait for it, or stop it") from None
        self._lock = file
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        for path in (*self.path.glob(HALF_WRITTEN), *inside):
            if path.match(HALF_WRITTEN) and path.is_file():
                path.unlink()

    def unlock(self) -> None:
        """Let others write here again."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @classmethod
    def find(cls, config: TrainConfig, launch_id: str | None, *, is_restart: bool) -> "RunFolder | None":
        """Find the run that an earlier start of this launch began with `config`: in its folder, or the newest in runs/.

        Args:
            launch_id: The launcher's name of all starts. Without one, a run with the same settings is taken if
                `is_restart`.
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
        # Settings that were left to the algorithm (None), or to the machine, may be anything there.
        return all(
            value in (None, theirs[name]) or (name == "engine" and value == "auto")
            for name, value in config.plain().items()
            if name != "output_dir"
        )

    def begin(self, config: TrainConfig, launch_id: str | None, given: Given) -> None:
        """Write the prompts that were given from Python and, last, the settings, which make the folder a run's."""
        if launch_id is not None:
            write_text(self.launch, launch_id)
        self.keep_prompts(given)
        config.save(self.config)

    def keep_prompts(self, given: Given) -> None:
        """Write the prompts that were given from Python to files of the run."""
        for name in _PROMPTS:
            if (prompts := getattr(given, name)) is not None:
                write_text(self.path / f"{name}.jsonl", "".join(map(_as_record, prompts)))

    def given(self, config: TrainConfig, given: Given) -> Given:
        """Return `given` with the prompts that this run was given from Python.

        Raises:
            ValueError: if the prompts' files are missing or damaged.
        """
        kept = {}
        for name, sources in zip(_PROMPTS, (config.prompts, config.evaluation.prompts), strict=True):
            if sources == (FROM_PYTHON + name,) and getattr(given, name) is None:
                if not (self.path / f"{name}.jsonl").is_file():
                    raise ValueError(f"{self.path / name}.jsonl, which holds prompts of this run, is not there")
                kept[name] = PromptList([str(file_within(self.path, f"{name}.jsonl").absolute())], _PROMPT_FIELD)
        return dataclasses.replace(given, **kept)

    def checked_policy(self) -> Path:
        """Return the policy's folder.

        Raises:
            ValueError: if the run has not written a policy yet.
        """
        if not (self.policy / "config.json").is_file():
            raise ValueError(f"{self.path} has no policy yet; go on with: noisepolicy-train --resume {self.path}")
        file_within(self.path, "policy/config.json")
        return self.policy

    def within(self, name: str) -> Path:
        """Return a folder inside the run to write to.

        Raises:
            ValueError: if the folder is a link that leads out of the run.
        """
        folder = self.path / name
        if not folder.resolve().is_relative_to(self.path.resolve()):
            raise ValueError(f"{folder} is a link that leads out of the run; give --output-dir")
        return folder

    def read_summary(self) -> dict[str, Any]:
        """Read `summary.json`, or return what is known of a run that has not ended.

        Raises:
            DamagedFileError: if the file is not a summary.
        """
        if self.summary.is_file():
            try:
                summary = json.loads(self.summary.read_bytes())
                numbers = [summary["images_trained"], summary["train_seconds"], *summary["seconds"].values()]
                if not _are_numbers(numbers):
                    raise TypeError("what should be a number is none")
                return summary
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DamagedFileError(
                    f"{self.summary} is damaged ({error}); write it again with: noisepolicy-train --resume {self.path}"
                ) from error
        metrics = self.read_metrics()
        summary = {"images_trained": metrics[-1]["images"] if metrics else 0, "train_seconds": 0.0, "seconds": {}}
        checkpoint = next(whole_checkpoints(self.checkpoints), None)
        if checkpoint is not None and (sha256 := checkpoint.progress.get("settings", {}).get("frozen_sha256")):
            summary["frozen_sha256_before"] = sha256
        return summary

    def check_model_is_there(self, config: TrainConfig) -> None:
        """Raise ValueError if the model's folder is gone that was there when the run was started."""
        name = config.model.name
        if Path(name).is_absolute() and not is_model_object(name) and not Path(name).exists():
            raise ValueError(
                f"{self.config} says that the model is in {name}, which is not there; if the model has moved, "
                f"correct {self.config.name}"
            )

    def warn_of_another_model(self, sha256: str | None) -> None:
        """Warn if the run was trained with a model whose weights have another hash, or if that is not known."""
        try:
            trained_with = self.read_summary().get("frozen_sha256_before")
        except DamagedFileError as error:
            warnings.warn(f"{error}; until then, the model here is not compared with the run's", stacklevel=2)
            return
        if sha256 is not None and trained_with is not None and trained_with != sha256:
            warnings.warn(
                f"the model here (SHA-256 {sha256[:12]}...) is not the one that {self.path} was trained with "
                f"({str(trained_with)[:12]}...): other weights, or another dtype",
                stacklevel=2,
            )

    def read_metrics(self) -> list[dict[str, Any]]:
        """Read the whole lines in order. A last line cut by a crash is left out; a damaged line too, with a warning."""
        if not self.metrics.exists():
            return []
        values = []
        for number, line in enumerate(self.metrics.read_bytes().splitlines(keepends=True), 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict) and _are_numbers([row.get(name) for name in _PLOTTED]):
                values.append(row)
            elif line.endswith(b"\n"):
                warnings.warn(f"line {number} of {self.metrics} is damaged and left out", stacklevel=2)
        return values

    def truncate_metrics(self, num_iterations: int) -> None:
        """Remove the iterations that a resumed run makes again; warn if others are missing."""
        kept = [values for values in self.read_metrics() if values["iteration"] <= num_iterations]
        if len(kept) < num_iterations:
            warnings.warn(
                f"{self.metrics} lacks {num_iterations - len(kept)} of {num_iterations} iterations; the report's "
                "curves will too",
                stacklevel=2,
            )
        write_text(self.metrics, "".join(json.dumps(values) + "\n" for values in kept))


def _as_record(prompt: str) -> str:
    """Write a prompt with its metadata as a line of JSON. Dates and the like become text, as in their checksum."""
    return json.dumps({**metadata_of(prompt), _PROMPT_FIELD: str(prompt)}, default=str) + "\n"


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(isinstance(value, int | float) for value in values)


def check_free(output_dir: Path | None) -> None:
    """Raise ValueError if `output_dir` cannot take a run, because it is a file or holds a run, whole or not."""
    if output_dir is None:
        return
    if RunFolder(output_dir).checkpoints.exists() and not RunFolder(output_dir).config.exists():
        raise ValueError(
            f"{output_dir} holds checkpoints of a run whose config.yaml is gone; put it back and go on with --resume "
            f"{output_dir}, or choose another --output-dir"
        )
    if RunFolder(output_dir).config.exists():
        raise ValueError(
            f"{output_dir} already holds a run; go on with --resume {output_dir}, or choose another --output-dir"
        )
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output-dir {output_dir} is a file; give a folder")
