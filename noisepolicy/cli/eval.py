"""`noisepolicy-eval`: the step sweep and report of a finished or running run, with any rewards and prompts."""

import argparse
import dataclasses
import sys
from pathlib import Path

from noisepolicy.cli.denoiser import add_denoiser_arguments, with_denoiser
from noisepolicy.cli.failures import prepare, quiet_loading, run_command
from noisepolicy.cli.trust import refuse_outside_rewards


def main(argv: list[str] | None = None) -> int:
    """Exit codes: see `run_command`."""
    parser = argparse.ArgumentParser(prog="noisepolicy-eval", description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder of noisepolicy-train")
    parser.add_argument("--steps", help="denoising step counts, e.g. 1,2,4,8 (default: the run's)")
    parser.add_argument(
        "--reward", help="the run's own; to be repeated where it is module:function or on another machine"
    )
    parser.add_argument("--rewards", nargs="+", help="further rewards to measure, see docs/rewards.md")
    parser.add_argument(
        "--prompts", nargs="+", help="prompt files, hf:owner/name or prompts, see docs/prompts.md (default: the run's)"
    )
    parser.add_argument("--prompt-column", help="the column of the prompts in files of records (default: the run's)")
    parser.add_argument("--num-prompts", type=int, help="at most (default: the run's)")
    parser.add_argument("--group-size", type=int, help="images a prompt (default: the run's)")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: the run's)")
    add_denoiser_arguments(parser)
    parser.add_argument("--output-dir", type=Path, help="default: RUN/evaluation")
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    arguments = parser.parse_args(argv)
    prepare("noisepolicy-eval")
    return run_command("noisepolicy-eval", lambda: _evaluate(arguments), is_debug=arguments.debug)


def _evaluate(arguments: argparse.Namespace) -> None:
    quiet_loading()
    from noisepolicy.cli.devices import for_device, make_run_accelerator, with_mixed_precision
    from noisepolicy.cli.sweeping import print_table, run_sweep
    from noisepolicy.evaluation import measured_on, write_report
    from noisepolicy.policies import NoisePolicy
    from noisepolicy.rewards.registry import with_absolute_paths
    from noisepolicy.storage import write_json
    from noisepolicy.training.processes import Processes
    from noisepolicy.training.run_folder import RunFolder
    from noisepolicy.training.task import load_task

    run, config = RunFolder.open(arguments.run)
    trained_for = config.reward or config.model
    if arguments.reward is None:
        refuse_outside_rewards(run.path, [trained_for], "--reward")
    elif with_absolute_paths(arguments.reward) != with_absolute_paths(trained_for):
        raise ValueError(f"--reward repeats what the run was trained for, {trained_for}; others are --rewards")
    if arguments.rewards is None:
        refuse_outside_rewards(run.path, config.eval_rewards, "--rewards")
    changes = {
        "eval_steps": arguments.steps and _step_counts(arguments.steps),
        "eval_rewards": arguments.rewards and tuple(arguments.rewards),
        "eval_prompts": arguments.prompts and tuple(arguments.prompts),
        "prompt_column": arguments.prompt_column,
        "eval_num_prompts": arguments.num_prompts,
        "eval_group_size": arguments.group_size,
    }
    config = dataclasses.replace(config, **{name: value for name, value in changes.items() if value is not None})
    config.check()
    run.check_model_is_there(config)
    policy = NoisePolicy.from_pretrained(run.checked_policy())
    accelerator = make_run_accelerator(config, arguments.device)
    device = accelerator.device
    config = for_device(with_denoiser(with_mixed_precision(config, accelerator), arguments, device), device)
    task = load_task(config, device, for_training=False)
    prompts = task.eval_prompts[: config.eval_num_prompts]
    if not prompts:
        raise ValueError("there are no held-out prompts to evaluate on; give --prompts and --num-prompts")
    embeds = task.frozen.encode([str(prompt) for prompt in prompts])
    sweep = run_sweep(
        policy.to(device),
        task,
        prompts,
        embeds,
        step_counts=task.eval_steps,
        group_size=config.eval_group_size,
        guidance_scale=config.guidance_scale,
        processes=Processes(accelerator, config.timeout),
    )
    if not accelerator.is_main_process:
        return
    sha256 = task.frozen.weights_sha256()
    run.warn_of_another_model(sha256)
    summary = run.read_summary() | {"frozen_sha256_after": sha256, "sweep": sweep.rows}
    folder = arguments.output_dir or run.within("evaluation")
    write_json(folder / "summary.json", summary)
    write_report(
        folder / "report.html", config=config.plain(), summary=summary, metrics=run.read_metrics(), pairs=sweep.pairs
    )
    print_table(sweep.rows, measured_on(config.plain()))
    print(f"report  {folder / 'report.html'}")


def _step_counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--steps must be numbers with commas between, as in 1,2,4,8; got {text!r}") from None


if __name__ == "__main__":
    sys.exit(main())
