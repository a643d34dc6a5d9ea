"""Rows on disk, so that memory does not grow with a run: the embeddings of its prompts, and the images it has made.

A folder holds `header.json`, which says what a row is, and `rows.bin`: the rows one after another, each with a CRC-32
of its own. A checkpoint remembers how many rows there were and their digest; rows beyond it are written again.
"""

import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from noisepolicy.frozen import FrozenModel, PromptEmbeds
from noisepolicy.policies.networks import plain_arithmetic
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

    def append(self, **rows: np.ndarray | torch.Tensor) -> None:
        """Add rows, given as one array or tensor for each column.

        Raises:
            OSError: if the disk is full; earlier rows are unharmed.
        """
        count = len(rows[self.columns[0][0]])
        table = np.empty(count, self._row)
        for name, _, _ in self.columns:
            values = rows[name]
            table[name] = values.cpu().numpy() if isinstance(values, torch.Tensor) else values
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

    def take_over(self, other: "RowFile") -> None:
        """Replace the rows by those of another file, and close that one."""
        self.size = 0
        self._open()
        other._file.seek(0)
        self._take(other._file, other._path, other.size, is_copied=True)
        other._file.close()

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


class History(RowFile):
    """The rows that a critic is trained on.

    Args:
        folder: RUN/history; None for a process that is not the main one.
        action_shape: Shape of one action, float32.
        picture_shape: Shape of one small picture, kept as float16.
        num_parts: Number of parts of the reward. They are kept as float64 before they are weighted, since the scale
            that brings them to one unit changes during a run.
        device: Device of drawn rows, except for the prompts' row numbers, which stay on the CPU.
    """

    def __init__(
        self,
        folder: Path | None,
        action_shape: tuple[int, ...],
        picture_shape: tuple[int, ...],
        num_parts: int,
        device: torch.device,
    ) -> None:
        self._device = device
        columns = [
            ("prompt_row", "<i8", ()),
            ("step_index", "<i8", ()),
            ("parts", "<f8", (num_parts,)),
            ("action", "<f4", action_shape),
            ("picture", "<f2", picture_shape),
        ]
        super().__init__(folder, columns)

    def draw(self, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Draw `count` rows, uniformly and with replacement.

        Raises:
            DamagedFileError: if a row is not as it was written.
        """
        table = self.read(torch.randint(self.size, (count,), generator=generator).tolist())
        rows = {name: torch.from_numpy(np.ascontiguousarray(table[name])) for name, _, _ in self.columns}
        return {name: rows[name] if name == "prompt_row" else rows[name].to(self._device) for name in rows}


class PromptStore:
    """Rows of embeddings, in the order in which their prompts were met.

    Args:
        frozen: The frozen model, which encodes prompts.
        prompts: All prompts of the run.
        device: Device of selected rows.
    """

    def __init__(self, frozen: FrozenModel, prompts: Sequence[str], device: torch.device) -> None:
        self._frozen, self._prompts, self._device = frozen, prompts, device
        self._row_of: dict[int, int] = {}
        self._no_rows: PromptEmbeds | None = None
        """Empty tensors with the types and shapes of rows, once there is a row."""
        self._rows: RowFile | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape `(tokens, width)` of a prompt's embeddings, known once a prompt was met."""
        return tuple(self._no_rows.prompt_embeds.shape[1:])

    def __len__(self) -> int:
        """Return the number of prompts met so far."""
        return len(self._row_of)

    def add(self, prompt_index: Iterable[int]) -> torch.Tensor:
        """Encode the prompts that were not met yet, together; return each index's row, int64."""
        index = list(prompt_index)
        if new := [i for i in dict.fromkeys(index) if i not in self._row_of]:
            with plain_arithmetic():
                embeds = self._frozen.encode([self._prompts[i] for i in new]).to(torch.device("cpu"))
            if self._rows is None:
                self._no_rows = embeds[:0]
                self._rows = self._file(None)
            columns = {name: _as_bytes(tensor) for name, tensor in embeds.tensors().items()}
            self._rows.append(prompt=np.array(new), **columns)
            self._row_of |= {i: len(self) + number for number, i in enumerate(new)}
        return torch.tensor([self._row_of[i] for i in index])

    def __getitem__(self, rows: torch.Tensor) -> PromptEmbeds:
        """Return embeddings of some rows, `(len(rows), ...)`, on the store's device."""
        table = self._rows.read(rows.tolist())
        return PromptEmbeds.of(
            {
                name: torch.from_numpy(table[name].copy()).view(like.dtype).view(len(rows), *like.shape[1:])
                for name, like in self._no_rows.tensors().items()
            }
        ).to(self._device)

    def keep(self, folder: Path) -> None:
        """Keep the rows in `folder`, RUN/prompts, from now on; in the main process only."""
        if self._rows.folder is None:
            kept = self._file(folder)
            kept.take_over(self._rows)
            self._rows = kept

    def state(self) -> dict[str, int]:
        """Flush the rows to disk and return the state for a checkpoint."""
        return self._rows.state()

    def load_state(self, state: Mapping[str, int], folder: Path, *, is_main: bool) -> None:
        """Go back to a checkpoint's rows in `folder`, and forget later ones.

        Raises:
            DamagedFileError: if a row is missing or not as it was written; the store is unchanged then.
        """
        rows = self._file(folder if is_main else None)
        rows.load_state(state, folder)
        self._rows = rows
        self._row_of = {int(i): row for row, i in enumerate(rows.column("prompt"))}

    def _file(self, folder: Path | None) -> RowFile:
        columns = [(name, "u1", (_width(tensor),)) for name, tensor in self._no_rows.tensors().items()]
        return RowFile(folder, [("prompt", "<i8", ()), *columns])


def _width(tensor: torch.Tensor) -> int:
    """Return the bytes of a row."""
    return tensor[:1].new_empty(1, *tensor.shape[1:]).nbytes


def _as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """View rows as `(rows, bytes)`."""
    return tensor.detach().reshape(len(tensor), -1).contiguous().view(torch.uint8).numpy()
