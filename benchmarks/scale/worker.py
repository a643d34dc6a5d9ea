"""One process of `noisepolicy-bench scale`, started by torchrun: `worker.py RESULT.json ITERATIONS PARTS`."""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from noisepolicy.rewards import Reward
from noisepolicy.storage import write_json
from noisepolicy.training.config import TrainConfig
from noisepolicy.training.run import Run


def main(result: Path, num_iterations: int, num_parts: int) -> None:
    """Time iterations of the default recipe, with the policy learning from the start: medians after one that warms up.

    Then time a checkpoint and resuming from it, and, in one process, what overlapping hides of a slow reward.
    """
    torch.set_num_threads(1)
    # One more than is run: the last one of a run saves it.
    config = TrainConfig.of(
        num_iterations=num_iterations + 2,
        critic_warmup=0,
        gradient_accumulation_steps=num_parts,
        checkpoint_every=10**6,
        eval_num_prompts=0,
        device="cpu",
        output_dir=result.parent / "run",
    )
    run = Run(config=config)
    # Prompts are encoded once in a run, by every process.
    run.encode_prompts(num_iterations + 2)
    iterations = iter(run)
    next(iterations)
    before = run.processes.bytes_received
    iteration_s = [_seconds(lambda: next(iterations)) for _ in range(num_iterations)]
    gathered = run.processes.bytes_received - before
    rollout_s = [_seconds(lambda number=number: run.roll_out(number)) for number in range(num_iterations)]
    save_s = [_seconds(partial(run.save, again=True)) for _ in range(3)] if run.is_main else [0.0]
    run.processes.wait("'save'")
    resume_s = _seconds(run.go_back)
    run.processes.wait("'resume'")
    overlap = _overlap(run, result.parent) if run.processes.count == 1 else None
    if run.is_main:
        images = run.config.batch_size
        write_json(
            result,
            {
                "images": images,
                "rollout_images_per_s": images / statistics.median(rollout_s),
                "iteration_images_per_s": images / statistics.median(iteration_s),
                "bytes_per_iteration": gathered / num_iterations,
                "save_s": statistics.median(save_s),
                "save_share": statistics.median(save_s)
                / (TrainConfig().checkpoint_every * statistics.median(iteration_s)),
                "resume_s": resume_s,
                "overlap": overlap,
            },
        )
    if dist.is_initialized():
        dist.destroy_process_group()


def _overlap(run: Run, folder: Path) -> dict[str, float]:
    """Time a rollout in eight chunks with a reward as slow as generation, one after the other and overlapped."""
    medians: dict[str, float] = {}
    for name, is_slow in (("generation_s", False), ("in_turn_s", True), ("overlapped_s", True)):
        pause = medians["generation_s"] / run.config.batch_size if is_slow else 0.0
        timed = Run(
            reward=Reward("slow", partial(_slow_reward, pause)),
            config=run.config.replace(reward=None),
            rollout_batch_size=12,
            overlap=name == "overlapped_s",
            output_dir=folder / name,
        )
        timed.roll_out(0)
        medians[name] = statistics.median(_seconds(partial(timed.roll_out, 1)) for _ in range(3))
    return medians


def _slow_reward(pause: float, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    time.sleep(pause * len(images))
    return torch.zeros(len(images))


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
