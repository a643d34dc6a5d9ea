"""The ops under pytest-benchmark: `pytest benchmarks`. A group is an op at a size, with eager PyTorch in it."""

import pytest
import torch

from noisepolicy.benchmarks.kernels.cases import OPS, make_case
from noisepolicy.ops import available_backends
from noisepolicy.ops.dispatch import choose

_BATCH, _DIMS = 8, (16_384, 65_536)
_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("backend", [*available_backends(), "eager"])
@pytest.mark.parametrize("dim", _DIMS)
@pytest.mark.parametrize("op", OPS)
def test_op(op, dim, backend, benchmark):
    if backend != "eager":
        try:
            choose(backend, _DEVICE)
        except RuntimeError as error:
            pytest.skip(str(error))
    benchmark.group = f"{op}, batch {_BATCH}, dim {dim:,}, {_DEVICE.type}"
    case = make_case(op, _BATCH, dim, torch.float32, _DEVICE)

    def call() -> None:
        case.run(case.eager) if backend == "eager" else case.call(backend)
        if _DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=30, warmup_rounds=3)
