"""The command line of `noisepolicy-bench`."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

DEFAULT_COMMAND = "latency"
SITUATIONS = ("quiet", "neighbour", "one-cpu", "quota")
_DTYPES = ("float32", "float16", "bfloat16")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"noisepolicy-bench: error: {message}; see {self.prog} --help\n")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Parse the command line; exit with 2 on errors. `command` is None if only the backends are asked for."""
    parser = _Parser(
        prog="noisepolicy-bench",
        description="Measures, prints a table, and ends with one line of JSON.",
        epilog="Without a command it is latency, whose flags noisepolicy-bench latency --help lists.",
    )
    parser.add_argument(
        "--list-backends", action="store_true", help="list backends and engines, and why some do not run here"
    )
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    commands = parser.add_subparsers(dest="command")
    _add_latency(commands)
    _add_kernels(commands)
    training = commands.add_parser("training", help="the default recipe on several seeds, and on several rewards")
    training.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds; default: 0 1 2")
    training.add_argument(
        "--rewards", nargs="+", metavar="REWARD", help="a table for each, as noisepolicy-train --reward reads them"
    )
    training.add_argument(
        "--output-dir", type=Path, default=Path("runs/bench"), help="folder for the runs; default: runs/bench"
    )
    training.add_argument("train_arguments", nargs="*", help="after --, flags for noisepolicy-train")
    scale = commands.add_parser(
        "scale", help="images/s of several processes on the embedded model, with one thread each"
    )
    scale.add_argument(
        "--processes", type=int, nargs="+", default=[1, 2], metavar="N", help="numbers of processes; default: 1 2"
    )
    scale.add_argument(
        "--iterations", type=int, default=5, help="iterations that are timed for each number of processes; default: 5"
    )
    scale.add_argument(
        "--gradient-accumulation-steps",
        type=int,
        default=1,
        metavar="N",
        help="parts of an update that the processes share; default: 1, every process makes the whole update",
    )
    sharing = commands.add_parser(
        "sharing", help="seconds of a short training run beside a busy process, or with less CPU time than it sees"
    )
    sharing.add_argument("--situations", nargs="+", choices=SITUATIONS, default=list(SITUATIONS), help="default: all")
    sharing.add_argument(
        "--spin-counts",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="values of GOMP_SPINCOUNT to measure beside the command's own; OpenMP's default is 300000",
    )
    sharing.add_argument("--repetitions", type=int, default=3, help="runs of each, whose median is printed; default: 3")
    _add_algorithms(commands)
    copies = commands.add_parser(
        "copies",
        help="a policy of the embedded model on other copies of it: with a LoRA, quantised, at other step counts",
    )
    copies.add_argument("run", type=Path, metavar="RUN", help="run folder of noisepolicy-train shapes")
    copies.add_argument("--steps", type=int, nargs="+", default=[1, 4, 8], help="further step counts; default: 1 4 8")
    copies.add_argument("--num-prompts", type=int, default=24, help="held-out prompts, eight images each; default: 24")
    copies.add_argument("--lora-steps", type=int, default=100, help="gradient steps on the LoRA; default: 100")
    variety = commands.add_parser(
        "variety",
        help="reward against variety: policies of the embedded model beside other ways to make pictures differ",
    )
    variety.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders of noisepolicy-train shapes")
    variety.add_argument("--num-prompts", type=int, default=48, help="held-out prompts, eight images each; default: 48")
    variety.add_argument("--output", type=Path, metavar="DIR", help="for variety.png and variety_pictures.png")
    votes = commands.add_parser(
        "votes", help="what a simulated voter's votes are worth, and a policy learned from them"
    )
    votes.add_argument(
        "--tastes",
        nargs="+",
        default=["shapes", "red", "sharpness"],
        help="rewards that the voter has in mind; default: shapes red sharpness",
    )
    votes.add_argument("--num-prompts", type=int, default=5, help="held-out captions; default: 5")
    votes.add_argument("--num-voters", type=int, default=1, help="voters of each taste and caption; default: 1")
    report = commands.add_parser("report", help="an HTML file of a result of kernels, latency or algorithms")
    report.add_argument("result", type=Path, metavar="RESULT.json")
    report.add_argument("--output", type=Path, metavar="REPORT.html", help="default: beside the result")
    return parser.parse_args(_with_command(argv))


def _with_command(argv: list[str]) -> list[str]:
    """Put the default command behind the flags that stand before any command, unless there is a command."""
    index = 0
    while index < len(argv) and argv[index].split("=")[0] in ("--json", "--list-backends"):
        index += 2 if argv[index] == "--json" else 1
    has_command = index < len(argv) and (argv[index] in ("-h", "--help") or not argv[index].startswith("-"))
    if has_command or index > len(argv) or "--list-backends" in argv[:index]:
        return argv
    return [*argv[:index], DEFAULT_COMMAND, *argv[index:]]


def _add_latency(commands: Any) -> None:
    latency = commands.add_parser(
        DEFAULT_COMMAND, help="(the default) where the time of a rollout goes, by engine, batch and step count"
    )
    add = latency.add_argument
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for latency.json and latency.html; default: runs/bench- and the time",
    )
    add("--model", default="shapes", help="the frozen model, a folder or hub id; default: the embedded one")
    add("--engine", nargs="+", metavar="NAME", help="engines; default: all that run here, except compile on a CPU")
    add(
        "--engine-dtype",
        nargs="+",
        choices=_DTYPES,
        help="data types of the engines other than eager; default: --dtype",
    )
    add(
        "--batch-sizes",
        type=int,
        nargs="+",
        metavar="N",
        help="batch sizes; rollouts take the first and last; default: 1 4 16 64",
    )
    add("--steps", type=int, nargs="+", metavar="N", help="denoising steps of rollouts; default: 1 2 4 8")
    add("--guidance-scale", type=float, default=1.5, help="classifier-free guidance; default: 1.5")
    add("--dtype", default="float32", choices=_DTYPES, help="data type of the model; default: float32")
    add("--scheduler", help="name of a diffusers scheduler that replaces the model's")
    add("--timestep-spacing", help="timestep spacing of the scheduler")
    add("--reward", help="reward to time; default: the embedded model's, and none for other models")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--threads", type=int, help="threads of torch; default: 1 on a CPU")
    add("--seconds", type=float, default=1.0, help="seconds for each figure, or longer where it is slow; default: 1")
    add(
        "--skip",
        nargs="+",
        default=[],
        metavar="PART",
        help="parts to leave out: kernels, denoiser, rollout, general, training",
    )
    add(
        "--compare",
        type=Path,
        metavar="OLD.json",
        help="exit with 1 if a median is slower than in this file, beyond noise",
    )
    add("--json", type=Path, default=argparse.SUPPRESS, help="also write the result to this file")


def _add_kernels(commands: Any) -> None:
    kernels = commands.add_parser("kernels", help="every op on every backend, against PyTorch and the machine's limit")
    kernels.add_argument("--op", nargs="+", help="ops to measure; default: all")
    kernels.add_argument("--backend", nargs="+", help="backends to measure; default: all that run on the device")
    kernels.add_argument(
        "--dtype", nargs="+", default=["float32"], help="data types of mean and log_std: float32 float16 bfloat16"
    )
    kernels.add_argument("--batch", type=int, nargs="+", help="numbers of rows; default: 1 8 64")
    kernels.add_argument("--dim", type=int, nargs="+", help="elements of a row; default: 4096 16384 65536 262144")
    kernels.add_argument("--threads", type=int, default=1, help="threads of torch; default: 1")
    kernels.add_argument("--device", default="auto", help="auto, cpu or cuda")
    kernels.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    kernels.add_argument("--output", type=Path, metavar="REPORT.html", help="also write a report with plots")


def _add_algorithms(commands: Any) -> None:
    algorithms = commands.add_parser(
        "algorithms", help="the methods side by side on the embedded models: policies, FIND, DDPO, searches"
    )
    add = algorithms.add_argument
    add(
        "--output",
        type=Path,
        default=Path("runs/algorithms"),
        metavar="DIR",
        help="folder for algorithms.json and .html (or ablations) and for the jobs; finished jobs are kept; "
        "default: runs/algorithms",
    )
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds; default: 0 1 2")
    add("--methods", nargs="+", metavar="NAME", help="methods to measure; default: all")
    add(
        "--ablations",
        action="store_true",
        help="instead of the methods, the default recipe with one thing changed at a time",
    )
    add("--quick", action="store_true", help="a twentieth of the images and one seed, in ten minutes")
    add("--engine", default="eager", help="engine of the image model; default: eager")
    add("--engine-dtype", choices=_DTYPES, help="data type of the engine; default: float32")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="jobs that run side by side, which makes each slower; default: 1",
    )
    add("--json", type=Path, default=argparse.SUPPRESS, help="also write the result to this file")
