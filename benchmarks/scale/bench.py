"""`noisepolicy-bench scale`: images/s of several processes on this machine, and the bytes that they exchange.

Each number of processes is a real torchrun of the default recipe on the embedded model, one thread a process. A rollout
(images, rewards, gathering) is what processes always share; an iteration has the updates too, which they share if
their rows are cut into parts.
Then what checkpoints, resuming and a slow reward take in the first of these runs.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def run(process_counts: Sequence[int], num_iterations: int, num_parts: int) -> dict[str, Any]:
    """Print a table and return its numbers.

    Args:
        num_parts: `--gradient-accumulation-steps` of the runs.

    Raises:
        ValueError: if a count is not positive.
        RuntimeError: if a run fails.
    """
    if min(*process_counts, num_iterations, num_parts) < 1:
        raise ValueError(
            "--processes, --iterations and --gradient-accumulation-steps must be positive, got "
            f"{list(process_counts)}, {num_iterations} and {num_parts}"
        )
    print("processes | rollout: images/s, of the first | iteration: images/s, of the first | bytes gathered by each")
    rows: list[dict[str, Any]] = []
    for count in process_counts:
        rows.append(row := {"processes": count, **_measure(count, num_iterations, num_parts)})
        for name in ("rollout", "iteration"):
            row[f"{name}_speedup"] = row[f"{name}_images_per_s"] / rows[0][f"{name}_images_per_s"]
        print(
            f"{count:9d} | {row['rollout_images_per_s']:17.1f}, {row['rollout_speedup']:10.2f}x "
            f"| {row['iteration_images_per_s']:19.1f}, {row['iteration_speedup']:10.2f}x "
            f"| {row['bytes_per_iteration']:,.0f}",
            flush=True,
        )
    print(
        f"a checkpoint takes {rows[0]['save_s']:.3f} s, {rows[0]['save_share']:.2%} of the ten iterations before it; "
        f"resuming takes {rows[0]['resume_s']:.2f} s beyond loading the model"
    )
    if overlap := rows[0]["overlap"]:
        print(
            f"with a reward as slow as generation ({overlap['generation_s']:.2f} s) a rollout takes "
            f"{overlap['in_turn_s']:.2f} s, with --overlap {overlap['overlapped_s']:.2f} s"
        )
    return {"iterations": num_iterations, "gradient_accumulation_steps": num_parts, "scale": rows}


def _measure(num_processes: int, num_iterations: int, num_parts: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(num_processes),
            "-m",
            "noisepolicy.benchmarks.scale.worker",
            str(result),
            str(num_iterations),
            str(num_parts),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise RuntimeError(f"the run of {num_processes} processes failed: {last[0]}")
        return json.loads(result.read_text("utf-8"))
