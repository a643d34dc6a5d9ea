"""Runs may be anybody's. What a run's settings name is used without asking, but for rewards that run code or send
pictures to another machine: those must be repeated on the command line."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from noisepolicy.rewards.registry import outside_parts
from noisepolicy.training.config import FROM_PYTHON


def refuse_outside_rewards(run: Path, specs: Sequence[str], flag: str) -> None:
    """For the rewards of RUN/config.yaml, read with `flag` not given.

    Raises:
        ValueError: if one of them has a part that is outside; it says what to write.
    """
    for spec in specs:
        for part in () if spec.startswith(FROM_PYTHON) else outside_parts(spec):
            does = "sends pictures to" if part.startswith(("http://", "https://")) else "runs the code of"
            raise ValueError(
                f"{run / 'config.yaml'} names a reward that {does} {part}; if that is meant, repeat it on the command "
                f"line: {flag} {shlex.join(specs)}"
            )


def resume_command(run: Path, reward: str | None, eval_rewards: Sequence[str]) -> str:
    """What goes on with a run, with the rewards that must be repeated."""
    command = ["noisepolicy-train", "--resume", str(run)]
    if reward is not None and outside_parts(reward):
        command += ["--reward", reward]
    if any(outside_parts(spec) for spec in eval_rewards):
        command += ["--eval-rewards", *eval_rewards]
    return shlex.join(command)
