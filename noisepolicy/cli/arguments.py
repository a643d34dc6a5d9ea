"""From the command line to settings: a preset or YAML file, flags over it, or a run to resume."""

import contextlib
import dataclasses
import io
import re
from dataclasses import dataclass
from pathlib import Path

import tyro

from noisepolicy.cli.launch import is_restart, launch_id
from noisepolicy.cli.trust import refuse_outside_rewards
from noisepolicy.training.config import TrainConfig, load_config
from noisepolicy.training.run_folder import MAY_CHANGE_ON_RESUME, RunFolder, check_free

_PRESETS = Path(__file__).parent.parent / "presets"
_DESCRIPTION = """Learn, per prompt, where a frozen diffusion model should start.

  noisepolicy-train                        train on the embedded model
  noisepolicy-train PRESET [flags]         start from a preset: {presets}
  noisepolicy-train --config FILE [flags]  start from a YAML file of the settings below
  noisepolicy-train --resume RUN           go on with a run, exactly as if it had not stopped; a reward that is
                                           module:function or on another machine must be repeated: --reward TEXT
  torchrun --nproc-per-node N -m noisepolicy.cli.train ...   on N processes; restarted, it goes on by itself

--debug shows a traceback with an error. The environment variable OMP_NUM_THREADS sets the number of CPU threads.
Every setting:"""


class UsageError(ValueError):
    """The command line cannot be carried out; the message is one line."""


@dataclass(frozen=True)
class Arguments:
    config: TrainConfig
    resumed: RunFolder | None
    """The run to go on with, if any."""


def parse_arguments(argv: list[str]) -> Arguments:
    """Settings from the command line; `--help` prints and exits. Where torchrun starts a run again, it is resumed.

    Raises:
        ValueError: one line that says what was wrong and what would be right.
    """
    argv, config_file = _take_option(argv, "--config")
    argv, resume = _take_option(argv, "--resume")
    preset = argv.pop(0) if argv and not argv[0].startswith("-") else None
    if sum(source is not None for source in (config_file, resume, preset)) > 1:
        raise UsageError("give one of PRESET, --config and --resume, not several")
    if resume is not None:
        run, default = RunFolder.open(Path(resume))
        default = dataclasses.replace(default, output_dir=run.path)
        _refuse_outside_rewards(run, default, argv)
        default, config = (given.with_absolute_paths() for given in (default, _parse_flags(argv, default)))
        changed = {
            field.name
            for field in dataclasses.fields(config)
            if getattr(config, field.name) != getattr(default, field.name)
        }
        if forbidden := sorted(changed - MAY_CHANGE_ON_RESUME):
            allowed = ", ".join("--" + name.replace("_", "-") for name in sorted(MAY_CHANGE_ON_RESUME))
            raise UsageError(f"--{forbidden[0].replace('_', '-')} cannot change in a resumed run; only {allowed} can")
        config.check()
        _refuse_other_training_prompts(default, config)
        run.check_model_is_there(config)
        return Arguments(config, run)
    if config_file is not None:
        default = load_config(Path(config_file))
    else:
        default = load_config(_preset_path(preset or "shapes"))
    config = _parse_flags(argv, default)
    config.check()
    config = config.with_absolute_paths()
    if (run := RunFolder.find(config, launch_id(), is_restart=is_restart())) is not None:
        _, saved = RunFolder.open(run.path)
        return Arguments(dataclasses.replace(saved, output_dir=run.path), run)
    check_free(config.output_dir)
    return Arguments(config, None)


def _refuse_outside_rewards(run: RunFolder, config: TrainConfig, argv: list[str]) -> None:
    """Unless the flags repeat them; that they are the run's own is checked with every other setting."""
    given = {argument.partition("=")[0].replace("_", "-") for argument in argv}
    if "--reward" not in given and config.reward is not None:
        refuse_outside_rewards(run.path, [config.reward], "--reward")
    if "--eval-rewards" not in given:
        refuse_outside_rewards(run.path, config.eval_rewards, "--eval-rewards")


def _refuse_other_training_prompts(default: TrainConfig, config: TrainConfig) -> None:
    if default.holds_out_prompts and not config.holds_out_prompts:
        raise UsageError(
            "this run holds out a fifth of its prompts for evaluation; --eval-prompts or --eval-num-prompts 0 would "
            f"add them to its training prompts; use noisepolicy-eval {default.output_dir} --prompts to evaluate others"
        )
    if config.holds_out_prompts and not default.holds_out_prompts:
        raise UsageError(
            "this run trains on all of its prompts and without --eval-prompts a fifth of them would be held out from "
            "now on; give --eval-prompts FILE to evaluate it"
        )


def _take_option(argv: list[str], name: str) -> tuple[list[str], str | None]:
    """Takes `name VALUE` or `name=VALUE` out of `argv`."""
    for index, argument in enumerate(argv):
        if argument == name:
            if index + 1 == len(argv):
                raise UsageError(f"{name} needs a value")
            return argv[:index] + argv[index + 2 :], argv[index + 1]
        if argument.startswith(name + "="):
            return argv[:index] + argv[index + 1 :], argument[len(name) + 1 :]
    return list(argv), None


def _preset_path(name: str) -> Path:
    names = _preset_names()
    if name not in names:
        raise UsageError(f"unknown preset {name!r}; choose from {', '.join(names)}")
    return _PRESETS / f"{name}.yaml"


def _preset_names() -> list[str]:
    return sorted(path.stem for path in _PRESETS.glob("*.yaml"))


def _parse_flags(argv: list[str], default: TrainConfig) -> TrainConfig:
    description = _DESCRIPTION.format(presets=", ".join(_preset_names()))
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(TrainConfig, prog="noisepolicy-train", description=description, args=argv, default=default)
    except SystemExit as exit_request:
        if exit_request.code in (0, None):
            raise
        raise UsageError(_one_line(errors.getvalue())) from None


def _one_line(box: str) -> str:
    """The message of tyro's framed error, without its frame and hints."""
    message = []
    for line in box.splitlines():
        text = re.sub("\x1b\\[[0-9;]*m", "", line).strip("│| \t")
        if not text or (text[0] in "╭╰─+-" and not text.startswith("--")):
            if message:
                break
            continue
        message.append(text)
    return " ".join(message) + "; see noisepolicy-train --help"
