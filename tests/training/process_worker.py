"""One process of a run on the tiny frozen model, for test_processes.py: `process_worker.py FOLDER [FAULT]`."""

import sys
import time
from pathlib import Path

import torch
from conftest import BlobModel, left_or_right, make_run

from noisepolicy.training.launch import leave, may_report_error, rank

SETTINGS = {
    "critic": {
        "num_iterations": 8,
        "num_inference_steps": (1, 2),
        "critic_updates": 1,
        "critic_warmup": 22,
        "critic_batch_size": 8,
        "num_updates": 2,
        "batch_size": 22,
        "group_size": 2,
        "rollout_batch_size": 6,
    },
    "ppo": {
        "algorithm": "ppo",
        "num_iterations": 8,
        "batch_size": 15,
        "group_size": 5,
        "rollout_batch_size": 4,
        "eval_prompts": [f"prompt {number}" for number in range(40)],
        "eval_num_prompts": 40,
        "stop_on": "left_or_right",
        "eval_every": 3,
    },
    "find": {"algorithm": "find", "batch_size": None, "group_size": 5, "rollout_batch_size": 3, "num_iterations": 5},
}


SETTINGS["critic, shared"] = SETTINGS["critic"] | {"gradient_accumulation_steps": 3}
SETTINGS["ppo, shared"] = SETTINGS["ppo"] | {"gradient_accumulation_steps": 4}


class RoundingModel(BlobModel):
    """Its last digits depend on how many rows it is called with, as a large network's do."""

    def encode(self, prompts):
        return super().encode(prompts)._map(lambda tensor: tensor * (1 + 1e-5 * len(prompts)))

    def generate(self, latents, prompt_embeds, **options):
        return super().generate(latents * (1 + 1e-3 * len(latents)), prompt_embeds, **options)


def main(folder: Path, fault: str = "") -> None:
    names = [fault.split(":")[0]] if fault else list(SETTINGS)
    for name in names:
        trainer = make_run(
            folder / name,
            frozen=RoundingModel(),
            reward=left_or_right,
            timeout=4.0 if "hang" in fault else 120.0,
            **SETTINGS[name],
        )
        for metrics in trainer:
            if rank() == 1 and metrics["iteration"] == 3:
                if "hang" in fault:
                    time.sleep(600)
                if "drift" in fault:
                    next(trainer._learner.policy.parameters()).data += 1e-6


if __name__ == "__main__":
    torch.set_num_threads(1)
    code = 0
    try:
        main(Path(sys.argv[1]), *sys.argv[2:])
    except RuntimeError as error:
        code = 1
        if may_report_error():
            print(f"worker: error: {error}", file=sys.stderr)
    leave(code)
