"""Prompts of files, read line by line where they are needed: ten million take some 200 MB of memory."""

import os
import stat
import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, overload

import numpy as np

_SUFFIXES = (".txt", ".csv", ".json", ".jsonl", ".yaml", ".md")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class PromptList(Sequence[str]):
    """The prompts of files, one a line (blank lines are skipped), and those given as they are.

    Args:
        sources: UTF-8 files, and prompts.

    Raises:
        ValueError: if a file is missing, empty or not UTF-8, or, of an item, if its file has been changed since.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        self._sources: list[BinaryIO | str] = []
        columns = array("I"), array("q"), array("I"), array("I")
        for number, source in enumerate(sources):
            if _is_file(source) or source.endswith(_SUFFIXES) or ("/" in source and " " not in source):
                file = _open(Path(source))
                self._sources.append(file)
                found = False
                for start, prompt in _lines(file, source):
                    found = True
                    for column, value in zip(columns, (number, start, len(prompt), zlib.crc32(prompt)), strict=True):
                        column.append(value)
                if not found:
                    raise ValueError(f"prompt file {source} holds no prompt; expected one a line")
            elif prompt := source.strip():
                self._sources.append(prompt)
                for column, value in zip(columns, (number, 0, 0, zlib.crc32(prompt.encode())), strict=True):
                    column.append(value)
            else:
                raise ValueError("a prompt is empty; give a text, or a file of one prompt a line")
        arrays = (np.frombuffer(column, column.typecode) for column in columns)
        self._source, self._start, self._length, self.crc32 = arrays

    def select(self, is_wanted: np.ndarray) -> "PromptList":
        """Those of them where `is_wanted`, bool `(prompts,)`."""
        chosen = object.__new__(PromptList)
        chosen._sources = self._sources
        for name in ("_source", "_start", "_length", "crc32"):
            setattr(chosen, name, getattr(self, name)[is_wanted])
        return chosen

    def __len__(self) -> int:
        return len(self.crc32)

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        source = self._sources[self._source[index]]
        if isinstance(source, str):
            return source
        prompt = os.pread(source.fileno(), self._length[index], self._start[index])
        if zlib.crc32(prompt) != self.crc32[index]:
            raise ValueError(f"prompt file {source.name} was changed while it was in use")
        return prompt.decode()


def _is_file(source: str) -> bool:
    try:
        return Path(source).is_file()
    except OSError:  # a long prompt is no name of a file
        return False


def _open(path: Path) -> BinaryIO:
    try:
        file = open(path, "rb")  # noqa: SIM115  # as long as the list
    except OSError as error:
        raise ValueError(f"cannot read prompt file {path}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"prompt file {path} is a pipe or device; a run reads its prompts again when it is resumed")
    return file


def _lines(file: BinaryIO, source: str) -> Iterator[tuple[int, bytes]]:
    """Where each prompt begins, and the prompt."""
    position = 0
    for line in file:
        start = position + (len(_BYTE_ORDER_MARK) if not position and line.startswith(_BYTE_ORDER_MARK) else 0)
        try:
            text = line[start - position :].decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"prompt file {source} is not UTF-8 (byte {start + error.start}); save it as UTF-8"
            ) from error
        position += len(line)
        if prompt := text.strip():
            indent = text[: len(text) - len(text.lstrip())]
            yield start + len(indent.encode()), prompt.encode()
