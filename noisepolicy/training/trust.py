"""Trust in run folders, which may come from anybody.

A run's settings are used without asking, with one exception: models and rewards that run code or send pictures to
another machine must be repeated by whoever goes on with the run.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from noisepolicy.rewards.registry import outside_parts
from noisepolicy.training.config import FROM_PYTHON, is_model_object


def refuse_outside_code(
    run: Path,
    *,
    model: str | None = None,
    reward: str | None = None,
    eval_rewards: Sequence[str] = (),
    eval_rewards_flag: str = "--eval-rewards",
) -> None:
    """Refuse outside code and addresses of RUN/config.yaml that the user has not repeated.

    Args:
        run: The run folder.
        model: Name of the run's model, if it was not repeated.
        reward: The run's reward, if it was not repeated.
        eval_rewards: The run's further rewards, if they were not repeated.
        eval_rewards_flag: Flag that repeats the further rewards.

    Raises:
        ValueError: if one of them is outside code or an address; the message says what to write.
    """
    if model is not None and is_model_object(model):
        _refuse(run, f"a model that runs the code of {model}", "--model", [model])
    for flag, specs in (("--reward", [] if reward is None else [reward]), (eval_rewards_flag, eval_rewards)):
        for spec in specs:
            for part in () if spec.startswith(FROM_PYTHON) else outside_parts(spec):
                does = "sends pictures to" if part.startswith(("http://", "https://")) else "runs the code of"
                _refuse(run, f"a reward that {does} {part}", flag, specs)


def _refuse(run: Path, what: str, flag: str, texts: Sequence[str]) -> None:
    raise ValueError(
        f"{run / 'config.yaml'} names {what}; if that is meant, repeat it on the command line: {flag} "
        f"{shlex.join(texts)}"
    )


def resume_command(run: Path, model: str, reward: str | None, eval_rewards: Sequence[str]) -> str:
    """Return the command that goes on with a run, with the flags that must be repeated."""
    command = ["noisepolicy-train", "--resume", str(run)]
    if is_model_object(model):
        command += ["--model", model]
    if reward is not None and outside_parts(reward):
        command += ["--reward", reward]
    if any(outside_parts(spec) for spec in eval_rewards):
        command += ["--eval-rewards", *eval_rewards]
    return shlex.join(command)
