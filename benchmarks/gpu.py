"""The session on a GPU: `benchmarks/gpu.sh OUTPUT.json` runs what only a GPU can show, within fifteen minutes.

It needs no network. Each step is a command of its own with a time limit, and the result is written after each, so that
a session that is cut off leaves what it has measured. `--tiny --device cpu` tries the steps themselves anywhere.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from noisepolicy.benchmarks.machine import describe_machine
from noisepolicy.benchmarks.random_models import write_random_model
from noisepolicy.storage import file_sha256, write_json

_TAIL = 2000  # characters of a step's output that the result keeps


class Session:
    """Runs steps and keeps their results in a file.

    Args:
        output: The JSON file.
        work: Folder of models and runs.
        device: Device of every step.
        tests: Folder of the tests, of which those that need a GPU are run; None for none.
        tiny: Take models and sizes so small that a CPU goes through all steps in minutes.
    """

    def __init__(self, output: Path, work: Path, device: torch.device, tests: Path | None, *, tiny: bool) -> None:
        self._output, self._work, self._device, self._tests, self._tiny = output, work, device, tests, tiny
        self._result: dict[str, Any] = {"machine": describe_machine(device), "tiny": tiny, "steps": {}}

    def run(self) -> bool:
        """Take every step; return whether all succeeded."""
        if self._tests is not None:
            pytest = Path(sys.executable).with_name("pytest")
            self._step("tests", 240, [pytest, "-q", "-m", "gpu", self._tests], folder=self._tests.parent)
        sizes = ("--batch", "2", "--dim", "4096") if self._tiny else ()
        self._bench("kernels", 120, "kernels", "--no-compile", *sizes)
        self._latency("sd-turbo", "bfloat16")
        if not self._tiny:
            self._latency("sdxl-turbo", "bfloat16")
            self._latency("sd-turbo", "float16")
        self._training()
        return all(step["exit_code"] == 0 for step in self._result["steps"].values())

    def _latency(self, size: str, dtype: str) -> None:
        """Time denoiser and rollouts of a pipeline, on the engines that run, against diffusers' own."""
        model = self._model(size, dtype)
        compiles = not self._tiny and dtype == "bfloat16"
        self._bench(
            f"latency {size} {dtype}",
            200,
            "latency",
            *("--model", model, "--dtype", dtype, "--output", self._work / f"bench-{size}-{dtype}"),
            *("--engine", "eager", *(["compile"] if compiles else [])),
            *("--batch-sizes", *(("1", "2") if self._tiny else ("1", "4", "16"))),
            *("--steps", *(("1",) if self._tiny else ("1", "2", "4"))),
            *("--guidance-scale", "1", "--seconds", "0.1" if self._tiny else "0.5", "--skip", "kernels", "training"),
        )

    def _training(self) -> None:
        """Train twice alike, compare the policies' bits, and train with more rows at once than memory holds."""
        model, folders = self._model("sd-turbo", "bfloat16"), []
        prompts = self._work / "prompts.txt"
        prompts.write_text("".join(f"picture number {number}\n" for number in range(64)), "utf-8")
        arguments = [sys.executable, "-m", "noisepolicy.cli.train", "--model", model, "--prompts", prompts]
        arguments += ["--reward", "brightness", "--dtype", "bfloat16", "--num-inference-steps", "2"]
        arguments += ["--critic-warmup", "16", "--eval-num-prompts", "0", "--device", self._device]
        graph = ["--cuda-graph"] if self._device.type == "cuda" else []
        small = ["--batch-size", "16", "--num-iterations", "3", *graph]
        for number in range(2):
            folders.append(self._work / f"run{number}")
            self._step(f"training {number}", 150, [*arguments, *small, "--output-dir", folders[-1]])
            self._read_run(f"training {number}", folders[-1])
        digests = [step.get("policy_sha256") for step in self._steps("training")]
        self._result["runs_are_bit_identical"] = None not in digests and len(set(digests)) == 1
        if self._device.type == "cuda":
            rows = ["--batch-size", "4096", "--rollout-batch-size", "4096", "--num-iterations", "1"]
            self._step("more rows than fit", 150, [*arguments, *rows, "--output-dir", self._work / "large"])
        self._save()

    def _model(self, size: str, dtype: str) -> Path:
        folder = self._work / f"{size}-{dtype}"
        if not folder.exists():
            write_random_model(size, folder, dtype=getattr(torch, dtype), device=self._device, tiny=self._tiny)
        return folder

    def _bench(self, name: str, limit_s: int, *arguments: object) -> None:
        """Run a command of noisepolicy-bench, and keep its JSON."""
        result = self._work / f"{name.replace(' ', '-')}.json"
        command = [sys.executable, "-m", "noisepolicy.cli.bench", "--json", result, *arguments]
        self._step(name, limit_s, [*command, "--device", self._device])
        if result.exists():
            self._result["steps"][name]["result"] = json.loads(result.read_text("utf-8"))
        self._save()

    def _read_run(self, name: str, folder: Path) -> None:
        """Keep a run's seconds by phase, and the digest of its policy."""
        policy = folder / "policy" / "policy.safetensors"
        if policy.exists():
            self._result["steps"][name] |= {
                "policy_sha256": file_sha256(policy),
                "summary": json.loads((folder / "summary.json").read_text("utf-8")),
            }

    def _step(self, name: str, limit_s: int, command: Sequence[object], folder: Path | None = None) -> None:
        # Not where the sources are: Python would find them in place of the installed package.
        folder = folder or self._work
        print(f"{name} ...", flush=True)
        start = time.perf_counter()
        try:
            done = subprocess.run(
                list(map(str, command)),
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=limit_s,
            )
            code, said = done.returncode, done.stdout
        except subprocess.TimeoutExpired as error:
            code, said = None, (error.stdout or b"").decode(errors="replace")
        seconds = round(time.perf_counter() - start, 1)
        self._result["steps"][name] = {"exit_code": code, "seconds": seconds, "said": said[-_TAIL:]}
        print(f"{name}: {'out of time' if code is None else 'ok' if code == 0 else 'failed'}, {seconds} s", flush=True)
        self._save()

    def _steps(self, prefix: str) -> list[dict[str, Any]]:
        return [step for name, step in self._result["steps"].items() if name.startswith(prefix)]

    def _save(self) -> None:
        write_json(self._output, self._result)


def main(argv: list[str] | None = None) -> int:
    """Run the session; exit with 1 if a step failed."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, metavar="OUTPUT.json")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--tests", type=Path, help="folder of the tests, to run those that need a GPU")
    parser.add_argument("--tiny", action="store_true", help="try the steps on models and sizes that a CPU can run")
    arguments = parser.parse_args(argv)
    if arguments.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --tiny --device cpu tries the steps without one")
    with tempfile.TemporaryDirectory() as work:
        session = Session(arguments.output, Path(work), arguments.device, arguments.tests, tiny=arguments.tiny)
        return 0 if session.run() else 1


if __name__ == "__main__":
    sys.exit(main())
