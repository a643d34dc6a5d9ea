"""One process of `noisepolicy-bench scale`, started by torchrun: `scale_worker.py RESULT.json ITERATIONS`."""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from noisepolicy.cli.devices import make_accelerator
from noisepolicy.cli.failures import quiet_loading
from noisepolicy.storage import write_json
from noisepolicy.training.config import TrainConfig
from noisepolicy.training.run_folder import RunFolder
from noisepolicy.training.task import load_task
from noisepolicy.training.trainer import Trainer


def main(result: Path, num_iterations: int) -> None:
    """The default recipe, the policy learning from the start; medians over iterations, after one that warms up."""
    torch.set_num_threads(1)
    quiet_loading()
    # One more than is run: the last one of a run saves it.
    config = TrainConfig(num_iterations=num_iterations + 2, critic_warmup=0, checkpoint_every=10**6)
    accelerator = make_accelerator("cpu")
    task = load_task(config, accelerator.device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, task, RunFolder(Path(folder)), accelerator)
        # Prompts are encoded once in a run, by every process.
        trainer.encode_prompts(num_iterations + 2)
        iterations = trainer.train()
        next(iterations)
        before = trainer.processes.bytes_received
        iteration_s = [_seconds(lambda: next(iterations)) for _ in range(num_iterations)]
        gathered = trainer.processes.bytes_received - before
        rollout_s = [_seconds(lambda number=number: trainer._roll_out(number)) for number in range(num_iterations)]
    if accelerator.is_main_process:
        images = trainer.config.batch_size
        write_json(result, {
            "images": images,
            "rollout_images_per_s": images / statistics.median(rollout_s),
            "iteration_images_per_s": images / statistics.median(iteration_s),
            "bytes_per_iteration": gathered / num_iterations,
        })  # fmt: skip
    if dist.is_initialized():
        dist.destroy_process_group()


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
