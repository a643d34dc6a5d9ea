"""`noisepolicy-eval`: the evaluation and report of a finished or running run, with any rewards and prompts."""

import argparse
import sys
from pathlib import Path
from typing import Any

from noisepolicy.cli.copy import parse_with_copy, with_copy
from noisepolicy.cli.engine import add_engine_arguments, with_engine
from noisepolicy.cli.failures import prepare, quiet_loading, run_command


def main(argv: list[str] | None = None) -> int:
    """Run the command. Exit codes: see `run_command`."""
    parser = argparse.ArgumentParser(prog="noisepolicy-eval", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder of noisepolicy-train")
    parser.add_argument("--steps", help="denoising step counts, e.g. 1,2,4,8 (default: the run's)")
    parser.add_argument("--model", help="the run's model, to be repeated where it is module:object")
    parser.add_argument(
        "--reward", help="the run's reward, to be repeated where it is module:function or on another machine"
    )
    parser.add_argument("--rewards", nargs="+", help="further rewards to measure, see docs/rewards.md")
    parser.add_argument(
        "--prompts", nargs="+", help="prompt files, hf:owner/name or prompts, see docs/prompts.md (default: the run's)"
    )
    parser.add_argument("--prompt-column", help="column of the prompts in files of records (default: the run's)")
    parser.add_argument("--num-prompts", type=int, help="largest number of prompts (default: the run's)")
    parser.add_argument("--group-size", type=int, help="images of each prompt (default: the run's)")
    parser.add_argument(
        "--variety",
        type=float,
        default=0.0,
        help="how much the policy's images of a prompt are to differ, 0 to 1, see noisepolicy-generate (default: 0)",
    )
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: the run's)")
    add_engine_arguments(parser)
    parser.add_argument("--output-dir", type=Path, help="folder for the report (default: RUN/evaluation)")
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    arguments, copy = parse_with_copy(parser, argv)
    prepare("noisepolicy-eval")
    return run_command("noisepolicy-eval", lambda: _evaluate(arguments, copy), is_debug=arguments.debug)


def _evaluate(arguments: argparse.Namespace, copy: dict[str, Any]) -> None:
    quiet_loading()
    from noisepolicy.rewards.registry import with_absolute_paths
    from noisepolicy.training.config import TrainConfig
    from noisepolicy.training.run import Run
    from noisepolicy.training.run_folder import RunFolder
    from noisepolicy.training.trust import refuse_outside_code

    if arguments.num_prompts is not None and arguments.num_prompts < 1:
        raise ValueError(f"--num-prompts must be positive, got {arguments.num_prompts}")
    folder, config = RunFolder.open(arguments.run)
    config = with_copy(config, copy)
    trained_for = config.reward or config.model.name
    refuse_outside_code(
        folder.path,
        model=None if arguments.model else config.model.name,
        reward=None if arguments.reward else trained_for,
        eval_rewards=() if arguments.rewards else config.evaluation.rewards,
        eval_rewards_flag="--rewards",
    )
    if arguments.model and TrainConfig.of(model=arguments.model).with_absolute_paths().model.name != config.model.name:
        config = config.replace(model=arguments.model)
    if arguments.reward and with_absolute_paths(arguments.reward) != with_absolute_paths(trained_for):
        raise ValueError(f"--reward must repeat the run's own reward, {trained_for}; give other rewards with --rewards")
    changes = {
        "eval_steps": arguments.steps and _step_counts(arguments.steps),
        "eval_rewards": arguments.rewards,
        "eval_prompts": arguments.prompts,
        "prompt_column": arguments.prompt_column,
        "eval_num_prompts": arguments.num_prompts,
        "eval_group_size": arguments.group_size,
    }
    config = config.replace(**{name: value for name, value in changes.items() if value is not None})
    config.check()
    folder.check_model_is_there(config)
    run = Run.open(folder, with_engine(config, arguments), device=arguments.device)
    sweep = run.evaluate(variety=arguments.variety)
    if run.is_main:
        report = run.report(arguments.output_dir or folder.within("evaluation"))
        print(f"\n{sweep}\nreport  {report}")


def _step_counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--steps must be numbers with commas between, as in 1,2,4,8; got {text!r}") from None


if __name__ == "__main__":
    sys.exit(main())
