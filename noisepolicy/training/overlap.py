"""Scoring while generating: the reward of one chunk in a thread, the next chunk's images in the caller's."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

_MAX_PENDING = 2  # chunks handed over before the caller waits: then one is scored while the next is made


class Scorer:
    """Scores chunks in the order they are added, by the same calls with and without a thread.

    Args:
        score: `(images, prompts)` to a tensor with one row an image.
        worker: of one thread; None scores at once.
    """

    def __init__(
        self, score: Callable[[torch.Tensor, Sequence[str]], torch.Tensor], worker: ThreadPoolExecutor | None
    ) -> None:
        self._score, self._worker = score, worker
        self._pending: deque[Future[torch.Tensor]] = deque()
        self._scores: list[torch.Tensor] = []

    def add(self, images: torch.Tensor, prompts: Sequence[str]) -> None:
        """Scores a chunk, or hands it to the thread and waits until that is one chunk behind at most.

        Raises whatever the reward raises, perhaps on an earlier chunk.
        """
        if self._worker is None:
            self._scores.append(self._score(images, prompts))
            return
        self._pending.append(self._worker.submit(torch.no_grad()(self._score), images, prompts))
        while len(self._pending) >= _MAX_PENDING:
            self._scores.append(self._pending.popleft().result())

    def finish(self) -> list[torch.Tensor]:
        """The scores of all chunks."""
        self._scores += [future.result() for future in self._pending]
        self._pending.clear()
        return self._scores


@contextmanager
def scoring(
    score: Callable[[torch.Tensor, Sequence[str]], torch.Tensor], *, is_overlapped: bool, device: torch.device
) -> Iterator[Scorer]:
    """A `Scorer`, with a thread of its own if `is_overlapped`."""
    if not is_overlapped:
        yield Scorer(score, None)
        return
    # A new thread's current device is the first one.
    start = {"initializer": torch.cuda.set_device, "initargs": (device,)} if device.type == "cuda" else {}
    worker = ThreadPoolExecutor(1, "reward", **start)
    try:
        yield Scorer(score, worker)
    finally:
        worker.shutdown(wait=False, cancel_futures=True)  # after an error elsewhere, the reward is not waited for
