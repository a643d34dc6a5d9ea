"""The rest of `noisepolicy-bench kernels`: what a call costs beside its kernel, memory of the loss, a second thread."""

import os
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from noisepolicy import ops
from noisepolicy.benchmarks.kernels.cases import OPS, make_case
from noisepolicy.benchmarks.timing import measure
from noisepolicy.ops.layout import kernel_policy

_BATCH, _SMALL_DIM, _LARGE_DIM = 8, 16, 65_536
_REPETITIONS = 3


def run(device: torch.device, backends: Sequence[str], op_names: Sequence[str], dims: Sequence[int]) -> dict[str, Any]:
    """Measure what applies to the device and the given ops; print and return the numbers."""
    result: dict[str, Any] = {}
    if device.type == "cpu" and "cpp" in backends:
        result["call_overhead_us"] = call_overhead()
        for op, overhead in result["call_overhead_us"].items():
            print(f"{op} at batch {_BATCH}, dim {_SMALL_DIM}: {overhead:.2f} us above the bare C++ call")
        result["thread_scaling"] = thread_scaling(op_names, [dim for dim in dims if dim >= _LARGE_DIM])
        for row in result["thread_scaling"]:
            print(f"{row['op']} at batch {row['batch']}, dim {row['dim']}: {row['speedup']:.2f}x with two threads")
    if "ppo_clip_loss" in op_names:
        result["ppo_extra_memory"] = memory = ppo_extra_memory(device, backends[0])
        print(
            f"ppo_clip_loss forward + backward, backend {memory['backend']}: {memory['tensors_of_size']:.3f} tensors "
            f"of (batch, dim) beside its inputs at the peak; eager {memory['eager_tensors_of_size']:.3f}"
        )
    return result


def call_overhead() -> dict[str, float]:
    """Measure the microseconds that the two ops without gradient take above the bare C++ function."""
    from noisepolicy import _C

    mean, log_std = torch.zeros(2, _BATCH, _SMALL_DIM)
    latents, log_prob = torch.empty(_BATCH, _SMALL_DIM), torch.empty(_BATCH)
    policy = kernel_policy(mean, log_std)
    results = latents.data_ptr(), log_prob.data_ptr()
    threads = torch.get_num_threads()
    with torch.no_grad():
        timings = measure(
            {
                "gaussian_sample": lambda: ops.gaussian_sample(mean, log_std, seed=1, backend="cpp"),
                "bare gaussian_sample": lambda: _C.gaussian_sample(*policy, 1, 0, threads, *results),
                "gaussian_log_prob": lambda: ops.gaussian_log_prob(latents, mean, log_std, backend="cpp"),
                "bare gaussian_log_prob": lambda: _C.gaussian_log_prob(*policy, threads, *results),
            },
            mean.device,
            calls_per_sample=20,
        )
    return {
        op: timings[op].median_us - timings[f"bare {op}"].median_us for op in ("gaussian_sample", "gaussian_log_prob")
    }


def thread_scaling(op_names: Sequence[str], dims: Sequence[int]) -> list[dict[str, Any]]:
    """Measure the speed-up of the `cpp` backend by a second thread, float32; empty on a single core."""
    if (os.cpu_count() or 1) < 2:
        return []
    threads_before = torch.get_num_threads()
    rows = []
    for op in op_names:
        for dim in dims:
            case = make_case(op, _BATCH, dim, torch.float32, torch.device("cpu"))
            # Call after call: threads are woken from where the call before left them, as in training.
            medians: dict[int, list[float]] = {1: [], 2: []}
            for num_threads in (1, 2) * _REPETITIONS:
                torch.set_num_threads(num_threads)
                timing = measure({op: lambda case=case: case.call("cpp")}, case.device, seconds=0.1)[op]
                medians[num_threads].append(timing.median_us)
            one, two = (statistics.median(values) for values in medians.values())
            rows.append(
                {
                    "op": op,
                    "backend": "cpp",
                    "batch": _BATCH,
                    "dim": dim,
                    "one_thread_us": one,
                    "two_threads_us": two,
                    "speedup": one / two,
                }
            )
    torch.set_num_threads(threads_before)
    return rows


def ppo_extra_memory(device: torch.device, backend: str) -> dict[str, Any]:
    """Measure the peak memory of the loss with its gradients beside its inputs, in tensors of `(batch, dim)`, float32.

    It is measured at torch's allocator. The kernels themselves hold a number for each few thousand elements.
    """
    case = make_case(OPS[3], _BATCH, _LARGE_DIM, torch.float32, device)
    size = 4 * case.elements
    peak = _peak_on_gpu if device.type == "cuda" else _peak_on_cpu
    return {
        "backend": backend,
        "batch": _BATCH,
        "dim": _LARGE_DIM,
        "tensors_of_size": peak(lambda: case.call(backend)) / size,
        "eager_tensors_of_size": peak(lambda: case.run(case.eager)) / size,
    }


def _peak_on_cpu(call) -> int:
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _peak_on_gpu(call) -> int:
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
