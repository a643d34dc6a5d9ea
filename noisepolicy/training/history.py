"""Every image made so far, as the critic sees it: prompt, step count, action, a small picture and the reward.

The rows lie on disk and are read where a draw needs them, so neither memory nor the cost of a checkpoint grows with
them. RUN/history holds `header.json`, which says what a row is, and `rows.bin`: the rows one after another, each with
a CRC-32 of its own. A checkpoint remembers how many rows it had and their digest; rows beyond it are written again.

A prompt is its row in the run's `PromptStore`.
"""

import json
import os
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from noisepolicy.storage import DamagedFileError, write_json

_VERSION = 1
_BLOCK_BYTES = 2**24


class History:
    """A growing table of rows in a file.

    Args:
        folder: RUN/history; None is a file of this process' own that goes with it, for a process that is not the main.
        action_shape: of one action, float32.
        picture_shape: of one small picture, kept as float16.
        device: where drawn rows go, but for the prompts' rows, which stay on the CPU.
    """

    def __init__(
        self, folder: Path | None, action_shape: tuple[int, ...], picture_shape: tuple[int, ...], device: torch.device
    ) -> None:
        self.size = 0
        self._folder, self._device = folder, device
        columns = [
            ("prompt_row", "<i8", ()), ("step_index", "<i8", ()), ("reward", "<f4", ()),
            ("action", "<f4", action_shape), ("picture", "<f2", picture_shape),
        ]  # fmt: skip
        self._names = [name for name, _, _ in columns]
        self._row = np.dtype([*columns, ("crc32", "<u4")])
        self._body = self._row.itemsize - 4  # what the CRC is of
        self._header = {"version": _VERSION, "columns": [[*column[:2], list(column[2])] for column in columns]}
        self._digest = 0
        self._file: Any = None
        self._path = folder / "rows.bin" if folder else "this process' history"

    def append(self, **rows: torch.Tensor) -> None:
        """Adds a batch; one tensor for each column.

        Raises:
            OSError: if the disk is full; the rows before are as they were.
        """
        count = len(rows["reward"])
        table = np.empty(count, self._row)
        for name in self._names:
            table[name] = rows[name].cpu().numpy()
        data, digest = bytearray(table.tobytes()), self._digest
        for start in range(0, len(data), self._row.itemsize):
            crc = zlib.crc32(memoryview(data)[start : start + self._body]).to_bytes(4, "little")
            data[start + self._body : start + self._row.itemsize] = crc
            digest = zlib.crc32(crc, digest)
        if self._file is None:
            self._open()
        self._write(data, self.size)
        self.size, self._digest = self.size + count, digest

    def draw(self, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """`count` rows, uniformly and with replacement.

        Raises:
            DamagedFileError: if a row is not what was written.
        """
        index = torch.randint(self.size, (count,), generator=generator)
        size = self._row.itemsize
        data = bytearray(count * size)
        for place, row in enumerate(index.tolist()):
            piece = os.pread(self._file.fileno(), size, row * size)
            if len(piece) < size or zlib.crc32(piece[: self._body]) != int.from_bytes(piece[self._body :], "little"):
                raise DamagedFileError(f"row {row} of {self._path} is damaged")
            data[place * size : (place + 1) * size] = piece
        table = np.frombuffer(data, self._row)
        rows = {name: torch.from_numpy(np.ascontiguousarray(table[name])) for name in self._names}
        return {name: rows[name] if name == "prompt_row" else rows[name].to(self._device) for name in self._names}

    def state(self) -> dict[str, int]:
        """What a checkpoint holds of it. The rows are on the disk when this returns."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        return {"rows": self.size, "digest": self._digest}

    def load_state(self, state: dict[str, int], folder: Path) -> None:
        """Goes back to the rows of a checkpoint, and forgets those beyond them.

        Args:
            folder: RUN/history, which a process that is not the main copies.

        Raises:
            DamagedFileError: if they are not all there, as they were written.
        """
        try:
            header = json.loads((folder / "header.json").read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise DamagedFileError(f"{folder / 'header.json'} cannot be read ({error})") from error
        if header != self._header:
            raise DamagedFileError(f"{folder / 'header.json'} is not this run's: {header}")
        self.size = self._digest = 0
        if self._folder is None:
            self._file = None
            self._open()
        path = folder / "rows.bin"
        try:
            with open(path, "rb") as file:
                self._read(file, state["rows"])
        except OSError as error:
            raise DamagedFileError(f"{path} cannot be read ({error.strerror})") from error
        if self._digest != state["digest"]:
            raise DamagedFileError(f"{path} holds other rows than the checkpoint's")
        if self._folder is not None:
            self._open()

    def _read(self, file: Any, count: int) -> None:
        """Checks the first rows of a history's file, and copies them where this one is a process' own."""
        size = self._row.itemsize
        while self.size < count:
            data = file.read(min(count - self.size, max(1, _BLOCK_BYTES // size)) * size)
            if len(data) < size:
                raise DamagedFileError(f"{file.name} is cut short: {self.size} rows of {count}")
            for start in range(0, len(data) - size + 1, size):
                crc = data[start + self._body : start + size]
                if zlib.crc32(memoryview(data)[start : start + self._body]) != int.from_bytes(crc, "little"):
                    raise DamagedFileError(f"row {self.size} of {file.name} is damaged")
                self._digest = zlib.crc32(crc, self._digest)
                self.size += 1
            if self._folder is None:
                self._write(data, self.size - len(data) // size)

    def _write(self, data: bytes | bytearray, row: int) -> None:
        position, rest = row * self._row.itemsize, memoryview(data)
        while rest:
            written = os.pwrite(self._file.fileno(), rest, position)
            position, rest = position + written, rest[written:]

    def _open(self) -> None:
        """Opens the file to add to, without what lies beyond the rows there are."""
        if self._folder is None:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # as long as the run
            return
        write_json(self._folder / "header.json", self._header)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        self._file = open(descriptor, "r+b", buffering=0)  # noqa: SIM115
        os.ftruncate(descriptor, self.size * self._row.itemsize)
