"""`noisepolicy-bench training`: the default recipe on several seeds and rewards, each a run of the real command.

Finished runs are not made again, and interrupted ones are resumed, so the command can be stopped and repeated.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_BAD_INPUT, _INTERRUPTED = 2, 130
"""Exit codes of the commands."""


def run(
    output_dir: Path, seeds: Sequence[int], train_arguments: Sequence[str], rewards: Sequence[str] | None = None
) -> dict[str, Any]:
    """Train each seed, print the table and return its numbers; with `rewards`, a table for each of them.

    Raises:
        ValueError: if noisepolicy-train refuses its flags, or its runs measure something else than this table shows.
        RuntimeError: if a run fails on the way.
    """
    if not seeds:
        raise ValueError("--seeds needs a seed")
    if rewards is None:
        return _train_seeds(output_dir, seeds, train_arguments)
    folders = {reward: re.sub(r"[^\w.]+", "-", reward).strip("-") for reward in rewards}
    if len(set(folders.values())) < len(rewards):
        raise ValueError(f"--rewards: two of {', '.join(rewards)} have the same folder; give them one after the other")
    tables = {}
    for reward, folder in folders.items():
        print(f"\nreward {reward}", flush=True)
        tables[reward] = _train_seeds(output_dir / folder, seeds, ["--reward", reward, *train_arguments])
    return {"rewards": tables}


def _train_seeds(output_dir: Path, seeds: Sequence[int], train_arguments: Sequence[str]) -> dict[str, Any]:
    summaries = [_train(output_dir / f"seed{seed}", seed, train_arguments) for seed in seeds]
    try:
        result = _collect(seeds, summaries)
        _print(result)
    except (LookupError, TypeError) as error:
        raise ValueError(
            f"the runs in {output_dir} do not hold what this table shows ({type(error).__name__}: {error}); it is for "
            "runs with evaluation"
        ) from error
    return result


def _collect(seeds: Sequence[int], summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "seeds": list(seeds),
        "images_trained": [summary["images_trained"] for summary in summaries],
        "train_seconds": [summary["train_seconds"] for summary in summaries],
        "seconds": [summary["seconds"] for summary in summaries],
        "peak_rss_bytes": [summary["peak_rss_bytes"] for summary in summaries],
        "steps": [_combine([summary["sweep"][i] for summary in summaries]) for i in range(len(summaries[0]["sweep"]))],
    }


def _train(folder: Path, seed: int, train_arguments: Sequence[str]) -> dict[str, Any]:
    summary = folder / "summary.json"
    if not summary.exists():
        command = [str(Path(sys.executable).with_name("noisepolicy-train"))]
        if (folder / "config.yaml").exists():
            command += ["--resume", str(folder), *_reward_of(train_arguments)]
        else:
            command += ["--seed", str(seed), "--output-dir", str(folder), *train_arguments]
        code = subprocess.run(command, check=False).returncode
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
        if code:  # it has said why
            kind = ValueError if code == _BAD_INPUT else RuntimeError
            raise kind(f"noisepolicy-train with seed {seed} ended with exit code {code}")
    return json.loads(summary.read_text("utf-8"))


def _reward_of(train_arguments: Sequence[str]) -> list[str]:
    """Return flags that repeat the reward where a run is resumed, as a reward that runs code requires."""
    return list(train_arguments[:2]) if train_arguments[:1] == ["--reward"] else []


def _combine(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = rows[0]
    return {
        "num_inference_steps": first["num_inference_steps"],
        "base": first["base"],
        "best_of_n": first["best_of_n"],
        "reward": [row["policy"]["reward"] for row in rows],
        "strict": [row["policy"]["strict"] for row in rows],
        "diversity_kept": [row["policy"]["diversity"] / row["base"]["diversity"] for row in rows],
        "gain": [row["gain"] for row in rows],
        "gain_ci95": [row["gain_ci95"] for row in rows],
        "parts": [_combine_other(parts) for parts in zip(*(row["parts"] for row in rows), strict=True)],
        "eval_rewards": [_combine_other(others) for others in zip(*(row["eval_rewards"] for row in rows), strict=True)],
    }


def _combine_other(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A part of the reward, or one that was not trained for."""
    return {
        "name": rows[0]["name"],
        "base": rows[0]["base"],
        "policy": [row["policy"] for row in rows],
        "gain_ci95": [row["gain_ci95"] for row in rows],
    }


def _print(result: dict[str, Any]) -> None:
    def spread(values: Sequence[float | None], form: str = ".3f") -> str:
        return " ".join("-" if value is None else format(value, form) for value in values)

    print(f"\nseeds {result['seeds']}, {result['images_trained'][0]:,} images each")
    print(
        "steps | base reward, strict | policy reward | strict | gain, lowest bound | diversity kept | base best of 2, 4"
    )
    for row in result["steps"]:
        bound = min(low for low, _ in row["gain_ci95"])
        best = spread([entry["reward"] for entry in row["best_of_n"][:2]])
        print(
            f"{row['num_inference_steps']:5d} | {spread([row['base']['reward'], row['base']['strict']])} | "
            f"{spread(row['reward'])} | {spread(row['strict'])} | {spread(row['gain'], '+.3f')}, {bound:+.3f} | "
            f"{spread(row['diversity_kept'], '.0%')} | {best}"
        )
        for other in (*row["parts"], *row["eval_rewards"]):
            print(f"      | {other['name']}: base {other['base']:.3f}, policy {spread(other['policy'])}")
    for seed, seconds, total in zip(result["seeds"], result["seconds"], result["train_seconds"], strict=True):
        share = 1 - (seconds["frozen_model"] + seconds["reward"]) / total
        print(f"seed {seed}: {total:.0f} s of training, {share:.0%} of it outside frozen model and reward")
    print(f"peak memory {max(result['peak_rss_bytes']) / 1e9:.2f} GB")
