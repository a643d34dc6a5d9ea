"""`noisepolicy-train`: trains a policy, evaluates it and writes the report."""

import sys
from typing import TYPE_CHECKING

from noisepolicy.cli.arguments import Arguments, parse_arguments, take_option
from noisepolicy.cli.failures import prepare, quiet_loading, report_failure, run_command
from noisepolicy.training.launch import (
    launch_id,
    leave,
    may_report_error,
    num_ranks,
    rank,
    silence_all_but_the_first,
)
from noisepolicy.training.signals import Signals

if TYPE_CHECKING:
    from noisepolicy.training.run import Run


def main(argv: list[str] | None = None) -> int:
    """Run the command. Exit codes: 0 done, 2 bad input, 1 failed on the way, 130 and 143 stopped by Ctrl-C, SIGTERM."""
    argv = list(sys.argv[1:] if argv is None else argv)
    is_debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug"]
    prepare("noisepolicy-train")
    silence_all_but_the_first()
    if "--list-models" in argv:
        code = run_command("noisepolicy-train", lambda: _list_models(argv), is_debug=is_debug)
    else:
        code = _train(argv, is_debug=is_debug)
    leave(code)
    return code


def _train(argv: list[str], *, is_debug: bool) -> int:
    run: Run | None = None
    with Signals() as signals:
        try:
            run = _begin(parse_arguments(argv))
            for _ in run.iterations(signals):
                pass
            run.finish()
            print(f"\n{run.evaluation}\npolicy  {run.folder / 'policy'}\nreport  {run.folder / 'report.html'}")
            return 0
        except KeyboardInterrupt:
            pass
        except (ValueError, RuntimeError, OSError) as error:
            if may_report_error():
                hint = f"; nothing is lost; go on with: {_resume_command(run)}" if run else ""
                report_failure("noisepolicy-train", error, is_debug=is_debug, hint=hint, rank=rank())
            return 2 if run is None and isinstance(error, ValueError) else 1
        if may_report_error():
            resume = f"; go on with: {_resume_command(run)}" if run else ""
            print(f"\nnoisepolicy-train: interrupted{resume}", file=sys.stderr)
        return signals.exit_code


def _list_models(argv: list[str]) -> None:
    from noisepolicy.cli.models import list_models

    rest, model = take_option([argument for argument in argv if argument != "--list-models"], "--model")
    if rest:
        raise ValueError(f"--list-models goes with --model alone, not with {rest[0]}")
    print(list_models(model))


def _begin(arguments: Arguments) -> "Run":
    quiet_loading()
    from noisepolicy.training.run import Run  # heavy, so only once the command line is known to be right

    if arguments.resumed is not None:
        run = Run.resume(arguments.resumed, arguments.config)
    else:
        run = Run.begin(arguments.config, launch_id=launch_id())
    count = f" by {processes} processes" if (processes := num_ranks()) > 1 else ""
    print(f"training a {run.policy.kind} policy on {run.device}{count}; run folder {run.folder}", flush=True)
    return run


def _resume_command(run: "Run") -> str:
    from noisepolicy.training.trust import resume_command

    return resume_command(run.folder, run.config.model.name, run.config.reward, run.config.evaluation.rewards)


if __name__ == "__main__":
    sys.exit(main())
