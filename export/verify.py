"""The check that an engine computes the same as PyTorch in float32; errors have the numbers."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from noisepolicy.export.spec import Part

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Tolerance by the engine's dtype: root mean square of the difference over that of PyTorch's output."""


class VerificationError(RuntimeError):
    """Raised if an engine must not be used."""


class ShapeMismatch(VerificationError):  # noqa: N818  the name says it
    """Raised if an engine's output has another shape than PyTorch's."""


class OutputMismatch(VerificationError):  # noqa: N818
    """Raised if an engine's numbers are further from PyTorch's than its precision explains."""


def verify(
    part: Part,
    run: Callable[[Mapping[str, torch.Tensor]], torch.Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    batches: Sequence[int] = (1, 2, 5),
) -> float:
    """Compare an engine with the module it was exported from, which computes in float32 whatever its own dtype.

    Args:
        run: The engine: a function from inputs by name to the output.
        dtype: Precision of the engine, which determines the tolerance.
        batches: Batch sizes to compare at.

    Returns:
        The largest relative difference.

    Raises:
        VerificationError: if PyTorch itself gives NaN or infinity, so that nothing can be compared.
        ShapeMismatch, OutputMismatch: see there.
    """
    worst, precision = 0.0, str(dtype).removeprefix("torch.")
    for batch, (inputs, expected) in zip(batches, reference_outputs(part, batches), strict=True):
        where = f"{part.name} at batch {batch}"
        if not expected.isfinite().all():
            raise VerificationError(
                f"{where}: PyTorch itself gives NaN or infinity in float32, so no engine can be compared with it; the "
                "model's weights are damaged, or too large for the dtype it was loaded in"
            )
        output = run(inputs).to(expected.device).float()
        if output.shape != expected.shape:
            raise ShapeMismatch(f"{where}: the engine gives {tuple(output.shape)}, PyTorch {tuple(expected.shape)}")
        if not output.isfinite().all():
            advice = "" if dtype == torch.float32 else "; let the engine compute in float32 or, where it can, bfloat16"
            raise OutputMismatch(f"{where}: the engine gives NaN or infinity in {precision}, PyTorch numbers{advice}")
        difference = ((output - expected).square().mean() / expected.square().mean().clamp(min=1e-20)).sqrt().item()
        if not difference <= TOLERANCE[dtype]:
            raise OutputMismatch(
                f"{where}: the engine differs from PyTorch by {difference:.1e} (root mean square, relative; largest "
                f"single difference {(output - expected).abs().max().item():.1e}), tolerance {TOLERANCE[dtype]:.0e} in "
                f"{precision}"
            )
        worst = max(worst, difference)
    return worst


def reference_outputs(part: Part, batches: Sequence[int]) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Return sample inputs of each batch size and the part's outputs in float32, without TensorFloat-32.

    A part of another dtype is copied first. The copy is on the CPU if the GPU has no memory for it.
    """
    device = next(iter(part.inputs.values())).device
    try:
        return _outputs(part, batches, device)
    except torch.OutOfMemoryError:
        if device.type == "cpu":
            raise
    torch.cuda.empty_cache()
    return _outputs(part, batches, torch.device("cpu"))


@torch.no_grad()
def _outputs(
    part: Part, batches: Sequence[int], device: torch.device
) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    module, outputs = _in_float32(part.module, device), []
    with _exact_float32():
        for batch in batches:
            inputs = part.sample_inputs(batch)
            outputs.append((inputs, module(*(tensor.to(device, torch.float32) for tensor in inputs.values()))))
    return outputs


def _in_float32(module: nn.Module, device: torch.device) -> nn.Module:
    """Copy a module to float32; tensors that have this dtype and device already are shared."""
    memo: dict[int, torch.Tensor] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        copied = tensor.detach().to(device, dtype)
        memo[id(tensor)] = nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied
    own = copy.deepcopy(module, memo)
    for part in own.modules():
        if isinstance(part, nn.GroupNorm):
            # With channels last, a CPU adds up a group's numbers one after the other: an error of 1e-3 in 4 million.
            part.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    return own


@contextmanager
def _exact_float32() -> Iterator[None]:
    """Keep float32 products in float32: on recent GPUs PyTorch's convolutions use TensorFloat-32 by default."""
    backends = torch.backends
    if hasattr(backends.cuda.matmul, "fp32_precision"):  # torch 2.9; the older flags cannot be mixed with it
        places = (
            backends.cuda.matmul,
            backends.cudnn.conv,
            backends.cudnn.rnn,
            backends.mkldnn.matmul,
            backends.mkldnn.conv,
        )
        name, exact = "fp32_precision", "ieee"
    else:
        places, name, exact = (backends.cuda.matmul, backends.cudnn), "allow_tf32", False
    before = [getattr(place, name) for place in places]
    try:
        for place in places:
            setattr(place, name, exact)
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            setattr(place, name, value)
