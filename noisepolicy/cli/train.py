"""`noisepolicy-train`: train, evaluate, report."""

import os
import resource
import sys
import traceback
import warnings
from typing import Any

from noisepolicy.cli.arguments import Arguments, parse_arguments

_NUM_SAMPLES = 8


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 bad input, 1 failed during the run, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    is_debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug"]
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.showwarning = _show_warning
    session = None
    try:
        session = _Session(parse_arguments(argv))
        session.train()
        session.finish()
        return 0
    except KeyboardInterrupt:
        resume = f"; go on with: noisepolicy-train --resume {session.run.path}" if session else ""
        print(f"\nnoisepolicy-train: interrupted{resume}", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        if is_debug:
            traceback.print_exc()
        print(f"noisepolicy-train: error: {' '.join(str(error).split())}", file=sys.stderr)
        if session is None:
            return 2
        print(f"noisepolicy-train: nothing is lost; go on with --resume {session.run.path}", file=sys.stderr)
        return 1


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    if category is UserWarning:
        print(f"noisepolicy-train: warning: {message}", file=sys.stderr)


class _Session:
    """One run of the command. Heavy imports wait until the command line is known to be right."""

    def __init__(self, arguments: Arguments) -> None:
        from diffusers.utils.logging import disable_progress_bar as disable_diffusers_bar
        from transformers.utils.logging import disable_progress_bar as disable_transformers_bar

        disable_diffusers_bar()
        disable_transformers_bar()
        from noisepolicy.cli.devices import make_accelerator
        from noisepolicy.training.run_folder import RunFolder
        from noisepolicy.training.task import load_task
        from noisepolicy.training.trainer import Trainer

        self.config = arguments.config
        self.accelerator = make_accelerator(self.config.device)
        self.task = load_task(self.config, self.accelerator.device)
        self._eval_prompts = self.task.eval_prompts[: self.config.eval_num_prompts]
        self._board = _make_board(self.config.tensorboard)
        self.run = arguments.resumed or RunFolder.create(self.config)
        self._hash_before = self.task.frozen.weights_sha256()
        self.trainer = Trainer(self.config, self.task, self.run, self.accelerator)
        if arguments.resumed is not None:
            self.trainer.resume()

    def train(self) -> None:
        from tqdm import tqdm

        trainer, config = self.trainer, self.config
        board = self._board(str(self.run.tensorboard)) if self._board and self._is_main else None
        print(f"training {config.policy} policy on {self.accelerator.device}; run folder {self.run.path}", flush=True)
        progress = tqdm(
            total=config.num_iterations, initial=trainer.iteration, unit="it", disable=not self._is_main,
            dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 15.0,
        )  # fmt: skip
        with progress:
            for metrics in trainer.train():
                progress.set_postfix(
                    images=metrics["images"], reward=f"{metrics['reward']:.3f}", KL=f"{metrics['kl_to_prior']:.1f}",
                    images_per_s=f"{trainer.images_trained / trainer.train_seconds:.0f}", refresh=False,
                )  # fmt: skip
                progress.update()
                if board:
                    for name, value in metrics.items():
                        board.add_scalar(name, value, metrics["images"])
                if self._is_main and metrics["iteration"] % config.sample_every == 0:
                    self._write_samples(metrics["iteration"])
        if board:
            board.close()

    @property
    def _is_main(self) -> bool:
        return self.accelerator.is_main_process

    def _write_samples(self, iteration: int) -> None:
        """The policy's pictures of the first held-out prompts, from the same noise each time."""
        from noisepolicy.evaluation.figures import image_grid
        from noisepolicy.storage import write_bytes
        from noisepolicy.training.seeding import stream_seed

        prompts = self.task.eval_prompts[:_NUM_SAMPLES] or self.task.train_prompts[:_NUM_SAMPLES]
        embeds = self.task.frozen.encode(prompts)
        sample = self.trainer.kept_policy().sample(embeds.prompt_embeds, seed=stream_seed(self.config.seed, "samples"))
        images = self.task.frozen.generate(
            sample.latents, embeds, num_inference_steps=self.config.num_inference_steps[0],
            guidance_scale=self.config.guidance_scale,
        )  # fmt: skip
        write_bytes(self.run.samples / f"iteration_{iteration:06d}.png", image_grid(list(images), len(prompts)))

    def finish(self) -> None:
        """Sweep, `summary.json`, `report.html`, and the table that ends the command."""
        if not self._is_main:
            return
        from noisepolicy.evaluation import Sweep, write_report
        from noisepolicy.evaluation.figures import before_after
        from noisepolicy.storage import write_bytes, write_json

        hash_after = self.task.frozen.weights_sha256()
        if hash_after != self._hash_before:
            raise RuntimeError("the frozen model's weights changed during training; the run is not to be trusted")
        sweep = self._sweep() if self._eval_prompts else Sweep([], [])
        summary = {
            "images_trained": self.trainer.images_trained,
            "train_seconds": self.trainer.train_seconds,
            "seconds": self.trainer.seconds,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "frozen_sha256_before": self._hash_before,
            "frozen_sha256_after": hash_after,
            "sweep": sweep.rows,
        }
        write_json(self.run.summary, summary)
        trained = self.config.num_inference_steps[0]
        if shown := [pair for pair in sweep.pairs if pair.num_inference_steps == trained]:
            write_bytes(self.run.samples / "before_after.png", before_after(shown[:8]))
        write_report(
            self.run.report,
            config=self.config.plain(),
            summary=summary,
            metrics=self.run.read_metrics(),
            pairs=sweep.pairs,
        )
        _print_table(sweep.rows)
        print(f"policy  {self.run.policy}\nreport  {self.run.report}")

    def _sweep(self) -> Any:
        from tqdm import tqdm

        from noisepolicy.evaluation import evaluate_sweep
        from noisepolicy.training.seeding import stream_seed

        config = self.config
        num_images = 2 * len(config.eval_steps) * len(self._eval_prompts) * config.eval_group_size
        with tqdm(total=num_images, desc="evaluating", unit="image", dynamic_ncols=True,
                  mininterval=0.5 if sys.stderr.isatty() else 15.0) as progress:  # fmt: skip
            return evaluate_sweep(
                self.trainer.kept_policy(), self.task.frozen, self.task.reward, self._eval_prompts,
                step_counts=config.eval_steps, group_size=config.eval_group_size,
                guidance_scale=config.guidance_scale, seed=stream_seed(0, "evaluation"),
                on_progress=progress.update,
            )  # fmt: skip


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


def _print_table(rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    has_strict = rows[0]["base"]["strict"] is not None
    strict_head = "    strict        " if has_strict else ""
    print("\nheld-out prompts, same noise")
    print(f" steps   reward base -> policy   gain (95% interval)       {strict_head}diversity kept")
    for row in rows:
        base, policy = row["base"], row["policy"]
        low, high = row["gain_ci95"]
        strict = f"{base['strict']:.3f} -> {policy['strict']:.3f}    " if has_strict else ""
        kept = f"{policy['diversity'] / base['diversity']:.0%}" if base["diversity"] else "-"
        print(
            f"{row['num_inference_steps']:6d}   {base['reward']:.3f} -> {policy['reward']:.3f}"
            f"          {row['gain']:+.3f} ({low:+.3f}, {high:+.3f})   {strict}{kept}"
        )


if __name__ == "__main__":
    sys.exit(main())
