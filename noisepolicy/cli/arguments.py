"""Parsing of the command line: a preset or YAML file with flags over it, or a run to resume."""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from noisepolicy.settings import Setting, find_setting, flat_values, option_value, settings_of
from noisepolicy.training.config import RECIPES, RENAMED, TrainConfig, load_config, load_preset, preset_names
from noisepolicy.training.launch import is_restart, launch_id
from noisepolicy.training.run_folder import RunFolder, check_free

_USAGE = """
  noisepolicy-train [flags]                train on the embedded model
  noisepolicy-train PRESET [flags]         start from a preset: {presets}
  noisepolicy-train --config FILE [flags]  start from a YAML file of the settings below
  noisepolicy-train --resume RUN [flags]   go on with a run, exactly as if it had not stopped; what runs code or sends
                                           pictures to another machine must be repeated: --reward, --model
  noisepolicy-train --list-models          sizes of the presets, or of --model FOLDER, and what fits this machine
  torchrun --nproc-per-node N -m noisepolicy.cli.train ...   on N processes; restarted, it goes on by itself"""
_EPILOG = """--debug shows a traceback with an error. The environment variable OMP_NUM_THREADS sets the number of CPU
threads. Defaults are those of --algorithm {algorithm}; add --algorithm NAME to see another one's."""


class UsageError(ValueError):
    """Raised if the command line cannot be carried out; the message is one line."""


@dataclass(frozen=True)
class Arguments:
    """The settings of a command line, and the run to resume."""

    config: TrainConfig
    resumed: RunFolder | None
    """Run to resume, if any."""


def parse_arguments(argv: list[str]) -> Arguments:
    """Parse the command line; `--help` prints and exits. A run that torchrun starts again is resumed.

    Raises:
        ValueError: with one line that says what was wrong and what would be right.
    """
    argv = [_renamed(argument) for argument in argv]
    argv, config_file = take_option(argv, "--config")
    argv, resume = take_option(argv, "--resume")
    preset = argv.pop(0) if argv and not argv[0].startswith("-") else None
    if sum(source is not None for source in (config_file, resume, preset)) > 1:
        raise UsageError("give one of PRESET, --config and --resume, not several")
    if resume is not None:
        return _parse_resume(RunFolder.open(Path(resume)), argv)
    default = load_config(Path(config_file)) if config_file is not None else load_preset(preset or "shapes")
    config = _parse_flags(argv, default)
    config.check()
    config = config.with_absolute_paths()
    if (run := RunFolder.find(config, launch_id(), is_restart=is_restart())) is not None:
        _, saved = RunFolder.open(run.path)
        return Arguments(saved.replace(output_dir=run.path), run)
    check_free(config.output_dir)
    return Arguments(config, None)


def _parse_resume(opened: tuple[RunFolder, TrainConfig], argv: list[str]) -> Arguments:
    from noisepolicy.training.run import check_resumed  # heavy
    from noisepolicy.training.trust import refuse_outside_code

    run, saved = opened[0], opened[1].replace(output_dir=opened[0].path)
    repeated = {argument.partition("=")[0].replace("_", "-") for argument in argv}
    # That they are the run's own is checked with every other setting.
    refuse_outside_code(
        run.path,
        model=None if "--model" in repeated else saved.model.name,
        reward=None if "--reward" in repeated else saved.reward,
        eval_rewards=() if "--eval-rewards" in repeated else saved.evaluation.rewards,
    )
    config = _parse_flags(argv, saved).with_absolute_paths()
    check_resumed(saved, config)
    run.check_model_is_there(config)
    return Arguments(config, run)


def _renamed(argument: str) -> str:
    """Return the flag's present name, with - for _, and print a note if it was given an old name."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    if "." in flag:  # an option, whose name is diffusers'
        return argument
    flag = flag.replace("_", "-")
    new = RENAMED.get(flag.removeprefix("--").replace("-", "_"))
    if new is not None:
        new_flag = "--" + (new if "." in new else new.replace("_", "-"))
        print(f"noisepolicy-train: note: {flag} is called {new_flag} now", file=sys.stderr)
        flag = new_flag
    return flag + equals + value


def take_option(argv: list[str], name: str) -> tuple[list[str], str | None]:
    """Take `name VALUE` or `name=VALUE` out of `argv`."""
    for index, argument in enumerate(argv):
        if argument == name:
            if index + 1 == len(argv):
                raise UsageError(f"{name} needs a value")
            return argv[:index] + argv[index + 2 :], argv[index + 1]
        if argument.startswith(name + "="):
            return argv[:index] + argv[index + 1 :], argument[len(name) + 1 :]
    return list(argv), None


def take_options(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Take the options of mappings out of `argv`, e.g. `--call.strength 0.6`; return them by their dotted names."""
    rest, options = list(argv), {}
    for argument in argv:
        flag = argument.partition("=")[0]
        if flag.startswith("--") and "." in flag and find_setting(TrainConfig, flag[2:]) is not None:
            rest, value = take_option(rest, flag)
            if value is not None:
                options[flag[2:].replace("-", "_")] = option_value(value)
    return rest, options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see noisepolicy-train --help")


def _parse_flags(argv: list[str], default: TrainConfig) -> TrainConfig:
    argv, options = take_options(argv)
    values = flat_values(default)
    first = _Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--algorithm", choices=tuple(RECIPES), default=default.algorithm)
    algorithm = first.parse_known_args(argv)[0].algorithm
    parser = _Parser(
        prog="noisepolicy-train",
        usage=_USAGE.format(presets=", ".join(preset_names())),
        description="Learn, per prompt, where a frozen diffusion model should start.",
        epilog=_EPILOG.format(algorithm=algorithm),
        allow_abbrev=False,
    )
    settings = settings_of(TrainConfig)
    groups = {
        title: parser.add_argument_group(title)
        for title in dict.fromkeys(setting.group for setting in settings.values())
    }
    for name, setting in settings.items():
        is_left = values[name] is None
        add_flag(groups[setting.group], setting, RECIPES[algorithm].get(name) if is_left else values[name])
    given = vars(parser.parse_args(argv))
    return default.replace(**given, **options)


def add_flag(group: Any, setting: Setting, default: Any) -> None:
    """Add a setting's flag to a parser or a group; its value is there only if it is given."""
    options: dict[str, Any] = {"dest": setting.name, "default": argparse.SUPPRESS, "help": _help(setting, default)}
    if setting.kind is bool:
        group.add_argument(setting.flag, action=argparse.BooleanOptionalAction, **options)
        return
    if setting.is_list and setting.kind is int:
        options |= {"type": _numbers, "metavar": "N[,N...]"}
    elif setting.is_list:
        options |= {"nargs": "*", "metavar": "TEXT"}
    elif setting.options is not None:
        options |= {"metavar": "VALUE"}  # for --help alone: they are taken before
    else:
        names = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
        options["metavar"] = "{" + ",".join(setting.choices) + "}" if setting.choices else names[setting.kind]
    group.add_argument(setting.flag, **options)


def _help(setting: Setting, default: Any) -> str:
    """Return the setting's docstring with its bounds and its real default."""
    notes = []
    if setting.bounds is not None and str(setting.bounds) != "must be positive":
        notes.append(str(setting.bounds))
    if default not in (None, (), "", {}) and not isinstance(default, bool) and "Default:" not in setting.help:
        notes.append(f"default: {_shown(default)}")
    text = setting.help + (f" ({'; '.join(notes)})" if notes else "")
    return text.replace("%", "%%")


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "no limit" if value == math.inf else f"{value:g}" if isinstance(value, float) else str(value)


def _numbers(text: str) -> Sequence[int]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers with commas between, as in 1,2,4,8; got {text!r}") from None
