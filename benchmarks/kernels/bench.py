"""`noisepolicy-bench kernels`: every op on every backend, checked against the reference, then timed against PyTorch.

Baselines are the op in eager PyTorch, the same through `torch.compile` (with `fallback_random`, so that its randn is
the fast one), and for sampling `torch.randn` alone. Percent of limit: the least time this machine needs for the op,
measured beside it, over the op's own. On the CPU that is drawing the random words for sampling, copying as many bytes
for the log-density, and for the loss the slower of copying and of its arithmetic on data in the first cache;
elsewhere, and without the compiled extension, copying. Baselines of half-precision inputs compute in float32, as the
ops do.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from noisepolicy.benchmarks.kernels import extras
from noisepolicy.benchmarks.kernels.cases import OPS, SAMPLING_OPS, Case, machine_limit, make_case
from noisepolicy.benchmarks.timing import Timer, Timing
from noisepolicy.ops import available_backends
from noisepolicy.ops.dispatch import choose

BATCHES, DIMS = (1, 8, 64), (4_096, 16_384, 65_536, 262_144)

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_HEADER = (
    f"{'op':17s} {'backend':7s} {'dtype':8s} {'batch':>5s} {'dim':>7s} {'thr':>3s} {'median us':>10s} {'p20':>9s} "
    f"{'p80':>9s} {'GB/s':>6s} {'limit':>6s} | faster than {'eager':>7s} {'compile':>8s} {'randn':>7s}"
)


def run(
    *,
    op_names: Sequence[str] = OPS,
    backends: Sequence[str] | None = None,
    dtypes: Sequence[str] = ("float32",),
    batches: Sequence[int] = BATCHES,
    dims: Sequence[int] = DIMS,
    threads: int = 1,
    device: str = "auto",
    use_compile: bool = True,
) -> dict[str, Any]:
    """Print the table and return its numbers.

    Args:
        backends: Names of backends. Default: every one that runs on the device.
        device: `"cpu"`, `"cuda"` or `"auto"`, which prefers the GPU.

    Raises:
        ValueError: for a name or a size that is not one.
        RuntimeError: if a backend is not available, or its output differs from the reference's.
    """
    _check("--op", op_names, OPS)
    _check("--dtype", dtypes, tuple(_DTYPES))
    _check("--device", [device], ("auto", "cpu", "cuda"))
    for name, values in (("--batch", batches), ("--dim", dims), ("--threads", [threads])):
        if min(values) < 1:
            raise ValueError(f"{name} must be positive, got {min(values)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda: this torch sees no CUDA device; use --device cpu")
    place = torch.device(device)
    names = _backends_on(place, backends)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        result = {"device": _describe(place), "results": [], "compile_failures": []}
        timer = Timer(place)
        print(f"{result['device']}; {threads} thread{'s' if threads > 1 else ''}\n{_HEADER}")
        for op in op_names:
            for dtype in dtypes:
                for batch in batches:
                    for dim in dims:
                        case = make_case(op, batch, dim, _DTYPES[dtype], place)
                        _bench(case, names, use_compile, timer, result)
        for reason in sorted({failure["reason"] for failure in result["compile_failures"]}):
            print(f"no torch.compile baseline where the table says '-': {reason}")
        result["other_jobs"] = timer.other_jobs()
        result |= extras.run(place, names, op_names, dims)
    finally:
        torch.set_num_threads(threads_before)
    return result


def compile_baseline(case: Case) -> Callable[..., Any]:
    """Compile `case.eager` for this shape alone. The compiler's errors are not caught."""
    import torch._inductor.config as inductor

    torch._dynamo.reset()  # after eight shapes of one function it would quietly stop compiling
    with inductor.patch(fallback_random=True, compile_threads=1):
        compiled = torch.compile(case.eager, dynamic=False, fullgraph=True)
        case.run(compiled)
    return compiled


def _check(flag: str, given: Sequence[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"unknown {flag} {name!r}; choose from {', '.join(known)}")


def _backends_on(device: torch.device, asked: Sequence[str] | None) -> list[str]:
    if asked is not None:
        for name in asked:
            choose(name, device)
        return list(asked)
    names = []
    for name in available_backends():
        with contextlib.suppress(RuntimeError):
            choose(name, device)
            names.append(name)
    return names


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if available_backends()["cpp"]:
        return "CPU, without the compiled extension"
    from noisepolicy import _C

    return f"CPU, {_C.instruction_set()} kernels"


def _bench(case: Case, backends: Sequence[str], use_compile: bool, timer: Timer, result: dict[str, Any]) -> None:
    expected = case.call("torch")
    for name in backends:
        case.check(f"backend {name!r}", case.call(name), expected)
    calls: dict[str, Callable[[], Any]] = {name: lambda name=name: case.call(name) for name in backends}
    baselines: dict[str, Callable[[], Any]] = {"eager": lambda: case.run(case.eager)}
    if use_compile:
        try:
            compiled = compile_baseline(case)
        except (RuntimeError, OSError, ImportError) as error:  # no C++ compiler, or one that inductor cannot use
            reason = str(error).strip().splitlines()[0]
            size = {"op": case.op, "batch": case.batch, "dim": case.dim}
            result["compile_failures"].append({**size, "reason": f"{type(error).__name__}: {reason}"})
        else:
            baselines["compile"] = lambda: case.run(compiled)
    if case.op in SAMPLING_OPS:
        baselines["randn"] = lambda: torch.randn(case.batch, case.dim, device=case.device)
    else:
        for name, call in baselines.items():
            case.check(f"baseline {name!r}", call(), expected, slack=10)
    del expected
    limits = machine_limit(case)
    timings = timer.measure({**calls, **baselines, **{name: call for name, (call, _) in limits.items()}})
    bound, limit_us = max(
        ((name, timings[name].median_us * factor) for name, (_, factor) in limits.items()), key=lambda entry: entry[1]
    )
    baselines_us = {name: timings[name].median_us if name in timings else None for name in ("eager", "compile")}
    if case.op in SAMPLING_OPS:
        baselines_us["randn"] = timings["randn"].median_us
    for name in backends:
        row = _row(case, name, timings[name], limit_us, baselines_us)
        result["results"].append({**row, "limit": bound, "baselines_us": baselines_us})
        print(_line(row), flush=True)


def _row(
    case: Case, backend: str, timing: Timing, limit_us: float, baselines_us: dict[str, float | None]
) -> dict[str, Any]:
    return {
        "op": case.op,
        "backend": backend,
        "dtype": str(case.dtype).removeprefix("torch."),
        "batch": case.batch,
        "dim": case.dim,
        "threads": torch.get_num_threads(),
        **timing._asdict(),
        "gb_per_s": case.num_bytes / timing.median_us / 1e3,
        "limit_fraction": limit_us / timing.median_us,
        "speedup": {name: value and value / timing.median_us for name, value in baselines_us.items()},
    }


def _line(row: dict[str, Any]) -> str:
    def times(name: str) -> str:
        value = row["speedup"].get(name)
        return f"{value:.2f}x" if value else "-"

    return (
        f"{row['op']:17s} {row['backend']:7s} {row['dtype']:8s} {row['batch']:5d} {row['dim']:7d} {row['threads']:3d} "
        f"{row['median_us']:10.1f} {row['p20_us']:9.1f} {row['p80_us']:9.1f} {row['gb_per_s']:6.2f} "
        f"{row['limit_fraction']:6.1%} | {'':11s} {times('eager'):>7s} {times('compile'):>8s} {times('randn'):>7s}"
    )
