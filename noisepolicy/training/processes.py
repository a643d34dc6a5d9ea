"""The processes of a run: how they exchange values, and name the one that is missing.

An image's action, reward and small picture are all that processes exchange, so it goes through the host's memory by
gloo, whatever device the images are made on. Every meeting has a name and a time limit.
"""

import hashlib
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.distributed_c10d import _get_default_store

_group_numbers = itertools.count()


class Processes:
    """The meetings of all processes. Every process makes one object and calls its methods in the same order.

    Args:
        accelerator: Accelerate's object, which has started torch.distributed if there are several processes.
        timeout_s: Seconds to wait for the other processes.

    If some processes do not come in time, every method raises RuntimeError, naming their ranks.
    """

    def __init__(self, accelerator: Accelerator, timeout_s: float) -> None:
        self.index, self.count = accelerator.process_index, accelerator.num_processes
        self.bytes_received = 0
        """Bytes of rows and gradients received from all processes, including this one."""
        self._timeout_s = timeout_s
        self._num_meetings = 0
        if self.count == 1:
            return
        limit = timedelta(seconds=timeout_s)
        self._store = dist.PrefixStore(f"noisepolicy/{next(_group_numbers)}", _get_default_store())
        self._group = dist.new_group(backend="gloo", timeout=limit)
        if accelerator.device.type == "cuda":
            # Each process makes the same update for itself, to the bit.
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.index == 0

    def wait(self, phase: str) -> None:
        """Wait until every process has come."""
        self.exchange(phase, None)

    def broadcast(self, phase: str, value: Any) -> Any:
        """Return the main process's `value`; the others may pass None."""
        if self.count == 1:
            return value
        box = [value]
        self._meet(phase, lambda: dist.broadcast_object_list(box, src=0, group=self._group))
        return box[0]

    def gather_rows(
        self, phase: str, rows: torch.Tensor, columns: Sequence[torch.Tensor], *, counts: Sequence[int]
    ) -> list[torch.Tensor]:
        """Gather a batch's columns in the order of its rows, of which each process has some.

        Args:
            rows: Numbers of this process's rows, int64 `(mine,)` on the CPU. Those of all processes are 0, 1, 2, ...
            columns: This process's columns, `(mine, ...)`, on any device.
            counts: Number of rows of each process.

        Raises:
            RuntimeError: if a row came twice or not at all.
        """
        batch = sum(counts)
        if self.count == 1:
            _check_rows(rows.tolist(), batch, phase)
            order = rows.argsort()
            return [column[order.to(column.device)] for column in columns]
        records = torch.cat([_as_bytes(column) for column in (rows, *columns)], 1)
        padded = records.new_zeros(max(counts), records.shape[1])
        padded[: len(records)] = records
        parts = [torch.empty_like(padded) for _ in counts]
        self._meet(phase, lambda: dist.all_gather(parts, padded, group=self._group))
        self.bytes_received += self.count * padded.numel()
        records = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
        widths = [_as_bytes(column[:0]).shape[1] for column in (rows, *columns)]
        numbers, *gathered = (part.contiguous() for part in records.split(widths, 1))
        numbers = numbers.view(torch.int64)[:, 0]
        _check_rows(numbers.tolist(), batch, phase)
        order = numbers.argsort()
        return [
            part[order].view(column.dtype).view(batch, *column.shape[1:]).to(column.device)
            for part, column in zip(gathered, columns, strict=True)
        ]

    def sum_parts(self, phase: str, mine: torch.Tensor, num_parts: int) -> torch.Tensor:
        """Sum `num_parts` vectors in the order of their numbers, to the bit the same whoever has made them.

        Each process sums a slice of all vectors, so it sends and receives about as much as two vectors of its own.

        Args:
            mine: This process's vectors `(mine, length)`: numbers `index`, `index + count`, ... of them.

        Returns:
            `(length,)`, in all processes.
        """
        if self.count == 1:
            return _sum_in_order(mine)
        most, width = -(-num_parts // self.count), -(-mine.shape[1] // self.count)
        padded = mine.new_zeros(most, self.count * width)
        padded[: len(mine), : mine.shape[1]] = mine
        sent = padded.view(most, self.count, width).transpose(0, 1).contiguous()
        received, totals = torch.empty_like(sent), mine.new_empty(self.count, width)
        # On GPUs the default group is NCCL's, which does not go through the host.
        group = self._group if mine.device.type == "cpu" else dist.group.WORLD

        def exchange() -> None:
            dist.all_to_all_single(received, sent, group=group)
            total = _sum_in_order(received.transpose(0, 1).flatten(0, 1)[:num_parts])
            dist.all_gather(list(totals), total, group=group)

        self._meet(phase, exchange)
        self.bytes_received += (received.numel() + totals.numel()) * mine.element_size()
        return totals.flatten()[: mine.shape[1]]

    def check_same_weights(self, module: torch.nn.Module, phase: str) -> None:
        """Raise RuntimeError, naming ranks, if a process's weights differ from those of most by a single bit."""
        if self.count == 1:
            return
        digest = hashlib.blake2b(digest_size=8)
        for value in module.state_dict().values():
            digest.update(_as_bytes(value.detach().reshape(1, -1)).numpy())
        digests = self.exchange(phase, digest.hexdigest())
        most, _ = Counter(digests).most_common(1)[0]  # the main process's where there are as many
        if odd := [rank for rank, other in enumerate(digests) if other != most]:
            raise RuntimeError(
                f"{_name(odd)} drifted apart at {phase}: its policy differs from that of the other processes; "
                "all must run the same versions, on processors or GPUs of one kind, with as many threads"
            )

    def exchange(self, phase: str, value: Any) -> list[Any]:
        """Return every process's `value`, in all processes."""
        if self.count == 1:
            return [value]
        values = [None] * self.count
        self._meet(phase, lambda: dist.all_gather_object(values, value, group=self._group))
        return values

    def collect(self, phase: str, value: Any) -> list[Any] | None:
        """Return every process's `value` in the main process, and None in the others."""
        if self.count == 1:
            return [value]
        values = [None] * self.count if self.is_main else None
        self._meet(phase, lambda: dist.gather_object(value, values, dst=0, group=self._group))
        return values

    def _meet(self, phase: str, exchange: Callable[[], Any]) -> None:
        self._num_meetings += 1
        start = time.monotonic()
        try:
            self._store.set(str(self.index), str(self._num_meetings))
            exchange()
        except RuntimeError as error:
            raise RuntimeError(self._explain(phase, time.monotonic() - start, error)) from error

    def _explain(self, phase: str, waited_s: float, error: RuntimeError) -> str:
        self._store.set_timeout(timedelta(seconds=10))
        try:
            missing = [
                rank
                for rank in range(self.count)
                if not self._store.check([str(rank)]) or int(self._store.get(str(rank))) < self._num_meetings
            ]
        except RuntimeError:
            return f"rank 0, which holds the others together, did not answer in {phase}"
        if not missing:
            return f"{phase}: the connection between processes broke: {error}"
        how = f"within {self._timeout_s:g} s" if waited_s > 0.9 * self._timeout_s else "before its process ended"
        return f"{_name(missing)} did not reach {phase} {how}"


def _sum_in_order(vectors: torch.Tensor) -> torch.Tensor:
    """Sum `(count, length)` over its rows, one after another."""
    total = vectors[0].clone()
    for vector in vectors[1:]:
        total += vector
    return total


def _as_bytes(rows: torch.Tensor) -> torch.Tensor:
    """View a tensor as `(rows, bytes)`, uint8 on the CPU."""
    width = math.prod(rows.shape[1:])  # -1 says nothing of no rows
    return rows.detach().cpu().reshape(len(rows), width).contiguous().view(torch.uint8)


def _check_rows(numbers: Sequence[int], batch: int, phase: str) -> None:
    times = Counter(numbers)
    if wrong := sorted(row for row in {*range(batch), *times} if times[row] != (1 if row < batch else 0)):
        told = ", ".join(f"row {row} came {times[row]} times" for row in wrong[:4])
        raise RuntimeError(f"{phase}: {told}; each of {batch} rows is made once")


def _name(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
