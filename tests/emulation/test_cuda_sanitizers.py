"""Every CUDA op under AddressSanitizer with UBSan, and under ThreadSanitizer, in several orders of its threads.

Each is shown to see what it is there for: a fault planted in the source makes its run fail.
"""

import pytest

from ..sampling import everyday

ORDERS = [(0, 1), (1, 2), (5, 3), (9, 132)]  # CUDA_ON_CPU_ORDER, CUDA_ON_CPU_PROCESSORS


def checksums(run_program, program, orders=ORDERS) -> set[str]:
    runs = [run_program(program, *order) for order in orders]
    for run in runs:
        assert run.returncode == 0, run.stderr[-3000:]
    return {run.stdout for run in runs}


def test_no_order_changes_a_bit(cuda_build, run_program):
    assert len(checksums(run_program, cuda_build.program("plain"))) == 1


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_a_sanitizer_finds_nothing(cuda_build, run_program, sanitizer):
    assert len(checksums(run_program, cuda_build.program(sanitizer), ORDERS[:2])) == 1


LOSS_BARRIER = ("cuda/ppo.cu", "  __syncthreads();\n", "", "ppo.cu")
PROJECTION_BARRIER = (
    "cuda/spectral.cu",
    "      __syncthreads();\n      for (int out",
    "      for (int out",
    "spectral.cu",
)
WRITE_BARRIER = ("cuda/spectral.cu", "    __syncthreads();  // before the next slab's weights\n", "", "spectral.cu")


@pytest.mark.parametrize("bug", everyday([(PROJECTION_BARRIER,), (LOSS_BARRIER,)], 1), ids=["projection", "loss"])
def test_a_missing_barrier_changes_results_with_the_order(cuda_build, run_program, bug):
    assert len(checksums(run_program, cuda_build.program("plain", bug))) > 1


@pytest.mark.parametrize("bug", everyday([(LOSS_BARRIER,), (WRITE_BARRIER,)], 1), ids=["loss", "write"])
def test_a_missing_barrier_is_a_race(cuda_build, run_program, bug):
    run = run_program(cuda_build.program("thread", bug), 0, 1)
    assert run.returncode != 0 and "data race" in run.stderr


@pytest.mark.parametrize(
    ("bug", "message"),
    everyday(
        [
            (
                (
                    "cuda/device.h",
                    "i < count) from_float(quad.v[i], to[i])",
                    "i <= count) from_float(quad.v[i], to[i])",
                    "gaussian.cu",
                ),
                "heap-buffer-overflow",
            ),
            (
                ("cuda/device.h", "if (count == 4 && is_packed(from))", "if (is_packed(from))", "gaussian.cu"),
                "heap-buffer-overflow",
            ),
            (("cuda/device.h", "if (count == 4 && is_packed(from))", "if (count == 4)", "gaussian.cu"), "misaligned"),
            (
                ("cuda/spectral.cu", "element < 0 || first + k >= end", "element < 0", "spectral.cu"),
                "heap-buffer-overflow",
            ),
        ],
        2,
    ),
    ids=["store bound off by one", "wide load past the tail", "wide load of a misaligned row", "slab bound left out"],
)
def test_an_access_out_of_bounds_is_reported(cuda_build, run_program, bug, message):
    run = run_program(cuda_build.program("address", bug), 0, 1)
    assert run.returncode != 0 and message in run.stderr


def test_a_barrier_that_not_all_threads_reach_is_refused(cuda_build, run_program):
    bug = ("cuda/ppo.cu", "  __syncthreads();\n", "  if (threadIdx.x < 32) __syncthreads();\n", "ppo.cu")
    run = run_program(cuda_build.program("plain", bug), 0, 1)
    assert run.returncode != 0 and "cuda_on_cpu: " in run.stderr
