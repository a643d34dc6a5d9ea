"""Hostile calls of the ops through a build under sanitizers: `python native_fuzz.py LIBRARY CALLS SEED`.

Every call must return what the torch reference returns or raise; a crash, or anything a sanitizer reports, ends the
process. Prints how many calls did which.
"""

import importlib.util
import random
import sys
from collections import Counter

import noisepolicy


def use_library(path: str) -> None:
    """Puts the module of `path` in the place of the installed `noisepolicy._C`."""
    spec = importlib.util.spec_from_file_location("noisepolicy._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["noisepolicy._C"] = noisepolicy._C = module


use_library(sys.argv[1])

import torch  # noqa: E402  # after the module is in its place

from noisepolicy import ops  # noqa: E402

EDGES = (0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 63, 65, 255, 1023, 1024, 1025)
HUGE = (2**40, 2**62, 2**63 - 1)  # more than any machine holds: 2**31 elements would be computed
DTYPES = (torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.complex64)
REFUSALS = (ValueError, RuntimeError, TypeError, OverflowError, NotImplementedError, IndexError, AttributeError)
"""Errors that Python and torch raise for nonsense arguments; the ops' own checks raise the first two."""
NAMES = ("gaussian_sample", "spectral_sample", "gaussian_log_prob", "ppo_clip_loss", "ppo_ratio")
_MAX_ELEMENTS = 200_000


class Fuzzer:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def often(self, usual, *odd):
        return usual if self.random.random() < 0.85 else self.random.choice(odd)

    def shape(self, rank: int | None = None) -> tuple[int, ...]:
        rank = self.often(self.random.choice((2, 3, 4, 5)), 0, 1, 6) if rank is None else rank
        while True:
            sizes = tuple(self.random.choice(EDGES[: self.random.choice((6, 12, len(EDGES)))]) for _ in range(rank))
            if torch.Size(sizes).numel() <= _MAX_ELEMENTS:
                return sizes

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Make a tensor of about that shape: dense, transposed, strided, expanded, huge by strides, elsewhere."""
        kind = self.random.random()
        if kind < 0.03:
            # A view of one element, of as many as torch can count.
            return torch.zeros(1, dtype=dtype).expand(*[1] * (len(shape) - 1), self.random.choice(HUGE))
        if kind < 0.05:
            return torch.zeros(shape, dtype=dtype, device="meta")
        if kind < 0.07:
            return torch.zeros(shape, dtype=dtype).to_sparse()
        values = torch.randn(shape).to(dtype)
        if kind < 0.17 and values.ndim > 1:
            return values.transpose(0, -1).contiguous().transpose(0, -1)
        if kind < 0.27 and values.ndim:
            return torch.stack([values, values], -1)[..., 1]
        if kind < 0.32 and values.numel():
            return values.as_strided(shape, [0] * len(shape))
        if kind < 0.36 and values.numel():
            values.view(-1)[self.random.randrange(values.numel())] = (
                self.random.choice((float("inf"), -float("inf"), float("nan"), 1e4, -1e4))
                if dtype.is_floating_point
                else 0
            )
        return values

    def log_std(self, mean_shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        dtype = self.often(dtype, *DTYPES)
        kind = self.random.random()
        if kind < 0.2:
            return self.tensor((), dtype)
        if kind < 0.4:
            return self.tensor(mean_shape, dtype)
        if kind < 0.85:
            shape = tuple(self.random.choice((1, size)) for size in mean_shape)
            return self.tensor(shape[self.random.choice((0, 0, 1, len(shape))) :], dtype)
        return self.tensor(self.shape(), dtype)

    def counter(self) -> object:
        return self.often(
            self.random.randrange(2**64),
            -1,
            2**64,
            2**64 - 1,
            2**200,
            0.5,
            None,
            "7",
            float("nan"),
            True,
            torch.ones(()),
        )

    def row(self, shape: tuple[int, ...]) -> torch.Tensor:
        return self.often(torch.randn(shape[:1]), *(self.tensor(self.shape(), self.random.choice(DTYPES)),) * 2)

    def number(self) -> object:
        return self.often(
            self.random.random(), 0.0, -1.0, float("inf"), float("nan"), 3e38, 10**400, None, "x", torch.ones(2)
        )

    def case(self) -> tuple[str, tuple, dict]:
        dtype = self.random.choice(DTYPES)
        name = self.random.choice(
            ("gaussian_sample", "spectral_sample", "gaussian_log_prob", "ppo_clip_loss", "ppo_ratio")
        )
        if name == "spectral_sample":
            rank = self.random.choice((3, 4))
            bands = self.shape(rank)
            latent_shape = self.often(
                (*bands[:1], *(max(1, min(64, size + self.random.choice((0, 0, 1, 9)))) for size in bands[1:])),
                self.shape(),
                (4, -8, 8),
                (4, 8.5, 8),
                (4, 2**40, 2**40),
                (4, 2**63, 1),
                ("4", 8, 8),
                None,
                (),
                (True, 8, 8),
            )
            shape = (self.random.choice(EDGES[:6]), *bands)
            if torch.Size(shape).numel() > _MAX_ELEMENTS:
                shape = (1, *(min(size, 8) for size in bands))
            mean = self.tensor(shape, dtype)
            options = {"seed": self.counter(), "offset": self.counter(), "latent_shape": latent_shape}
            return name, (mean, self.log_std(shape, dtype)), options
        shape = self.shape()
        mean = self.tensor(shape, dtype)
        log_std = self.log_std(shape, dtype)
        if name == "gaussian_sample":
            return name, (mean, log_std), {"seed": self.counter(), "offset": self.counter()}
        latents = self.often(self.tensor(shape, torch.float32), self.tensor(self.shape(), self.random.choice(DTYPES)))
        if self.random.random() < 0.3 and mean.is_floating_point() and mean.layout == torch.strided:
            mean.requires_grad_()
        rows = (self.row(shape), self.row(shape))
        if name == "gaussian_log_prob":
            return name, (latents, mean, log_std), {}
        if name == "ppo_ratio":
            return name, (latents, mean, log_std, rows[0]), {}
        return name, (latents, mean, log_std, *rows), {"clip_range": self.number(), "kl_coef": self.number()}

    def registered_case(self) -> tuple[str, tuple]:
        """Call the op that torch.compile calls; anybody can call it with anything."""
        name, tensors, _ = self.case()
        name = "gaussian_log_prob" if name == "ppo_ratio" else name
        numbers = [self.often(self.random.randrange(-(2**63), 2**63), 2**63, -1) for _ in range(2)]
        if name == "gaussian_sample":
            return name, (*tensors, *numbers, "cpp")
        if name == "spectral_sample":
            bands = list(tensors[0].shape[2:])
            bands = self.often([1] * (3 - len(bands)) + bands, [8, 8], [0, 0, 0], [-1, 2, 2], [2**40] * 3)
            extent = self.often([max(size, 1) for size in bands], [1, 4, 4], [0, 0, 0], [2**40] * 3)
            return name, (*tensors, extent, bands, *numbers, "cpp")
        if name == "gaussian_log_prob":
            return self.random.choice(
                [(name, (*tensors[:3], "cpp")), ("gaussian_backward", (*tensors[:3], *self.rows(), True, "cpp"))]
            )
        return name, (*tensors, 0.2, 0.1, "cpp")

    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(self.random.choice(EDGES[:8])), torch.randn(self.random.choice(EDGES[:8]))


def call(name: str, tensors: tuple, options: dict) -> str:
    """`returned`, or the error's name; what is returned must be the reference's."""
    try:
        result = getattr(ops, name)(*tensors, backend="cpp", **options)
    except REFUSALS as error:
        return type(error).__name__
    first = result[0] if isinstance(result, tuple) else result
    if first.requires_grad:
        (first.sum() if first.ndim else first).backward()
    try:
        with torch.no_grad():
            expected = getattr(ops, name)(*tensors, backend="torch", **options)
    except Exception as error:
        shapes = [(tensor.shape, tensor.dtype, tensor.stride()) for tensor in tensors]
        raise SystemExit(f"{name} returned, the reference raised {error!r}: {shapes}, {options}") from error
    expected = expected[0] if isinstance(expected, tuple) else expected
    if not isinstance(expected, torch.Tensor) or expected.shape != first.shape:
        raise SystemExit(f"{name} returned {first.shape}, the reference {expected.shape}")
    return "returned"


def main() -> None:
    torch.set_num_threads(2)
    fuzzer, counts = Fuzzer(int(sys.argv[3])), Counter()
    for _ in range(int(sys.argv[2])):
        counts[call(*fuzzer.case())] += 1
        name, arguments = fuzzer.registered_case()
        try:
            getattr(torch.ops.noisepolicy, name)(*arguments)
            counts["op returned"] += 1
        except REFUSALS as error:
            counts[f"op {type(error).__name__}"] += 1
    print(dict(counts))


if __name__ == "__main__":
    main()
