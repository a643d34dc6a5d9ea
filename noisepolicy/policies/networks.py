"""The parts that the networks of policies and critics share.

They are float32 and compute in float32, whatever the code around them computes in.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

_Function = TypeVar("_Function", bound=Callable[..., Any])


def without_autocast(method: _Function) -> _Function:
    """Decorate a module's method, so that `torch.autocast` around a call has no effect on it."""

    @functools.wraps(method)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        device_type = next(self.parameters()).device.type
        if not torch.is_autocast_enabled(device_type):
            return method(self, *args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            return method(self, *args, **kwargs)

    return call


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Compute as written and with gradients, whatever autocast, gradient or inference mode the caller is in."""
    no_autocast = [torch.autocast(device_type, enabled=False) for device_type in ("cpu", "cuda")]
    with torch.inference_mode(False), torch.enable_grad(), no_autocast[0], no_autocast[1]:
        yield


def multiplies_bfloat16(device: torch.device) -> bool:
    """Tell whether a device has instructions for products of bfloat16; elsewhere they are slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Make float32 the default dtype, and leave inference mode, for the tensors that are made within."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False):
            yield
    finally:
        torch.set_default_dtype(default)


class Float32Module(nn.Module):
    """A module whose parameters and buffers are made in float32 and stay float32, and can be trained.

    Neither torch's default dtype nor `torch.inference_mode` around a subclass's constructor has an effect on them.

    Raises:
        ValueError: from `.half()`, `.to(dtype)` and the like.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = float32_by_default()(cls.__init__)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "Float32Module":
        # What `.half()`, `.to()`, `.cuda()` and the others do to every tensor, tried on an empty one.
        dtype = fn(torch.empty(0, dtype=torch.float32)).dtype
        if dtype != torch.float32:
            raise ValueError(
                f"{type(self).__name__} computes in float32 and cannot be made {dtype}; it takes prompt embeddings of "
                "any dtype, so move it with .to(device) alone"
            )
        return super()._apply(fn, recurse)


class PromptReader(nn.Module):
    """Projects each token by one shared layer, lays the results side by side in order, and applies an MLP.

    Pooling would make "a red circle left of a blue square" and "a blue square left of a red circle" nearly alike for
    text encoders that are not causal; a token's place in the row tells them apart. `(batch, tokens, width)` becomes
    `(batch, hidden)`.
    """

    def __init__(self, prompt_shape: tuple[int, int], *, token_width: int, hidden_width: int) -> None:
        super().__init__()
        num_tokens, width = prompt_shape
        self.token = nn.Linear(width, token_width)
        self.body = nn.Sequential(
            nn.Linear(num_tokens * token_width, hidden_width),
            nn.SiLU(),
            nn.Linear(hidden_width, hidden_width),
            nn.SiLU(),
        )

    def forward(self, prompt_embeds: torch.Tensor) -> torch.Tensor:
        return self.body(self.token(prompt_embeds.float()).flatten(1))


class StackedLinear(nn.Module):
    """`size` linear layers side by side: `(size, ..., in_features)` to `(size, ..., out_features)`."""

    def __init__(self, size: int, in_features: int, out_features: int) -> None:
        super().__init__()
        bound = in_features**-0.5  # as in nn.Linear
        self.weight = nn.Parameter(torch.empty(size, in_features, out_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(size, 1, out_features).uniform_(-bound, bound))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        out = torch.baddbmm(self.bias, rows.flatten(1, -2), self.weight)
        return out.unflatten(1, rows.shape[1:-1])


def power_preserving(shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `mean` and `log_std` of `(shift + e) / sqrt(1 + mean(shift^2))`, e ~ N(0, 1): rows keep the prior's power.

    A mean added to noise of std 1 makes it louder than any noise the model was trained on; few steps forgive that,
    many do not. KL to the prior is `elements * log(1 + mean(shift^2)) / 2`.

    Args:
        shift: `(batch, ...)`

    Returns:
        mean of the same shape, and log_std with one value a row.
    """
    log_std = -0.5 * torch.log1p((shift**2).mean(tuple(range(1, shift.ndim)), keepdim=True))
    return shift * log_std.exp(), log_std


@torch.no_grad()
def averaged(average: nn.Module, network: nn.Module, decay: float, number: int) -> None:
    """Move the average towards the network's weights after step `number`, from 0."""
    # Faster at the start, where the weights of ten steps ago are of no use yet.
    decay = min(decay, (1 + number) / (10 + number))
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
