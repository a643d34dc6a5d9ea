"""`noisepolicy-train`: train, evaluate, report."""

import dataclasses
import resource
import sys
from typing import Any

from noisepolicy.cli.arguments import Arguments, parse_arguments
from noisepolicy.cli.failures import prepare, quiet_loading, report_failure
from noisepolicy.cli.launch import launch_id, leave, may_report_error, num_ranks, rank, silence_all_but_the_first
from noisepolicy.cli.signals import Signals
from noisepolicy.cli.trust import resume_command

_NUM_SAMPLES = 8


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 bad input, 1 failed on the way, 130 and 143 stopped by Ctrl-C and SIGTERM."""
    argv = list(sys.argv[1:] if argv is None else argv)
    is_debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug"]
    prepare("noisepolicy-train")
    silence_all_but_the_first()
    code = _run(argv, is_debug=is_debug)
    leave(code)
    return code


def _run(argv: list[str], *, is_debug: bool) -> int:
    session = None
    with Signals() as signals:
        try:
            session = _Session(parse_arguments(argv))
            if session.train(signals):
                session.finish()
                return 0
        except KeyboardInterrupt:
            pass
        except (ValueError, RuntimeError, OSError) as error:
            if may_report_error():
                hint = f"; nothing is lost; go on with: {session.resume_command}" if session else ""
                report_failure("noisepolicy-train", error, is_debug=is_debug, hint=hint, rank=rank())
            return 2 if session is None and isinstance(error, ValueError) else 1
        if may_report_error():
            resume = f"; go on with: {session.resume_command}" if session else ""
            print(f"\nnoisepolicy-train: interrupted{resume}", file=sys.stderr)
        return signals.exit_code


class _Session:
    """One run of the command. Heavy imports wait until the command line is known to be right."""

    def __init__(self, arguments: Arguments) -> None:
        quiet_loading()
        from noisepolicy.cli.devices import make_accelerator, with_mixed_precision
        from noisepolicy.training.find import FindTrainer
        from noisepolicy.training.processes import Processes
        from noisepolicy.training.run_folder import RunFolder, check_free
        from noisepolicy.training.task import load_task
        from noisepolicy.training.trainer import Trainer

        self.config = arguments.config
        self.accelerator = make_accelerator(self.config.device, timeout_s=self.config.timeout)
        self.config = with_mixed_precision(self.config, self.accelerator)
        processes = Processes(self.accelerator, self.config.timeout)
        if arguments.resumed and processes.is_main:
            arguments.resumed.lock()
        if self.config.denoiser == "auto" and self.accelerator.num_processes > 1:
            raise ValueError("--denoiser auto may choose differently in each process; name the engine")
        self.task = load_task(self.config, self.accelerator.device)
        # What 'auto' chose is the run's from here on: a resumed run must not choose again.
        self.config = dataclasses.replace(
            self.config, denoiser=self.task.frozen.engine, eval_steps=self.task.eval_steps
        ).resolved(len(self.task.train_prompts))
        self._eval_prompts = self.task.eval_prompts[: self.config.eval_num_prompts]
        self._board = _make_board(self.config.tensorboard)
        self.run = arguments.resumed or processes.broadcast(
            "'name the run folder'", RunFolder.choose(self.config) if processes.is_main else None
        )
        kind = FindTrainer if self.config.algorithm == "find" else Trainer
        try:
            self.trainer = kind(self.config, self.task, self.run, self.accelerator)
            processes.wait("'start'")
        except BaseException:
            if self._is_main and arguments.config.output_dir is None:
                self.run.give_up()
            raise
        self.config = self.trainer.config
        if arguments.resumed is None and self._is_main:  # now that nothing can be wrong with it
            self.run.lock()
            check_free(self.run.path)
            self.run.begin(self.config, launch_id())
        # Encoded once, and while there are text encoders.
        self._sample_prompts = self.task.eval_prompts[:_NUM_SAMPLES] or self.task.train_prompts[:_NUM_SAMPLES]
        self._sample_embeds = self.task.frozen.encode([str(prompt) for prompt in self._sample_prompts])
        eval_texts = [str(prompt) for prompt in self._eval_prompts]
        self._eval_embeds = self.task.frozen.encode(eval_texts) if eval_texts else None
        if arguments.resumed is not None:
            self.trainer.resume()
            if self._is_main and self.trainer.iteration < self.config.num_iterations:
                self.run.summary.unlink(missing_ok=True)  # the policy will be another than the one it is about
        if self.config.drop_text_encoders:
            self.trainer.encode_prompts()
            self.task.frozen.drop_text_encoders()

    @property
    def resume_command(self) -> str:
        return resume_command(self.run.path, self.config.reward, self.config.eval_rewards)

    def train(self, signals: Signals) -> bool:
        """To the last iteration, or to the one in which a signal comes, with a checkpoint; whether it was the last."""
        from tqdm import tqdm

        trainer, config = self.trainer, self.config
        board = self._board(str(self.run.tensorboard)) if self._board and self._is_main else None
        count = f" by {processes} processes" if (processes := num_ranks()) > 1 else ""
        print(
            f"training a {self.trainer.policy.kind} policy on {self.accelerator.device}{count}; "
            f"run folder {self.run.path}",
            flush=True,
        )
        progress = tqdm(
            total=config.num_iterations,
            initial=trainer.iteration,
            unit="it",
            disable=not self._is_main,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 15.0,
        )
        is_stopped = False
        with progress, signals.put_off():
            for metrics in trainer.train():
                progress.set_postfix(
                    images=metrics["images"],
                    reward=f"{metrics['reward']:.3f}",
                    KL=f"{metrics['kl_to_prior']:.1f}",
                    images_per_s=f"{trainer.images_trained / trainer.train_seconds:.0f}",
                    refresh=False,
                )
                progress.update()
                if board:
                    for name, value in metrics.items():
                        board.add_scalar(name, value, metrics["images"])
                if self._is_main and metrics["iteration"] % config.sample_every == 0:
                    self._write_samples(metrics["iteration"])
                if is_stopped := self._is_signalled(signals):
                    if self._is_main:
                        trainer.save()
                    break
        if board:
            board.close()
        return not (is_stopped or self._is_signalled(signals))

    def _is_signalled(self, signals: Signals) -> bool:
        """Whether a signal has come to any of the processes, which must stop together."""
        numbers = self.trainer.processes.exchange("'look for signals'", signals.received or 0)
        if number := max(numbers):
            signals.received = number  # else one may have come meanwhile, of which the others know next time
        return number > 0

    @property
    def _is_main(self) -> bool:
        return self.accelerator.is_main_process

    def _write_samples(self, iteration: int) -> None:
        """The policy's pictures of the first held-out prompts, from the same seed each time."""
        from noisepolicy.evaluation.figures import image_grid
        from noisepolicy.storage import write_bytes
        from noisepolicy.training.seeding import stream_seed

        prompts, embeds = self._sample_prompts, self._sample_embeds
        num_inference_steps = self.config.num_inference_steps[0]
        latents = self.trainer.kept_policy().choose(
            embeds.prompt_embeds,
            seed=stream_seed(self.config.seed, "samples"),
            num_inference_steps=num_inference_steps,
        )
        images = self.task.frozen.generate(
            latents,
            embeds,
            num_inference_steps=num_inference_steps,
            guidance_scale=self.config.guidance_scale,
        )
        write_bytes(self.run.samples / f"iteration_{iteration:06d}.png", image_grid(list(images), len(prompts)))

    def finish(self) -> None:
        """Sweep, which all processes share, then `summary.json`, `report.html`, and the table that ends the command."""
        from noisepolicy.cli.sweeping import print_table, run_sweep
        from noisepolicy.evaluation import Sweep, measured_on, write_model_card, write_report
        from noisepolicy.evaluation.figures import before_after
        from noisepolicy.storage import write_bytes, write_json

        hash_after = self.task.frozen.weights_sha256()
        if hash_after != self.trainer.frozen_sha256:
            raise RuntimeError("the frozen model's weights changed during training; the run is not to be trusted")
        config, sweep = self.config, Sweep([], [])
        if self._eval_prompts:
            try:
                sweep = run_sweep(
                    self.trainer.kept_policy(),
                    self.task,
                    self._eval_prompts,
                    self._eval_embeds,
                    step_counts=config.eval_steps,
                    group_size=config.eval_group_size,
                    guidance_scale=config.guidance_scale,
                    processes=self.trainer.processes,
                )
            except Exception as error:  # a scheduler or a reward may raise anything, hours after the start
                raise RuntimeError(
                    f"the run is trained, but its final evaluation failed ({type(error).__name__}: {error}); resumed, "
                    "it takes another --eval-steps and other evaluation settings"
                ) from error
        if not self._is_main:
            return
        summary = {
            "images_trained": self.trainer.images_trained,
            "train_seconds": self.trainer.train_seconds,
            "seconds": self.trainer.seconds,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "frozen_sha256_before": self.trainer.frozen_sha256,
            "frozen_sha256_after": hash_after,
            "sweep": sweep.rows,
        }
        write_json(self.run.summary, summary)
        trained = config.num_inference_steps[0]
        if shown := [pair for pair in sweep.pairs if pair.num_inference_steps == trained]:
            picture = before_after(shown[:8])
            write_bytes(self.run.samples / "before_after.png", picture)
            write_bytes(self.run.policy / "before_after.png", picture)
        write_model_card(self.run.policy, config=config.plain(), summary=summary)
        write_report(
            self.run.report,
            config=config.plain(),
            summary=summary,
            metrics=self.run.read_metrics(),
            pairs=sweep.pairs,
        )
        print_table(sweep.rows, measured_on(config.plain()))
        print(f"policy  {self.run.policy}\nreport  {self.run.report}")


def _make_board(is_wanted: bool) -> Any:
    """TensorBoard's writer class, or None where it is not wanted."""
    if not is_wanted:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "--tensorboard needs the package tensorboard: pip install 'noisepolicy[tensorboard]'"
        ) from error
    return SummaryWriter


if __name__ == "__main__":
    sys.exit(main())
