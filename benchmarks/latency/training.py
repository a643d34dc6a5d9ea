"""Iterations of the real trainer on several engines, in turns."""

import itertools
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from noisepolicy.benchmarks.latency.cases import Engine, ModelSpec
from noisepolicy.rewards import load_reward
from noisepolicy.training.config import TrainConfig
from noisepolicy.training.run import Run
from noisepolicy.worlds.shapes import train_scenes

NUM_ITERATIONS = 3
"""Number of timed iterations; one before them warms up."""


def time_training(engines: Sequence[Engine], spec: ModelSpec) -> list[dict[str, Any]]:
    """Time one iteration of the default recipe on each engine, while the policy learns; the trainer splits the time.

    Milliseconds are medians over a few iterations, part by part, for the embedded model only.
    """
    reward = load_reward("shapes", device=spec.device)
    train = [scene.caption for scene in train_scenes()]
    # One more than is run, since the last one of a run saves it; and no iterations without a policy's update.
    config = TrainConfig.of(
        num_iterations=NUM_ITERATIONS + 2, critic_warmup=0, checkpoint_every=10**6, eval_num_prompts=0
    )
    runs, iterations, spent = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for engine in engines:
            engine.frozen.rollout_batch_size = config.model.rollout_batch_size
            runs[engine.label] = run = Run(
                engine.frozen,
                reward=reward,
                prompts=train,
                config=config,
                output_dir=Path(folder) / engine.label.replace(" ", "-"),
            )
            iterations[engine.label], spent[engine.label] = iter(run), []
        for _ in range(1 + NUM_ITERATIONS):
            for label, metrics in iterations.items():
                next(metrics)
                spent[label].append(runs[label].seconds)
    rows = []
    for engine in engines:
        pairs = list(itertools.pairwise(spent[engine.label]))
        split = {
            name: 1e3 * statistics.median(after[name] - before[name] for before, after in pairs) for name in pairs[0][0]
        }
        rows.append(
            {
                "backend": engine.backend,
                "dtype": engine.dtype,
                "images": next(iter(runs.values())).config.batch_size,
                "num_inference_steps": config.num_inference_steps[0],
                "iteration_ms": sum(split.values()),
                "split_ms": split,
            }
        )
    eager_ms = next((row["iteration_ms"] for row in rows if row["backend"] == "eager"), None)
    for row in rows:
        row["images_per_s"] = 1e3 * row["images"] / row["iteration_ms"]
        row["speedup_over_eager"] = eager_ms and eager_ms / row["iteration_ms"]
    _print(rows)
    return rows


def _print(rows: Sequence[dict[str, Any]]) -> None:
    names = rows[0]["split_ms"]
    print(
        f"\ntraining, an iteration of {rows[0]['images']} images at {rows[0]['num_inference_steps']} steps\n"
        f"{'':10s} {'dtype':8s} {'ms':>10s} | " + " ".join(f"{name:>13s}" for name in names) + " | faster than eager"
    )
    for row in rows:
        parts = " ".join(f"{value:13.1f}" for value in row["split_ms"].values())
        faster = "-" if row["speedup_over_eager"] is None else f"{row['speedup_over_eager']:.2f}x"
        print(f"{row['backend']:10s} {row['dtype']:8s} {row['iteration_ms']:10.1f} | {parts} | {faster}", flush=True)
