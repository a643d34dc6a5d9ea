"""The flags that choose another copy of a run's model, for the commands that take a finished run."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from noisepolicy.cli.arguments import add_flag, take_options
from noisepolicy.frozen.config import ModelConfig
from noisepolicy.settings import settings_of

if TYPE_CHECKING:
    from noisepolicy.training.config import TrainConfig

_OF_A_COPY = (
    *("dtype", "variant", "revision", "denoiser_file", "lora", "fuse_lora", "quantize", "quantize_parts"),
    *("scheduler", "scheduler_options", "call"),
)


def parse_with_copy(
    parser: argparse.ArgumentParser, argv: list[str] | None
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Add the flags, and parse the command line; return the settings of the copy by themselves."""
    group = parser.add_argument_group(
        "another copy of the run's model", "default: the run's; 'none' takes a setting back, --lora alone all LoRAs"
    )
    settings = [settings_of(ModelConfig)[name] for name in _OF_A_COPY]
    for setting in settings:
        add_flag(group, setting, None)
    argv, options = take_options(list(sys.argv[1:] if argv is None else argv))
    arguments = parser.parse_args(argv)
    given = {name: value for name, value in vars(arguments).items() if name in _OF_A_COPY}
    return arguments, {name: None if value == "none" else value for name, value in given.items()} | options


def with_copy(config: "TrainConfig", settings: dict[str, Any]) -> "TrainConfig":
    """Return the run's settings with those of another copy.

    Raises:
        ValueError: if a value does not fit.
    """
    return config.replace(**settings).with_absolute_paths() if settings else config
