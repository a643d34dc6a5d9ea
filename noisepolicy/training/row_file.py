"""Rows of one kind in a file that grows: read where they are needed, so that memory does not grow with them.

A folder holds `header.json`, which says what a row is, and `rows.bin`: the rows one after another, each with a CRC-32
of its own. A checkpoint remembers how many rows there were and their digest; rows beyond it are written again.
"""

import json
import os
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from noisepolicy.storage import DamagedFileError, write_json

_VERSION = 1
_BLOCK_BYTES = 2**24


class RowFile:
    """A growing table of rows in a file.

    Args:
        folder: Folder of the file. None makes a temporary file, for a process that is not the main one.
        columns: Name, NumPy type and shape of each column.
    """

    def __init__(self, folder: Path | None, columns: Sequence[tuple[str, str, tuple[int, ...]]]) -> None:
        self.size = 0
        self.folder, self.columns = folder, columns
        self._row = np.dtype([*columns, ("crc32", "<u4")])
        self._body = self._row.itemsize - 4  # what the CRC is of
        self._header = {"version": _VERSION, "columns": [[*column[:2], list(column[2])] for column in columns]}
        self._digest = 0
        self._file: Any = None
        self._path = folder / "rows.bin" if folder else "a file of this process' own"

    def append(self, count: int, rows: Mapping[str, np.ndarray]) -> None:
        """Add `count` rows, given as one array for each column.

        Raises:
            OSError: if the disk is full; earlier rows are unharmed.
        """
        table = np.empty(count, self._row)
        for name, _, _ in self.columns:
            table[name] = rows[name]
        data, digest = bytearray(table.tobytes()), self._digest
        for start in range(0, len(data), self._row.itemsize):
            crc = zlib.crc32(memoryview(data)[start : start + self._body]).to_bytes(4, "little")
            data[start + self._body : start + self._row.itemsize] = crc
            digest = zlib.crc32(crc, digest)
        if self._file is None:
            self._open()
        self._write(data, self.size)
        self.size, self._digest = self.size + count, digest

    def read(self, index: Sequence[int]) -> np.ndarray:
        """Read rows by their numbers, as an array with a field for each column.

        Raises:
            DamagedFileError: if a row is not as it was written.
        """
        size = self._row.itemsize
        data = bytearray(len(index) * size)
        for place, row in enumerate(index):
            piece = os.pread(self._file.fileno(), size, row * size)
            if len(piece) < size or zlib.crc32(piece[: self._body]) != int.from_bytes(piece[self._body :], "little"):
                raise DamagedFileError(f"row {row} of {self._path} is damaged")
            data[place * size : (place + 1) * size] = piece
        return np.frombuffer(data, self._row)

    def column(self, name: str) -> np.ndarray:
        """Read one column of all rows."""
        return np.memmap(self._file, self._row, "r", shape=(self.size,))[name].copy() if self.size else np.empty(0)

    def state(self) -> dict[str, int]:
        """Flush the rows to disk and return the state for a checkpoint."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        return {"rows": self.size, "digest": self._digest}

    def load_state(self, state: Mapping[str, int], folder: Path) -> None:
        """Go back to a checkpoint's rows, and forget later ones.

        Args:
            folder: Folder of the main process, whose file the others copy.

        Raises:
            DamagedFileError: if a row is missing or not as it was written.
        """
        if not isinstance(state, dict) or not all(type(state.get(name)) is int for name in ("rows", "digest")):
            raise DamagedFileError(f"the checkpoint does not say what {folder} held")
        try:
            header = json.loads((folder / "header.json").read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise DamagedFileError(f"{folder / 'header.json'} cannot be read ({error})") from error
        if header != self._header:
            raise DamagedFileError(f"{folder / 'header.json'} is not this run's: {header}")
        if self.folder is None:
            self._open()
        path = folder / "rows.bin"
        try:
            with open(path, "rb") as file:
                self._take(file, path, state["rows"], is_copied=self.folder is None)
        except OSError as error:
            raise DamagedFileError(f"{path} cannot be read ({error.strerror})") from error
        if self._digest != state["digest"]:
            raise DamagedFileError(f"{path} holds other rows than the checkpoint's")
        if self.folder is not None:
            self._open()

    def copy_from(self, other: "RowFile") -> None:
        """Replace the rows by those of another file."""
        self.size = 0
        self._open()
        other._file.seek(0)
        self._take(other._file, other._path, other.size, is_copied=True)

    def _take(self, file: Any, path: Path | str, count: int, *, is_copied: bool) -> None:
        """Check the first `count` rows of a file, and replace the rows by them."""
        size = self._row.itemsize
        self.size = self._digest = 0
        while self.size < count:
            data = file.read(min(count - self.size, max(1, _BLOCK_BYTES // size)) * size)
            num_rows = len(data) // size
            if not num_rows:
                raise DamagedFileError(f"{path} is cut short: {self.size} rows of {count}")
            for row in range(num_rows):
                start = row * size
                crc = data[start + self._body : start + size]
                if zlib.crc32(memoryview(data)[start : start + self._body]) != int.from_bytes(crc, "little"):
                    raise DamagedFileError(f"row {self.size + row} of {path} is damaged")
                self._digest = zlib.crc32(crc, self._digest)
            if is_copied:
                self._write(data[: num_rows * size], self.size)
            self.size += num_rows

    def _write(self, data: bytes | bytearray, row: int) -> None:
        position, rest = row * self._row.itemsize, memoryview(data)
        while rest:
            written = os.pwrite(self._file.fileno(), rest, position)
            position, rest = position + written, rest[written:]

    def _open(self) -> None:
        """Open the file for appending; cut off anything beyond the last row."""
        if self.folder is None:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # as long as the run
            return
        write_json(self.folder / "header.json", self._header)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        self._file = open(descriptor, "r+b", buffering=0)  # noqa: SIM115
        os.ftruncate(descriptor, self.size * self._row.itemsize)
