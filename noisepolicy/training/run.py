"""A training run: its model, reward and prompts, its folder, its iterations, and its results.

`Run.iterations` and `Run._iterate` are the course of a training: draw prompts, make images (`rollout.py`), learn from
them (`noise_ppo.py` or `find.py`), write metrics and checkpoints. The command line and Python both use this object.
"""

import base64
import dataclasses
import functools
import hashlib
import html
import json
import math
import re
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from noisepolicy.evaluation import Sweep, evaluate_sweep, measure, measured_on, write_model_card, write_report
from noisepolicy.evaluation.figures import are_pictures, as_pictures, before_after, image_grid
from noisepolicy.evaluation.sweep import eval_key
from noisepolicy.frozen import FrozenModel, PromptEmbeds
from noisepolicy.frozen.base import row_seeds
from noisepolicy.frozen.recording import weights_digest
from noisepolicy.ops import gaussian_sample
from noisepolicy.policies import NoisePolicy
from noisepolicy.policies.networks import plain_arithmetic
from noisepolicy.rewards import Reward, load_reward
from noisepolicy.rewards.registry import without_folders
from noisepolicy.settings import settings_of, with_names
from noisepolicy.storage import DamagedFileError, write_bytes, write_json
from noisepolicy.training.checkpoint import (
    Checkpoint,
    checkpoint_paths,
    iteration_of,
    save_checkpoint,
    skip_checkpoint,
    whole_checkpoints,
    with_prefix,
    without_prefix,
)
from noisepolicy.training.config import (
    FROM_PYTHON,
    EvalConfig,
    ModelConfig,
    TrainConfig,
    load_config,
    load_preset,
    preset_names,
)
from noisepolicy.training.devices import for_device, make_accelerator, make_run_accelerator, with_mixed_precision
from noisepolicy.training.find import Find
from noisepolicy.training.launch import num_ranks
from noisepolicy.training.learner import Learner
from noisepolicy.training.noise_ppo import NoisePpo
from noisepolicy.training.notebook import LivePlot, in_notebook
from noisepolicy.training.processes import Processes
from noisepolicy.training.prompt_list import PromptList
from noisepolicy.training.prompt_records import identity
from noisepolicy.training.rollout import PHASES, PhaseClock, Rollout, RolloutMaker, stream_seed
from noisepolicy.training.rows import PromptStore
from noisepolicy.training.run_folder import MAY_CHANGE_ON_RESUME, OF_THE_RESULT, RunFolder, check_free
from noisepolicy.training.signals import Signals
from noisepolicy.training.task import (
    OF_LOADING,
    Given,
    Task,
    as_reward,
    dtype_of,
    find_object,
    load_model,
    load_prompts,
    load_task,
    refuse_object,
    reward_name,
)
from noisepolicy.training.trackers import Trackers, check_trackers
from noisepolicy.training.trust import refuse_outside_code
from noisepolicy.worlds import WORLDS

_NUM_SAMPLES = 8
_SHORT_GROUP_SIZE = 2  # images of each held-out prompt in an evaluation in training
_OF_SHORT_EVALUATION = ("eval_prompts", "eval_num_prompts", "eval_rewards")
_PATIENCE = 3  # such evaluations in a row that do not raise the reward of `stop_on`
_PYTHON_NAMES = {
    "--best-of": "best_of",
    "--num-images": "num_images_per_prompt",
    "--steps": "num_inference_steps",
    "go on with --resume ": "go on with noisepolicy.resume: ",
    "repeat it on the command line: ": "give it again: ",
}
"""Python names for what the commands' messages say of flags that are no settings."""


class Run:
    """A training run. Iterate over it to train, or call `train`.

        run = noisepolicy.Run(pipe, reward="pickscore", prompts="prompts.txt", num_inference_steps=2)
        for metrics in run:
            print(metrics["reward"])
        print(run.evaluate())

    A loop that is left early saves a checkpoint: `for metrics in run` goes on, and so does `noisepolicy.resume(folder)`
    in another process. Ctrl-C ends the iteration first.

    Args:
        model: A hub id, a folder, the name of a preset, a diffusers pipeline, or an object with `latent_shape`,
            `encode` and `generate` (see `FrozenModel`). A pipeline is used as it is and left as it was found.
        reward: Text as in `--reward`, a function `reward(images, prompts)` or a `Reward`.
        prompts: Training prompts: a file, or any iterable of text or records, which is read once.
        eval_prompts: Held-out prompts for the evaluation, given likewise.
        eval_rewards: Further rewards that the evaluation measures: texts, functions or `Reward`s.
        config: A `TrainConfig` to start from.
        settings: Settings of `TrainConfig` by their flat names, e.g. `num_iterations=50`. Without `output_dir` the run
            folder is a temporary one.

    Raises:
        ValueError: if an argument cannot be used; the message names it.
    """

    _best: "_Best | None" = None
    _is_of_python = False
    """Whether errors call settings by their Python names, or by their flags."""

    def __init__(
        self,
        model: Any = None,
        *,
        reward: str | Reward | Callable[..., Any] | None = None,
        prompts: str | Path | Iterable[Any] | None = None,
        eval_prompts: str | Path | Iterable[Any] | None = None,
        eval_rewards: Sequence[str | Reward | Callable[..., Any]] | None = None,
        config: TrainConfig | None = None,
        **settings: Any,
    ) -> None:
        self._is_of_python = True
        with arguments_named():
            if isinstance(model, str) and model in preset_names() and (config is None or model not in WORLDS):
                if config is not None:
                    raise ValueError(f"model {model!r} is a preset, which is a config itself; give one of the two")
                config = load_preset(model)
            else:
                settings |= {} if model is None else {"model": model}
            config = config or TrainConfig()
            named, given = _split_objects(
                **settings,
                reward=reward,
                prompts=prompts,
                eval_prompts=eval_prompts,
                eval_rewards=eval_rewards,
                column=config.prompt_column,
            )
            config = config.replace(**named)
            config.check()
            for name in (*OF_LOADING, "dtype") if given.model is not None else ():
                if getattr(config.model, name) != getattr(ModelConfig(), name):
                    raise ValueError(f"{name} is for models that are loaded by name; set it on the model itself")
            self._start(config.with_absolute_paths(), given)

    @classmethod
    def begin(cls, config: TrainConfig, *, launch_id: str | None = None) -> "Run":
        """Begin a run from settings alone, as the command line does.

        Args:
            launch_id: Name of the launch, by which processes that are started again find this run.
        """
        run = cls.__new__(cls)
        run._start(config, Given(), launch_id=launch_id)
        return run

    @classmethod
    def resume(cls, folder: RunFolder, config: TrainConfig, given: Given | None = None) -> "Run":
        """Resume a run from its newest checkpoint, with settings that may have changed."""
        run = cls.__new__(cls)
        run._start(config, given or Given(), resumed=folder)
        return run

    @classmethod
    def open(cls, folder: RunFolder, config: TrainConfig, *, device: str | None = None) -> "Run":
        """Open a run's last saved policy, to evaluate it and generate with it. The run cannot be trained.

        Args:
            config: Settings of the run, perhaps changed for the evaluation.
            device: Device to run on. Default: the run's own, or the CPU if that is not there.

        Raises:
            ValueError: if there is no policy yet.
        """
        run = cls.__new__(cls)
        policy = NoisePolicy.from_pretrained(folder.checked_policy())
        run._accelerator = make_run_accelerator(config, device)
        config = for_device(with_mixed_precision(config, run._accelerator), run._accelerator.device)
        run.processes = Processes(run._accelerator, config.timeout)
        run._given, _ = find_object(config, folder.given(config, Given()))
        run.config, run._folder, run._learner = config, folder, None
        run._task = run._opened_model = run._sha256_after = None
        run.metrics = folder.read_metrics()
        run._policy = policy.to(run._accelerator.device)
        run._sweep = None
        return run

    def _start(
        self,
        config: TrainConfig,
        given: Given,
        *,
        resumed: RunFolder | None = None,
        launch_id: str | None = None,
    ) -> None:
        self._folder = resumed
        try:
            self._prepare(config, given, resumed, launch_id)
        finally:  # also after an error, which a notebook keeps, and with it the lock
            if self._folder is not None:
                self._folder.unlock()

    def _prepare(self, config: TrainConfig, given: Given, resumed: RunFolder | None, launch_id: str | None) -> None:
        given, device = find_object(config, given)
        if device is not None and config.model.device == "auto":
            config = config.replace(device=device.type if num_ranks() > 1 else str(device))
        self._accelerator = make_accelerator(config.model.device, timeout_s=config.timeout)
        config = with_mixed_precision(config, self._accelerator)
        self.processes = processes = Processes(self._accelerator, config.timeout)
        if resumed and processes.is_main:
            resumed.lock()
        if config.model.engine == "auto" and processes.count > 1:
            raise ValueError("--engine auto may choose differently in each process; name the engine")
        from_caller = given
        if resumed:
            given = resumed.given(config, given)
        self._task = task = load_task(config, self._accelerator.device, given)
        # What 'auto' chose is the run's from here on: a resumed run must not choose again.
        config = config.replace(
            engine=task.frozen.engine,
            dtype=dtype_of(task.frozen) or config.model.dtype,
            eval_steps=task.eval_steps,
            reward=reward_name(task.reward),
            eval_rewards=tuple(map(reward_name, task.eval_rewards)),
        )
        self.config = config = config.with_absolute_paths().resolved(len(task.train_prompts))
        config.check()
        check_trackers(config.all_trackers)
        self._check_short_evaluation()
        fitted_to = self._fitted_to
        if fitted_to and len({str(theirs) for theirs in processes.exchange("'read the votes'", fitted_to)}) > 1:
            raise ValueError("the votes changed while the processes read them; start again")
        self._trackers: Trackers | None = None
        if resumed is None:
            chosen = RunFolder.choose(config, is_temporary=self._is_of_python) if processes.is_main else None
            self._folder = processes.broadcast("'name the run folder'", chosen)
        try:
            self._make_learner()
            processes.wait("'start'")
        except BaseException:
            if processes.is_main and config.output_dir is None:
                self._folder.give_up()
            raise
        if resumed is None and processes.is_main:  # now that nothing can be wrong with it
            self._folder.lock()
            check_free(self._folder.path)
            self._folder.begin(config, launch_id, given)
        self._eval_prompts = task.eval_prompts[: config.evaluation.num_prompts]
        self._sample_prompts = task.eval_prompts[:_NUM_SAMPLES] or task.train_prompts[:_NUM_SAMPLES]
        # Encoded once, and while there are text encoders.
        self._sample_embeds = self._encode(self._sample_prompts)
        self._eval_embeds = None
        if self._eval_prompts:
            self._eval_embeds = self._encode(self._eval_prompts)
        if resumed is not None:
            self.go_back()
            if processes.is_main:
                resumed.keep_prompts(from_caller)
                before = load_config(resumed.config)
                is_other = any(getattr(before, name) != getattr(config, name) for name in OF_THE_RESULT)
                if is_other or not self.is_over:
                    resumed.summary.unlink(missing_ok=True)  # the policy is another than the one it is about
                config.save(resumed.config)
        if config.model.drop_text_encoders:
            self.encode_prompts(config.num_iterations)
            task.frozen.drop_text_encoders()

    def _make_learner(self) -> None:
        config, task, device = self.config, self._task, self._accelerator.device
        self._policy: NoisePolicy | None = None
        self._policy_iteration = -1
        self._sha256_after: str | None = None
        self._sweep: Sweep | None = None
        self.iteration = 0
        """Number of iterations trained so far."""
        self.metrics: list[dict[str, Any]] = []
        """The metrics of every iteration so far."""
        self.train_seconds = 0.0
        self._saved_iteration = 0
        self._is_whole = True
        """Whether no iteration was cut short, which leaves a policy that is partly updated."""
        self._known_checkpoint = self._newest_checkpoint()
        """Iteration of the newest checkpoint, whole or not, that this object has written or found."""
        self._frozen_sha256 = task.frozen.weights_sha256()
        self._clock = PhaseClock(device)
        self._prompts = PromptStore(task.frozen, task.train_prompts, device)
        self._prompts.add([0])
        if config.algorithm == "find":
            start_copy = self._folder.path / "init_policy"
            self._learner: Learner | None = Find(config, task, self._prompts, start_copy=start_copy, device=device)
        else:
            history = self._folder.history if self.processes.is_main else None
            self._learner = NoisePpo(config, task, self._prompts, self.processes, history_folder=history, device=device)
        self._rollouts = RolloutMaker(config, task, self._prompts, self.processes, self._clock)
        self._warn_of_idle_processes()

    # Training

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Train to the last iteration; yield each iteration's metrics once they are written.

        Raises:
            KeyboardInterrupt: after Ctrl-C, once the iteration is over and a checkpoint is written.
            RewardError: if the reward fails.
            RuntimeError: if the policy's numbers stop being finite, or the processes lose or contradict one another.
        """
        with arguments_named(self._is_of_python):
            yield from self.iterations(Signals.of_python())

    def iterations(self, signals: Signals) -> Iterator[dict[str, Any]]:
        """Train and yield metrics as `__iter__`, with a caller's own signal handlers."""
        config, is_main = self.config, self.processes.is_main
        if self._learner is None:
            raise ValueError("this run was opened to look at; noisepolicy.resume(folder) trains it")
        if not self._is_whole:
            raise RuntimeError(
                "an iteration of this run was cut short; go on from its last checkpoint with "
                f"noisepolicy.resume({str(self.folder)!r})"
            )
        plot = LivePlot() if is_main and in_notebook() else None
        progress = self._progress_bar(total=config.num_iterations, initial=self.iteration, unit="it")
        with self._writing(), progress, signals:
            if is_main:
                self._prompts.keep(self._folder.prompts)
                config.save(self._folder.config)
                self._learner.begin()
            self._open_trackers()
            try:
                while not self.is_over:
                    with signals.put_off:
                        metrics = self._iterate()
                        self._show(metrics, progress, plot)
                        if self._is_signalled(signals):
                            raise KeyboardInterrupt(
                                f"stopped after iteration {self.iteration}; go on with "
                                f"noisepolicy.resume({str(self.folder)!r})"
                            )
                    yield metrics
                if self.iteration < config.num_iterations and is_main:
                    progress.write(
                        f"stopped: {config.stop_on} has not risen since iteration {self._best.iteration}, whose policy "
                        "is kept",
                        file=sys.stderr,
                    )
            except (KeyboardInterrupt, GeneratorExit):  # between two iterations
                if is_main and self._is_whole:
                    self.save()
                raise
            finally:
                if not self.is_over:  # otherwise `finish` has more to show
                    self._close_trackers()

    def train(self) -> "Run":
        """Train to the last iteration, then evaluate and write the summary, the model card and the report."""
        try:
            for _ in self:
                pass
            self.finish()
        except RuntimeError as error:  # the caller has no Run yet, and its folder may be a temporary one
            if error.args and isinstance(error.args[0], str):
                error.args = (f"{error.args[0]}; go on with noisepolicy.resume({str(self.folder)!r})",)
            raise
        return self

    def _iterate(self) -> dict[str, Any]:
        """Do one iteration: make a batch of images, learn from it, and write the metrics."""
        start, number = time.perf_counter(), self.iteration
        self._is_whole = False
        self._sha256_after = self._sweep = None
        with plain_arithmetic():
            rollout = self.roll_out(number)
            with self._clock.phase("policy"):
                metrics = {**self._batch_metrics(rollout), **self._learner.learn(rollout, number)}
        if not all(math.isfinite(value) for value in metrics.values()):
            raise RuntimeError(f"training diverged at iteration {number + 1}: {metrics}; try a lower --learning-rate")
        self.iteration += 1
        self.processes.check_same_weights(self._learner.policy, f"'compare policies' of iteration {self.iteration}")
        every = self.config.evaluation.every
        if every and self.iteration % every == 0:
            metrics |= self._evaluate_shortly()
        self.metrics.append(metrics)
        if self.processes.is_main:
            # Before the checkpoint: a kill between the two then loses neither.
            with open(self._folder.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
            if self.is_over or self.iteration % self.config.checkpoint_every == 0:
                self.train_seconds += time.perf_counter() - start
                start = time.perf_counter()
                self.save()
        self.train_seconds += time.perf_counter() - start
        self._is_whole = True
        return metrics

    def roll_out(self, number: int) -> Rollout:
        """Make the images of iteration `number` with the present policy, and score them."""
        learner = self._learner
        return self._rollouts.make(learner.policy, number, learner.draw_prompts(number), learner.critic_shape)

    def _batch_metrics(self, rollout: Rollout) -> dict[str, Any]:
        """Return the metrics of a batch before learning, in the reward's own units."""
        weights = self._task.reward.weights
        means = dict(zip(weights, rollout.parts.mean(0).tolist(), strict=True)) if len(weights) > 1 else {}
        return {
            "iteration": self.iteration + 1,
            "images": (self.iteration + 1) * self.config.batch_size,
            "reward": rollout.reward.mean().item(),
            "reward_std": rollout.reward.std().item(),
            **{f"reward/{name}": mean for name, mean in means.items()},
        }

    @plain_arithmetic()
    def _evaluate_shortly(self) -> dict[str, float]:
        """Measure the policy's rewards on the held-out prompts, and keep it if it is the best so far by `stop_on`."""
        config, task, processes = self.config, self._task, self.processes
        policy = self._present_policy
        results = measure(
            policy,
            task.frozen,
            task.reward,
            self._eval_prompts,
            self._eval_embeds,
            rank=processes.index,
            num_ranks=processes.count,
            collect=partial(processes.collect, "'evaluate'"),
            num_inference_steps=config.num_inference_steps[0],
            group_size=_SHORT_GROUP_SIZE,
            guidance_scale=config.guidance_scale,
            seed=stream_seed(0, "evaluation"),
            eval_rewards=task.eval_rewards,
        )
        means = None
        if results is not None:
            keys = ["reward", *map(eval_key, range(len(task.eval_rewards)))]
            means = [results.metrics[key].mean().item() for key in keys]
        means = processes.broadcast("'evaluate'", means)
        if config.stop_on is not None:
            value = means[self._reward_names.index(config.stop_on)]
            if self._best is None or value > self._best.reward:
                self._best = _Best(policy, value, self.iteration)
        return dict(zip(self._eval_metrics, means, strict=True))

    @property
    def _eval_metrics(self) -> list[str]:
        """Names of the metrics of a short evaluation: without folders, which are nobody else's business, and with
        characters that every tracker takes."""
        others = (re.sub(r"[^\w.: -]", "_", without_folders(name)) for name in self._reward_names[1:])
        return ["eval/reward", *(f"eval/{name}" for name in others)]

    @property
    def _reward_names(self) -> list[str]:
        """Names of the reward and of the further ones, as a user gave them."""
        names = self.config.reward, *self.config.evaluation.rewards
        return [name.removeprefix(FROM_PYTHON) for name in names]

    def _check_short_evaluation(self) -> None:
        config = self.config
        if not config.evaluation.every:
            return
        if not self._task.eval_prompts or not config.evaluation.num_prompts:
            raise ValueError("--eval-every and --stop-on measure on held-out prompts, and --eval-num-prompts is 0")
        names = self._reward_names
        if len(set(names)) < len(names) or len(set(self._eval_metrics)) < len(names):
            raise ValueError(f"--eval-every and --stop-on need rewards of different names, got {', '.join(names)}")
        if config.stop_on is not None and config.stop_on not in names:
            known = ", ".join(names)
            raise ValueError(f"--stop-on must be the reward or one of --eval-rewards ({known}), got {config.stop_on}")

    def _open_trackers(self) -> None:
        if self.config.all_trackers and self.processes.is_main and self._trackers is None:
            config = self.config
            self._trackers = Trackers(self._accelerator, config.all_trackers, self.folder, config.plain())

    def _close_trackers(self) -> None:
        if self._trackers is not None:
            self._trackers.close()
            self._trackers = None

    def _progress_bar(self, **options: Any) -> Any:
        from tqdm.auto import tqdm

        is_watched = sys.stderr.isatty() or in_notebook()  # and no log file
        return tqdm(
            disable=not self.processes.is_main,
            dynamic_ncols=True,
            mininterval=0.5 if is_watched else 15.0,
            **options,
        )

    def _show(self, metrics: dict[str, Any], progress: Any, plot: LivePlot | None) -> None:
        progress.set_postfix(
            images=metrics["images"],
            reward=f"{metrics['reward']:.3f}",
            KL=f"{metrics['kl_to_prior']:.1f}",
            images_per_s=f"{self.images_trained / self.train_seconds:.0f}",
            refresh=False,
        )
        progress.update()
        if plot is not None:
            plot.update(self.metrics, is_last=self.is_over)
        if self._trackers is not None:
            self._trackers.log(metrics, metrics["images"])
        if self.processes.is_main and metrics["iteration"] % self.config.sample_every == 0:
            self._write_samples(metrics["iteration"])

    def _is_signalled(self, signals: Signals) -> bool:
        """Tell whether any process has received a signal: processes must stop together."""
        numbers = self.processes.exchange("'look for signals'", signals.received or 0)
        if number := max(numbers):
            signals.received = number  # else one may have come meanwhile, of which the others know next time
        return number > 0

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the folder's lock, after checking that nobody else has trained in it meanwhile."""
        if self.processes.is_main:
            self._folder.lock()
            if (newest := self._newest_checkpoint()) > self._known_checkpoint:
                self._folder.unlock()
                raise ValueError(
                    f"{self._folder.path} was trained on by another process, to iteration {newest}; go on with "
                    "noisepolicy.resume"
                )
        try:
            yield
        finally:
            self._folder.unlock()

    def _newest_checkpoint(self) -> int:
        return max(map(iteration_of, checkpoint_paths(self._folder.checkpoints)), default=0)

    def encode_prompts(self, num_iterations: int) -> None:
        """Encode the prompts of the first iterations in advance."""
        for number in range(num_iterations):
            self._prompts.add(self._learner.draw_prompts(number))

    def _warn_of_idle_processes(self) -> None:
        num_chunks, count = sum(map(len, self._rollouts.shares(0))), self.processes.count
        if self.processes.is_main and num_chunks < count:
            batch_size = self.config.batch_size
            remedy = f"there are only {batch_size} images"
            if batch_size >= count:
                remedy = f"--rollout-batch-size {batch_size // count} gives each a share"
            warnings.warn(
                f"a batch has {num_chunks} chunks for {count} processes, so some have nothing to do; {remedy}",
                stacklevel=3,
            )

    # Checkpoints

    @plain_arithmetic()
    def save(self, *, again: bool = False) -> None:
        """Write a checkpoint and the policy, on the main process, unless this iteration's are written already."""
        if self._saved_iteration == self.iteration and not again:
            return
        tensors, progress = self._learner.state()
        tensors |= with_prefix("policy", self._learner.policy.state_dict())
        tensors |= with_prefix("average", self._learner.average.state_dict())
        progress |= {
            "iteration": self.iteration,
            "train_seconds": self.train_seconds,
            "seconds": self._clock.seconds,
            "settings": self._settings(),
            "prompts": self._prompts.state(),
        }
        if self._best is not None:
            tensors |= with_prefix("best", self._best.policy.state_dict())
            progress["best"] = {"reward": self._best.reward, "iteration": self._best.iteration}
        save_checkpoint(self._folder.checkpoints, self.iteration, tensors, progress)
        self.policy.save_pretrained(self._folder.policy)
        self._saved_iteration = self._known_checkpoint = self.iteration

    @plain_arithmetic()
    def go_back(self) -> None:
        """Go back to the newest whole checkpoint, or to the start if there is none yet.

        Raises:
            ValueError: if no checkpoint can be used, or the checkpoints are of another run, model or prompts. Nothing
                is changed then.
        """
        checkpoint = self._restore_newest() if self.processes.is_main else None
        checkpoint = self.processes.broadcast("'read the checkpoint'", checkpoint)
        if checkpoint is not None and not self.processes.is_main:
            self._restore(checkpoint)
        self._restore_prompts(None if checkpoint is None else checkpoint.progress.get("prompts"))
        if self.processes.is_main:
            self._folder.truncate_metrics(self.iteration)
            if self.iteration:  # a kill may have come before it was written
                self.policy.save_pretrained(self._folder.policy)
        self.metrics = self._folder.read_metrics()

    def _restore_prompts(self, state: dict[str, int] | None) -> None:
        try:
            if state is not None:
                self._prompts.load_state(state, self._folder.prompts, is_main=self.processes.is_main)
        except DamagedFileError as error:
            warnings.warn(f"{error}; the run's prompts are encoded again", stacklevel=3)
        # Where they were not: in the batches of the first time, for rounding depends on them, and rows on their order.
        self.encode_prompts(self.iteration)

    def _restore_newest(self) -> Checkpoint | None:
        for checkpoint in whole_checkpoints(self._folder.checkpoints):
            self._check_same_run(checkpoint)
            try:
                self._restore(checkpoint)
                return checkpoint
            except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:  # a shape, a type
                skip_checkpoint(checkpoint.path, error)
        # A policy is written after each checkpoint.
        if checkpoint_paths(self._folder.checkpoints) or self._folder.policy.exists():
            raise ValueError(
                f"no checkpoint in {self._folder.checkpoints} can be used; nothing was changed: put one back, or start "
                "anew with another --output-dir"
            )
        return None

    def _restore(self, checkpoint: Checkpoint) -> None:
        tensors, progress = checkpoint.tensors, checkpoint.progress
        if progress["iteration"] != checkpoint.iteration:
            raise DamagedFileError(f"it says that its iteration is {progress['iteration']}")
        self._learner.policy.load_state_dict(without_prefix("policy", tensors))
        self._learner.average.load_state_dict(without_prefix("average", tensors))
        self._learner.load_state(tensors, progress, self._folder.history)
        self._best = None
        if (best := progress.get("best")) is not None:
            reward, iteration = float(best["reward"]), int(best["iteration"])
            if not math.isfinite(reward) or not 0 < iteration <= checkpoint.iteration:
                raise DamagedFileError(f"its best policy is of iteration {iteration}, with the reward {reward}")
            policy = self._learner.kept_policy()
            policy.load_state_dict(without_prefix("best", tensors))
            self._best = _Best(policy, reward, iteration)
        train_seconds, seconds = progress["train_seconds"], {phase: progress["seconds"][phase] for phase in PHASES}
        self.iteration = self._saved_iteration = progress["iteration"]
        self.train_seconds, self._clock.seconds = train_seconds, seconds

    def _check_same_run(self, checkpoint: Checkpoint) -> None:
        """Raise ValueError if the model, the prompts or settings that cannot change differ from the checkpoint's."""
        settings, made_with = self._settings(), checkpoint.progress.get("settings", {})
        for name in sorted(settings.keys() & made_with.keys()):
            if settings[name] == made_with[name]:
                continue
            if name == "frozen_sha256":
                raise ValueError(
                    f"the model is not the one that the run was started with: the weights of {self.config.model.name} "
                    f"have SHA-256 {str(settings[name])[:12]}..., and its checkpoints were made with "
                    f"{str(made_with[name])[:12]}...; put the model back, or start anew with another --output-dir"
                )
            if name == "prompts_sha256":
                raise ValueError(
                    "the training prompts are not those that the run's checkpoints were made with; put their files "
                    "back, or start anew with another --output-dir"
                )
            if name == "eval_prompts_sha256":
                raise ValueError(
                    "the held-out prompts are not those that --stop-on has measured with; put them back, or start anew "
                    "with another --output-dir"
                )
            if name == "rollout_vae_sha256":
                raise ValueError(
                    f"the weights of --rollout-vae {self.config.model.rollout_vae} are not those that the run was "
                    "started with; put them back, or start anew with another --output-dir"
                )
            if name == "reward_data_sha256":
                raise ValueError(
                    f"the votes that the reward {', '.join(self._fitted_to)} learns from are not those that the run "
                    "was started with; take the later votes back, or start anew with another --output-dir"
                )
            raise ValueError(
                f"{self._folder.config} says {name} is {settings[name]}, but its checkpoints were made with "
                f"{made_with[name]}; put it back, or start anew with another --output-dir"
            )

    def _settings(self) -> dict[str, Any]:
        """Return the settings that cannot change when a run is resumed, as JSON values."""
        plain = self.config.plain()
        settings = {name: value for name, value in plain.items() if name not in {*MAY_CHANGE_ON_RESUME, "output_dir"}}
        if self._task.rollout_vae is not None:
            settings["rollout_vae_sha256"] = weights_digest(self._task.rollout_vae)
        if self.config.stop_on is not None:
            settings["eval_prompts_sha256"] = _prompts_digest(self._eval_prompts)
        if self._fitted_to:
            settings["reward_data_sha256"] = " ".join(self._fitted_to.values())
        return settings | {"frozen_sha256": self._frozen_sha256, "prompts_sha256": self._prompts_sha256}

    @property
    def _fitted_to(self) -> dict[str, str]:
        """Hashes of what the rewards were fitted to, by reward, of those that decide the result."""
        rewards = [self._task.reward, *(self._task.eval_rewards if self.config.stop_on is not None else ())]
        return {reward_name(reward): reward.data_sha256 for reward in rewards if reward.data_sha256}

    @functools.cached_property
    def _prompts_sha256(self) -> str:
        return _prompts_digest(self._task.train_prompts)

    # Results

    @property
    def device(self) -> torch.device:
        """The device of the policy."""
        return self._accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.processes.is_main

    @property
    def model(self) -> FrozenModel:
        """The frozen model."""
        return self._frozen

    @property
    def held_out_prompts(self) -> Sequence[str]:
        """The prompts of the run's own evaluation.

        Raises:
            ValueError: if they cannot be read.
        """
        if self._task is not None:
            return self._task.eval_prompts
        return load_prompts(self.config, self._given, for_training=False)[1]

    @property
    def evaluation(self) -> Sweep:
        """The newest evaluation; empty before there is one."""
        return self._sweep or Sweep([], [])

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self._folder.path

    @property
    def images_trained(self) -> int:
        """Images generated in training so far."""
        return self.iteration * self.config.batch_size

    @property
    def seconds(self) -> dict[str, float]:
        """Training time by phase; they sum to `train_seconds`."""
        phases = dict(self._clock.seconds)
        return {**phases, "other": max(self.train_seconds - sum(phases.values()), 0.0)}

    @property
    def is_over(self) -> bool:
        """Whether the training has come to its end: the last iteration, or no more gain by `stop_on`."""
        config, best = self.config, self._best
        has_stopped = best is not None and self.iteration - best.iteration >= _PATIENCE * config.evaluation.every
        return has_stopped or self.iteration >= config.num_iterations

    @property
    def policy(self) -> NoisePolicy:
        """The result of the run so far: a policy to save, share and draw latents with."""
        return self._present_policy if self._best is None else self._best.policy

    @property
    def _present_policy(self) -> NoisePolicy:
        """The policy that the newest weights make."""
        if self._learner is not None and self._policy_iteration != self.iteration:
            self._policy, self._policy_iteration = self._learner.kept_policy(), self.iteration
        return self._policy

    def evaluate(
        self,
        *,
        steps: Sequence[int] | None = None,
        prompts: str | Path | Iterable[Any] | None = None,
        rewards: Sequence[str | Reward | Callable[..., Any]] | None = None,
        num_prompts: int | None = None,
        group_size: int | None = None,
        variety: float = 0.0,
    ) -> Sweep:
        """Measure base model and policy from the same seeds.

        The result prints and displays as a table; `report` shows the newest one.

        Args:
            steps: Denoising step counts. Default: the run's `eval_steps`.
            prompts: Prompts to measure on, a file or any iterable of text. Default: the run's held-out prompts.
            rewards: Further rewards to measure. Default: the run's `eval_rewards`.
            num_prompts: Largest number of prompts. Default: the run's `eval_num_prompts`.
            group_size: Images of each prompt. Default: the run's `eval_group_size`.
            variety: How much the policy's images of a prompt are to differ, from 0 to 1; see `NoisePolicy.latents`.

        Raises:
            ValueError: if there are no prompts, or the model cannot work with a step count.
        """
        if num_prompts is not None and num_prompts < 1:
            raise ValueError(f"num_prompts must be positive, got {num_prompts}")
        with arguments_named(self._is_of_python):
            given = {"eval_steps": steps, "eval_num_prompts": num_prompts, "eval_group_size": group_size}
            settings = {name: value for name, value in given.items() if value is not None}
            column = self.config.prompt_column
            named, objects = _split_objects(**settings, eval_prompts=prompts, eval_rewards=rewards, column=column)
            self._sweep = self._evaluate(self.config.replace(**named), objects, variety)
            return self._sweep

    def _evaluate(self, config: TrainConfig, objects: Given, variety: float) -> Sweep:
        """Measure with `objects`; for those that are None, with the run's own model, reward, prompts and rewards."""
        if self._task is None:
            own = self._given
        else:
            task = self._task
            own = Given(task.frozen, task.reward, task.eval_rewards, eval_prompts=task.eval_prompts)
            if config.evaluation.prompts != self.config.evaluation.prompts:
                own = dataclasses.replace(own, eval_prompts=None)
            if config.evaluation.rewards != self.config.evaluation.rewards:
                own = dataclasses.replace(own, eval_rewards=None)
        changed = {name: value for name, value in vars(objects).items() if value is not None}
        given = dataclasses.replace(own, model=self._frozen, **changed)
        task = load_task(config, self._accelerator.device, given, for_training=False)
        # A run without an evaluation of its own (0 prompts) can still be asked for one.
        prompts = task.eval_prompts[: config.evaluation.num_prompts or EvalConfig().num_prompts]
        if not prompts:
            raise ValueError("there are no held-out prompts to evaluate on; give some as prompts (--prompts)")
        is_own = self._task is not None and task.eval_prompts is self._task.eval_prompts
        if is_own and len(prompts) <= len(self._eval_prompts):  # encoded already; the encoders may be gone
            embeds = self._eval_embeds[: len(prompts)]
        else:
            embeds = self._encode(prompts)
        return self._sweep_over(task, prompts, embeds, config, variety)

    def _sweep_over(
        self, task: Task, prompts: Sequence[str], embeds: PromptEmbeds, config: TrainConfig, variety: float = 0.0
    ) -> Sweep:
        processes, steps, group_size = self.processes, task.eval_steps, config.evaluation.group_size
        num_images = 2 * len(steps) * len(prompts) * group_size // processes.count
        with self._progress_bar(total=num_images, desc="evaluating", unit="image") as progress:
            return evaluate_sweep(
                self.policy,
                task.frozen,
                task.reward,
                prompts,
                step_counts=steps,
                group_size=group_size,
                guidance_scale=config.guidance_scale,
                seed=stream_seed(0, "evaluation"),
                eval_rewards=task.eval_rewards,
                embeds=embeds,
                on_progress=progress.update,
                rank=processes.index,
                num_ranks=processes.count,
                collect=partial(processes.collect, "'evaluate'"),
                measured_on=measured_on(config.plain(), variety),
                variety=variety,
            )

    def _encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        """The prompts' embeddings, on the policy's device."""
        return self._frozen.encode(prompts).to(self.device)

    @property
    def _frozen(self) -> FrozenModel:
        if self._task is not None:
            return self._task.frozen
        if self._opened_model is None:
            config = self.config
            self._opened_model = load_model(config.model, self._accelerator.device, self._given.model, settings=config)
            self._sha256_after = self._opened_model.weights_sha256()
            self._folder.warn_of_another_model(self._sha256_after)
        return self._opened_model

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int = 0,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        best_of: int = 1,
        reward: str | Reward | Callable[..., Any] | None = None,
        compare: bool = False,
        variety: float = 0.0,
    ) -> Any:
        """Make images from the policy's starts.

        Args:
            prompts: One prompt or several.
            seed: Seed of the noise.
            num_images_per_prompt: Number of images of each prompt, next to each other.
            num_inference_steps: Number of denoising steps. Default: the first that the run was trained at.
            guidance_scale: Guidance scale. Default: the run's.
            best_of: Number of images that are made for each one that is returned, the one with the highest reward.
            reward: Reward to choose by. Default: the run's.
            compare: Also make the base model's images from the same seed.
            variety: How much the images of a prompt are to differ, from 0 to 1; see `NoisePolicy.latents`.

        Returns:
            A list of PIL images, or of lists of frames for a video model; with `compare` a pair of such lists, the base
            model's first.
        """
        with arguments_named(self._is_of_python):
            images = self.generate_tensors(
                [prompts] if isinstance(prompts, str) else list(prompts),
                seed=seed,
                num_images_per_prompt=num_images_per_prompt,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                best_of=best_of,
                reward=reward,
                compare=compare,
                variety=variety,
            )
        sides = [as_pictures(batch) for batch in images.values()]
        return tuple(sides) if compare else sides[0]

    def generate_tensors(
        self,
        prompts: Sequence[str],
        *,
        seed: int,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        best_of: int = 1,
        reward: str | Reward | Callable[..., Any] | None = None,
        compare: bool = False,
        variety: float = 0.0,
    ) -> dict[str, torch.Tensor]:
        """Make images in [0, 1], `(batch, 3, height, width)`, by "policy" and, before it, "base"; see `generate`."""
        at_least = {"--seed": (seed, 0), "--num-images": (num_images_per_prompt, 1), "--best-of": (best_of, 1)}
        for name, (value, least) in at_least.items():
            if value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")
        if num_inference_steps is not None and num_inference_steps < 1:
            raise ValueError(f"--steps must be 1 or more, got {num_inference_steps}")
        if not prompts:
            raise ValueError("prompts holds no prompt")
        steps = num_inference_steps or self.config.num_inference_steps[0]
        self.config.check_schedule([steps])
        guidance = self.config.guidance_scale if guidance_scale is None else guidance_scale
        frozen, policy = self._frozen, self.policy
        texts = [prompt for prompt in prompts for _ in range(num_images_per_prompt * best_of)]
        if variety:  # each prompt counts its own images, wherever they stand
            encoded = {text: self._encode([text]) for text in dict.fromkeys(texts)}
            embeds = PromptEmbeds.cat([encoded[text] for text in texts])
            chosen, indices = policy.latents_and_indices(embeds, seed=seed, num_inference_steps=steps, variety=variety)
        else:
            embeds, indices = self._encode(texts), list(range(len(texts)))
            chosen = policy.choose(embeds.prompt_embeds, seed=seed, num_inference_steps=steps)
        starts = {"policy": chosen}
        if compare:
            prior = torch.zeros(max(indices) + 1, *policy.latent_shape, device=self._accelerator.device)
            starts = {"base": gaussian_sample(prior, prior.new_zeros(()), seed=seed)[0][indices], **starts}
        images = {
            side: frozen.generate(
                latents,
                embeds,
                num_inference_steps=steps,
                guidance_scale=guidance,
                seeds=row_seeds(seed, indices),
            )
            for side, latents in starts.items()
        }
        if best_of == 1:
            return images
        by = self._reward_to_choose_by(reward)
        return {side: _best_of(batch, by(batch, texts), best_of) for side, batch in images.items()}

    def _reward_to_choose_by(self, reward: str | Reward | Callable[..., Any] | None) -> Reward:
        if reward is None:
            if self._task is not None:
                return self._task.reward
            if self._given.reward is not None:
                return self._given.reward
            refuse_object(self.config.reward, "--reward")
            refuse_outside_code(self.folder, reward=self.config.reward)
            reward = self.config.reward
        return load_reward(reward, device=self.device) if isinstance(reward, str) else as_reward(reward, "reward")

    def finish(self) -> None:
        """Evaluate on the held-out prompts, then write `summary.json`, `report.html` and the policy's model card."""
        try:
            self._finish()
        finally:
            self._close_trackers()

    def _finish(self) -> None:
        self._sha256_after = self._frozen.weights_sha256()
        if self._sha256_after != self._frozen_sha256:
            raise RuntimeError("the frozen model's weights changed during training; the run is not to be trusted")
        config, sweep = self.config, Sweep([], [])
        if self._eval_prompts:
            try:
                sweep = self._sweep_over(self._task, self._eval_prompts, self._eval_embeds, config)
            except Exception as error:  # a scheduler or a reward may raise anything, hours after the start
                raise RuntimeError(
                    f"the run is trained, but its final evaluation failed ({type(error).__name__}: {error}); resumed, "
                    "it takes another --eval-steps and other evaluation settings"
                ) from error
        self._sweep = sweep
        if not self.processes.is_main:
            return
        with self._writing():
            summary = self._summary(sweep)
            write_json(self._folder.summary, summary)
            if picture := self._before_after(sweep):
                write_bytes(self._folder.samples / "before_after.png", picture)
                write_bytes(self._folder.policy / "before_after.png", picture)
            write_model_card(self._folder.policy, config=config.plain(), summary=summary)
            self._write_report(self._folder.report, sweep, summary)
            self._open_trackers()
            if self._trackers is not None:
                self._trackers.log_picture(
                    "before_after", self._folder.samples / "before_after.png", self.images_trained
                )
                self._trackers.log_result(sweep, self._folder.report, self.images_trained)

    def report(self, output_dir: str | Path | None = None) -> Path:
        """Write the report with the newest evaluation.

        Args:
            output_dir: Folder for `report.html` and the evaluation as `summary.json`. Default: the run folder, which
                gets `report.html` only.

        Returns:
            The path of `report.html`.
        """
        sweep = self.evaluation
        summary = self._summary(sweep)
        path = self._folder.report if output_dir is None else Path(output_dir) / "report.html"
        if self.is_main:
            if output_dir is not None:
                write_json(path.with_name("summary.json"), summary)
            self._write_report(path, sweep, summary)
        return path

    def _write_report(self, path: Path, sweep: Sweep, summary: dict[str, Any]) -> None:
        write_report(
            path,
            config=self.config.plain(),
            summary=summary,
            metrics=self.metrics,
            pairs=sweep.pairs,
        )

    def _summary(self, sweep: Sweep) -> dict[str, Any]:
        # A hash of a large model takes a while, and is known where nothing has run since.
        sha256 = self._sha256_after or self._frozen.weights_sha256()
        if self._learner is None:
            return self._folder.read_summary() | {"frozen_sha256_after": sha256, "sweep": sweep.rows}
        return {
            "images_trained": self.images_trained,
            "kept_iteration": self.iteration if self._best is None else self._best.iteration,
            "train_seconds": self.train_seconds,
            "seconds": self.seconds,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "frozen_sha256_before": self._frozen_sha256,
            "frozen_sha256_after": sha256,
            "sweep": sweep.rows,
        }

    def _before_after(self, sweep: Sweep) -> bytes | None:
        """Draw the first prompts' pictures at the first step count in training, without and with the policy, as PNG."""
        trained = self.config.num_inference_steps[0]
        shown = [pair for pair in sweep.pairs if pair.num_inference_steps == trained]
        return before_after(shown[:8]) if shown else None

    def _write_samples(self, iteration: int) -> None:
        """Write the policy's pictures of the first held-out prompts, from the same seed each time."""
        num_inference_steps = self.config.num_inference_steps[0]
        latents = self._present_policy.choose(
            self._sample_embeds.prompt_embeds,
            seed=stream_seed(self.config.seed, "samples"),
            num_inference_steps=num_inference_steps,
        )
        images = self._frozen.generate(
            latents,
            self._sample_embeds,
            num_inference_steps=num_inference_steps,
            guidance_scale=self.config.guidance_scale,
            seeds=row_seeds(self.config.seed, range(len(latents))),
        )
        if are_pictures(images):
            picture = image_grid(list(images), len(self._sample_prompts))
            path = self._folder.samples / f"iteration_{iteration:06d}.png"
            write_bytes(path, picture)
            if self._trackers is not None:
                self._trackers.log_picture("samples", path, iteration * self.config.batch_size)

    def __repr__(self) -> str:
        if self._learner is None:
            return f"<Run in {self.folder}>"
        return f"<Run in {self.folder}: {self.iteration} of {self.config.num_iterations} iterations>"

    def _repr_html_(self) -> str:
        """Show the before/after picture and the evaluation in a notebook."""
        parts = [f"<p>{html.escape(repr(self))}</p>"]
        if self._sweep is not None:
            if picture := self._before_after(self._sweep):
                data = base64.b64encode(picture).decode()
                parts.append(f'<img alt="before and after" src="data:image/png;base64,{data}">')
            parts.append(self._sweep._repr_html_())
        return "".join(parts)


class _Best(NamedTuple):
    """The policy that was best so far by the reward of `stop_on`."""

    policy: NoisePolicy
    reward: float
    iteration: int


def train(model: Any = None, **arguments: Any) -> Run:
    """Train a noise policy for a frozen model, evaluate it, and write its model card and report.

    Arguments and errors are those of `Run`.

    Returns:
        The finished run: `run.policy`, `run.evaluate(...)`, `run.generate(...)`, `run.report()`.
    """
    return Run(model, **arguments).train()


def resume(
    folder: str | Path,
    *,
    model: Any = None,
    reward: str | Reward | Callable[..., Any] | None = None,
    eval_rewards: Sequence[str | Reward | Callable[..., Any]] | None = None,
    **settings: Any,
) -> Run:
    """Resume a run from its newest checkpoint. With the same settings it goes on exactly as if it had not stopped.

    Args:
        folder: The run folder.
        model: The model again, if it was an object from Python.
        reward: The reward again, if it was an object from Python, runs code or sends pictures elsewhere.
        eval_rewards: The further rewards again, in the same cases.
        settings: Settings that may change in a resumed run, e.g. `num_iterations`.

    Raises:
        ValueError: if the folder holds no run, something is missing that has to be given again, or a setting cannot
            change.
    """
    with arguments_named():
        run, saved = RunFolder.open(Path(folder))
        saved = saved.replace(output_dir=run.path)
        settings = {name: value for name, value in settings.items() if value is not None}
        settings |= {} if model is None else {"model": model}
        if not isinstance(settings.get("prompts", ""), str | Path):
            raise ValueError("prompts: a resumed run keeps its training prompts; leave them out")
        named, given = _split_objects(**settings, reward=reward, eval_rewards=eval_rewards, column=saved.prompt_column)
        refuse_outside_code(
            run.path,
            model=None if model is not None else saved.model.name,
            reward=None if reward is not None else saved.reward,
            eval_rewards=() if eval_rewards is not None else saved.evaluation.rewards,
        )
        config = saved.replace(**named).with_absolute_paths()
        check_resumed(saved, config)
        run.check_model_is_there(config)
        resumed = Run.resume(run, config, given)
        resumed._is_of_python = True
        return resumed


def check_resumed(saved: TrainConfig, config: TrainConfig) -> None:
    """Raise ValueError if a run that was saved with `saved` cannot go on with `config`."""
    before, after = saved.with_absolute_paths().plain(), config.plain()
    changed = {name for name in after if after[name] != before[name]}
    flags = {name: setting.flag for name, setting in settings_of(TrainConfig).items()}
    if forbidden := sorted(changed - MAY_CHANGE_ON_RESUME):
        allowed = ", ".join(flags[name] for name in sorted(MAY_CHANGE_ON_RESUME))
        raise ValueError(f"{flags[forbidden[0]]} cannot change in a resumed run; only {allowed} can")
    config.check()
    if saved.stop_on is not None and (changed := sorted(changed & {*OF_THE_RESULT, *_OF_SHORT_EVALUATION})):
        name = flags[changed[0]]
        raise ValueError(f"{name} cannot change in a run with --stop-on, whose policy is kept as it was measured")
    if saved.holds_out_prompts and not config.holds_out_prompts:
        raise ValueError(
            "this run holds out a fifth of its prompts for evaluation; --eval-prompts or --eval-num-prompts 0 would "
            f"add them to its training prompts; use noisepolicy-eval {saved.output_dir} --prompts to evaluate others"
        )
    if config.holds_out_prompts and not saved.holds_out_prompts:
        raise ValueError(
            "this run trains on all of its prompts and without --eval-prompts a fifth of them would be held out from "
            "now on; give --eval-prompts FILE to evaluate it"
        )


@contextmanager
def arguments_named(is_wanted: bool = True) -> Iterator[None]:
    """Call settings by their Python names in errors: `batch_size` for `--batch-size`."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if is_wanted and error.args and isinstance(error.args[0], str):
            message = with_names(TrainConfig, error.args[0])
            for flag, name in _PYTHON_NAMES.items():
                message = message.replace(flag, name)
            error.args = (message,)
        raise


def _split_objects(
    *,
    model: Any = None,
    reward: Any = None,
    prompts: Any = None,
    eval_prompts: Any = None,
    eval_rewards: Any = None,
    column: str | None = None,
    **settings: Any,
) -> tuple[dict[str, Any], Given]:
    """Split arguments into settings, with names in the place of objects, and the objects."""
    objects: dict[str, Any] = {}
    if model is not None:
        settings["model"] = str(model) if isinstance(model, str | Path) else FROM_PYTHON + type(model).__name__
        if not isinstance(model, str | Path):
            objects["model"] = model
    if isinstance(reward, str):
        settings["reward"] = reward
    elif reward is not None:
        objects["reward"] = as_reward(reward, "reward")
        settings["reward"] = reward_name(objects["reward"])
    if isinstance(eval_rewards, str) or callable(eval_rewards):
        eval_rewards = [eval_rewards]
    if eval_rewards is not None:
        rewards = [each if isinstance(each, str) else as_reward(each, "eval_rewards") for each in eval_rewards]
        settings["eval_rewards"] = tuple(each if isinstance(each, str) else reward_name(each) for each in rewards)
        objects["eval_rewards"] = rewards
    for name, source in (("prompts", prompts), ("eval_prompts", eval_prompts)):
        if isinstance(source, str | Path):
            settings[name] = (str(source),)
        elif source is not None:
            try:
                objects[name] = PromptList([source], settings.get("prompt_column", column))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            settings[name] = (FROM_PYTHON + name,)
    return settings, Given(**objects)


def _prompts_digest(prompts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(identity(prompt) + b"\n")
    return digest.hexdigest()


def _best_of(images: torch.Tensor, rewards: torch.Tensor, count: int) -> torch.Tensor:
    """Keep the best of every `count` images that are next to each other."""
    best = rewards.reshape(-1, count).argmax(1)
    return images[(torch.arange(len(best)) * count + best).to(images.device)]
