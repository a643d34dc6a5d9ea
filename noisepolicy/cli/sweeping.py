"""The sweep as a command runs it: with progress, and as a table at the end."""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from noisepolicy.evaluation import Sweep, evaluate_sweep
from noisepolicy.frozen import PromptEmbeds
from noisepolicy.policies import NoisePolicy
from noisepolicy.rewards.registry import without_folders
from noisepolicy.training.processes import Processes
from noisepolicy.training.seeding import stream_seed
from noisepolicy.training.task import Task


def run_sweep(
    policy: NoisePolicy,
    task: Task,
    prompts: Sequence[str],
    embeds: PromptEmbeds,
    *,
    step_counts: Sequence[int],
    group_size: int,
    guidance_scale: float,
    processes: Processes,
) -> Sweep:
    """`evaluate_sweep` on the task, from the noise that every evaluation starts from, shared among `processes`."""
    from tqdm import tqdm

    num_images = 2 * len(step_counts) * len(prompts) * group_size // processes.count
    with tqdm(
        total=num_images,
        desc="evaluating",
        unit="image",
        dynamic_ncols=True,
        disable=not processes.is_main,
        mininterval=0.5 if sys.stderr.isatty() else 15.0,
    ) as progress:
        return evaluate_sweep(
            policy,
            task.frozen,
            task.reward,
            prompts,
            step_counts=step_counts,
            group_size=group_size,
            guidance_scale=guidance_scale,
            seed=stream_seed(0, "evaluation"),
            eval_rewards=task.eval_rewards,
            embeds=embeds,
            on_progress=progress.update,
            rank=processes.index,
            num_ranks=processes.count,
            collect=partial(processes.collect, "'evaluate'"),
        )


def print_table(rows: Sequence[dict[str, Any]], measured_on: str) -> None:
    """One line a step count, and one for each further reward."""
    if not rows:
        return
    has_strict = rows[0]["base"]["strict"] is not None
    strict_head = "    strict        " if has_strict else ""
    print(f"\n{measured_on}, same seeds")
    print(f" steps   reward base -> policy   gain (95% interval)       {strict_head}diversity kept")
    for row in rows:
        base, policy = row["base"], row["policy"]
        strict = f"{base['strict']:.3f} -> {policy['strict']:.3f}    " if has_strict else ""
        kept = f"{policy['diversity'] / base['diversity']:.0%}" if base["diversity"] else "-"
        print(
            f"{row['num_inference_steps']:6d}   {base['reward']:.3f} -> {policy['reward']:.3f}"
            f"          {_gain(row)}   {strict}{kept}"
        )
        for other in (*row["parts"], *row["eval_rewards"]):
            name = without_folders(other["name"])
            print(f"         {other['base']:.3f} -> {other['policy']:.3f}          {_gain(other)}   {name}")


def _gain(row: dict[str, Any]) -> str:
    low, high = row["gain_ci95"]
    return f"{row['gain']:+.3f} ({low:+.3f}, {high:+.3f})"
