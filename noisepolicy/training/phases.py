"""Where a run's seconds go."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("frozen_model", "reward", "policy")


class PhaseClock:
    """Adds up wall-clock seconds by phase; on CUDA it waits for the device, so a phase gets what it started."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._device = device

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._synchronize()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._synchronize()
            self.seconds[name] += time.perf_counter() - start

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
