"""The prompts of a run, read from files record by record where they are needed: memory holds 24 bytes for each."""

import os
import re
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from noisepolicy.training.prompt_files import FILE_SUFFIXES, open_prompt_file
from noisepolicy.training.prompt_records import read_prompts, text_of
from noisepolicy.training.prompt_streams import StreamedFile

_HUB = re.compile(r"hf:(?P<name>\w[\w.-]*/\w[\w.-]*)(:(?P<split>\S+))?")


def is_prompt_file(source: str) -> bool:
    """Tell whether the command line takes `source` for a file rather than for a prompt.

    It does so if there is such a file, or if `source` is a single word that ends like a file's name (`prompts.txt`),
    starts like a path (`./`, `../`, `/`, `~/`), is an address (`https://`), or names a place in a folder that exists.
    Several words must both start like a path and end like a file's name (`/my folder/prompts.txt`).
    """
    word = source.strip()
    if word and _exists(source):
        return True
    if is_hub_dataset(source):
        return False
    starts_like_path = word.startswith(("/", "./", "../", "~/"))
    ends_like_file = word.lower().endswith(FILE_SUFFIXES)
    if len(word.split()) != 1:
        return starts_like_path and ends_like_file
    is_in_folder = "/" in word and _exists(word.rpartition("/")[0])
    return starts_like_path or ends_like_file or "://" in word or is_in_folder


def is_hub_dataset(source: str) -> bool:
    """Tell whether `source` names a dataset of the hub: `hf:owner/name` or `hf:owner/name:split`."""
    return source.startswith("hf:") and len(source.split()) == 1


class PromptList(Sequence[str]):
    """The prompts of several sources. Prompts of text, JSON lines, CSV and TSV files stay on disk.

    The prompt of a record, such as a row of a table, is a `noisepolicy.prompt.Prompt`, whose `metadata` holds the
    record's other fields.

    Args:
        sources: Prompt files, datasets of the hub (`hf:owner/name`) and prompts; from Python also `datasets` datasets
            and any iterables of text or of records.
        column: Field or column that holds the prompt. Default: found by its usual names: prompt, prompts, caption,
            captions, text.

    Raises:
        ValueError: if a source cannot be read, holds no prompt, or holds something else. Reading an item raises it too
            if the file has changed since.
        RuntimeError: if the hub cannot be reached.
    """

    crc32: np.ndarray
    """Checksum of each prompt's text, uint32 `(prompts,)`."""

    def __init__(self, sources: Sequence[str | Iterable[Any]], column: str | None = None) -> None:
        self._sources: list[StreamedFile | list[str]] = []
        columns = array("I"), array("q"), array("I"), array("I"), array("I")
        for number, source in enumerate(sources):
            opened = _open(source, column)
            self._sources.append(opened)
            count = len(columns[0])
            for place, record, prompt in _held(opened) if isinstance(opened, list) else opened.records():
                crc = zlib.crc32(prompt.encode())
                row = number, place, len(record), zlib.crc32(record), crc
                for values, value in zip(columns, row, strict=True):
                    values.append(value)
            if len(columns[0]) == count:
                raise ValueError(f"{_named(opened)} holds no prompt")
        arrays = (np.frombuffer(values, values.typecode) for values in columns)
        self._source, self._start, self._length, self._record_crc32, self.crc32 = arrays

    def select(self, is_wanted: np.ndarray) -> "PromptList":
        """Return the prompts where `is_wanted`, bool `(prompts,)`, is true."""
        chosen = object.__new__(PromptList)
        chosen._sources = self._sources
        for name in ("_source", "_start", "_length", "_record_crc32", "crc32"):
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
        if isinstance(source, list):
            return source[self._start[index]]
        record = os.pread(source.file.fileno(), self._length[index], self._start[index])
        if zlib.crc32(record) != self._record_crc32[index]:
            raise ValueError(f"prompt file {source.file.name} was changed while it was in use")
        return source.parse(record)


def _open(source: str | Iterable[Any], column: str | None) -> StreamedFile | list[str]:
    if not isinstance(source, str):
        return read_prompts(source, column)
    if is_prompt_file(source):
        return open_prompt_file(Path(source if _exists(source) else source.strip()), column)
    if is_hub_dataset(source):
        return _read_hub(source, column)
    try:
        return [text_of(source)]
    except ValueError as error:
        raise ValueError(f"a {error}; give a text, a prompt file or a dataset") from None


def _held(prompts: list[str]) -> Iterator[tuple[int, bytes, str]]:
    return ((place, b"", prompt) for place, prompt in enumerate(prompts))


def _named(source: StreamedFile | list[str]) -> str:
    return "a list of prompts" if isinstance(source, list) else f"prompt file {source.file.name}"


def _read_hub(source: str, column: str | None) -> list[str]:
    match = _HUB.fullmatch(source.strip())
    if match is None:
        raise ValueError(f"a dataset of the hub is hf:owner/name or hf:owner/name:split, got {source}")
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise ValueError(f"{source} needs the package {error.name}: pip install 'noisepolicy[datasets]'") from error
    try:
        return read_prompts(load_dataset(match["name"], split=match["split"] or "train"), column, "row")
    except ConnectionError as error:
        raise RuntimeError(f"cannot read prompts from {source}: {_one_line(error)}") from error
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, ImportError, DatasetsError) as error:
        raise ValueError(f"cannot read prompts from {source}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    """Format an error with its cause on one line: `datasets` often says only that an error occurred."""
    return " ".join(f"{error} ({error.__cause__})".split() if error.__cause__ else str(error).split())


def _exists(source: str) -> bool:
    try:
        return Path(source).exists()
    except (OSError, ValueError):  # a long prompt, or one with a zero byte, is no name of a file
        return False
