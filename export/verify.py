"""Whether an engine computes what PyTorch does, with the numbers where it does not."""

from collections.abc import Callable, Mapping, Sequence

import torch

from noisepolicy.export.spec import Part

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""By what the engine computes in: the root mean square of the difference over that of PyTorch's output."""


class VerificationError(RuntimeError):
    """An engine is not to be used."""


class ShapeMismatch(VerificationError):  # noqa: N818  the name says it
    """An engine's output has another shape than PyTorch's."""


class OutputMismatch(VerificationError):  # noqa: N818
    """An engine's numbers are further from PyTorch's than its precision explains."""


@torch.no_grad()
def verify(
    part: Part,
    run: Callable[[Mapping[str, torch.Tensor]], torch.Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    batches: Sequence[int] = (1, 2, 5),
) -> float:
    """Compares an engine with the module it was exported from.

    Args:
        run: the engine, from inputs by name to output.
        dtype: what it computes in.
        batches: sizes to compare at, beside the sample's two.

    Returns:
        The largest relative difference met.

    Raises:
        ShapeMismatch, OutputMismatch: see there.
    """
    worst = 0.0
    for batch in batches:
        inputs = part.sample_inputs(batch)
        expected = part.module(*inputs.values()).float()
        output = run(inputs).to(expected.device).float()
        if output.shape != expected.shape:
            raise ShapeMismatch(
                f"{part.name} at batch {batch}: the engine gives {tuple(output.shape)}, PyTorch {tuple(expected.shape)}"
            )
        difference = ((output - expected).square().mean() / expected.square().mean().clamp(min=1e-20)).sqrt().item()
        if not difference <= TOLERANCE[dtype]:
            raise OutputMismatch(
                f"{part.name} at batch {batch}: the engine differs from PyTorch by {difference:.1e} (root mean square, "
                f"relative; largest single difference {(output - expected).abs().max().item():.1e}), tolerance "
                f"{TOLERANCE[dtype]:.0e} in {str(dtype).removeprefix('torch.')}"
            )
        worst = max(worst, difference)
    return worst
