"""Muon (Jordan, https://kellerjordan.github.io/posts/muon): momentum with orthogonalised steps, for matrices.

AdamW's steps on a convolution have few large singular values. Here all of them are about 1, so a step moves every
direction, and as many steps teach a sketch more.
"""

from collections.abc import Iterable

import torch

_MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that brings singular values to about 1 in five iterations


class Muon(torch.optim.Optimizer):
    """An optimizer of weights whose first axis counts outputs: linear layers and convolutions.

    Args:
        parameters: The weights.
        lr: Length of a step in each direction.
        weight_decay: Decay of the weights, in units of `lr`.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], *, lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Take one step with the gradients of the weights."""
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"].lerp_(weight.grad, 1 - _MOMENTUM)
                step = _orthogonalised(weight.grad.lerp(momentum, _MOMENTUM).flatten(1)).view_as(weight)
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(step, alpha=group["lr"])


def _orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """Bring a matrix's singular values to about 1, by a Newton-Schulz iteration in float32."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.mT if is_tall else matrix
    wide = wide / (wide.norm() + 1e-7)
    first, third, fifth = _COEFFICIENTS
    for _ in range(5):
        square = wide @ wide.mT
        wide = first * wide + (third * square + fifth * square @ square) @ wide
    return wide.mT if is_tall else wide
