"""One process of `noisepolicy-bench scale`, started by torchrun: `worker.py RESULT.json ITERATIONS`."""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from noisepolicy.cli.devices import make_accelerator
from noisepolicy.cli.failures import quiet_loading
from noisepolicy.rewards import Reward
from noisepolicy.storage import write_json
from noisepolicy.training.config import TrainConfig
from noisepolicy.training.run_folder import RunFolder
from noisepolicy.training.task import Task, load_task
from noisepolicy.training.trainer import Trainer


def main(result: Path, num_iterations: int) -> None:
    """Time iterations of the default recipe, with the policy learning from the start: medians after one that warms up.

    Then time a checkpoint and resuming from it, and, in one process, what overlapping hides of a slow reward.
    """
    torch.set_num_threads(1)
    quiet_loading()
    # One more than is run: the last one of a run saves it.
    config = TrainConfig(num_iterations=num_iterations + 2, critic_warmup=0, checkpoint_every=10**6)
    accelerator = make_accelerator("cpu")
    task = load_task(config, accelerator.device)
    run = RunFolder(result.parent / "run")
    trainer = Trainer(config, task, run, accelerator)
    # Prompts are encoded once in a run, by every process.
    trainer.encode_prompts(num_iterations + 2)
    iterations = trainer.train()
    next(iterations)
    before = trainer.processes.bytes_received
    iteration_s = [_seconds(lambda: next(iterations)) for _ in range(num_iterations)]
    gathered = trainer.processes.bytes_received - before
    rollout_s = [_seconds(lambda number=number: trainer._roll_out(number)) for number in range(num_iterations)]
    save_s = [_seconds(trainer._save) for _ in range(3)] if accelerator.is_main_process else [0.0]
    trainer.processes.wait("'save'")
    resumed = Trainer(config, task, run, accelerator)
    resume_s = _seconds(resumed.resume)
    trainer.processes.wait("'resume'")
    overlap = _overlap(config, task, result.parent, accelerator) if accelerator.num_processes == 1 else None
    if accelerator.is_main_process:
        images = trainer.config.batch_size
        write_json(
            result,
            {
                "images": images,
                "rollout_images_per_s": images / statistics.median(rollout_s),
                "iteration_images_per_s": images / statistics.median(iteration_s),
                "bytes_per_iteration": gathered / num_iterations,
                "save_s": statistics.median(save_s),
                "save_share": statistics.median(save_s)
                / (TrainConfig.checkpoint_every * statistics.median(iteration_s)),
                "resume_s": resume_s,
                "overlap": overlap,
            },
        )
    if dist.is_initialized():
        dist.destroy_process_group()


def _overlap(config: TrainConfig, task: Task, folder: Path, accelerator: Accelerator) -> dict[str, float]:
    """Time a rollout in eight chunks with a reward as slow as generation, one after the other and overlapped."""
    medians: dict[str, float] = {}
    for name, is_slow in (("generation_s", False), ("in_turn_s", True), ("overlapped_s", True)):
        settings = dataclasses.replace(config, rollout_batch_size=12, overlap=name == "overlapped_s")
        pause = medians["generation_s"] / settings.resolved(1).batch_size if is_slow else 0.0
        reward = Reward("slow", partial(_slow_reward, pause))
        trainer = Trainer(settings, dataclasses.replace(task, reward=reward), RunFolder(folder / name), accelerator)
        trainer._roll_out(0)
        medians[name] = statistics.median(_seconds(partial(trainer._roll_out, 1)) for _ in range(3))
    return medians


def _slow_reward(pause: float, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    time.sleep(pause * len(images))
    return torch.zeros(len(images))


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
