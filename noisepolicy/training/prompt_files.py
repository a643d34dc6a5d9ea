"""Prompt files: text, JSON lines, JSON, CSV, TSV and Parquet. A file that fits none of them is refused."""

import csv
import io
import itertools
import json
import re
import reprlib
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from noisepolicy.training.prompt_records import (
    USUAL_COLUMNS,
    find_column,
    normalized,
    plain_columns,
    prompt_of,
    read_prompts,
    text_of,
)

_TEXT = ("", ".txt", ".text", ".list", ".lst", ".prompt", ".prompts", ".caption", ".captions")
_JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
_JSON = (".json", *_JSON_LINES)
_DELIMITER = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
_PARQUET = (".parquet", ".pq")
_OTHERS = (
    ".yaml", ".yml", ".toml", ".ini", ".md", ".html", ".xml", ".log", ".rtf", ".pdf", ".doc", ".docx", ".odt", ".xls",
    ".xlsx", ".ods", ".zip", ".tar", ".gz", ".bz2", ".xz", ".zst", ".7z", ".pkl", ".pickle", ".npy", ".npz", ".pt",
    ".pth", ".safetensors", ".arrow", ".feather", ".db", ".sqlite",
)  # fmt: skip
FILE_SUFFIXES = (*_TEXT[1:], *_JSON, *_DELIMITER, *_PARQUET, *_OTHERS)
"""Endings by which a single word is taken for the name of a file, whether there is one or not."""

_FORMATS = "text (.txt, one prompt a line), .jsonl, .json, .csv, .tsv or .parquet"
_SIGNATURES = {
    b"\xff\xfe": "is UTF-16; save it as UTF-8",
    b"\xfe\xff": "is UTF-16; save it as UTF-8",
    b"\x1f\x8b": "is compressed; unpack it first",
    b"BZh": "is compressed; unpack it first",
    b"\xfd7zXZ": "is compressed; unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed; unpack it first",
    b"PK\x03\x04": f"is a zip archive or an office document; save it as {_FORMATS}",
    b"%PDF": f"is a PDF; save it as {_FORMATS}",
}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MAX_LINE = 64 * 2**20
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_STARTS_LIKE_JSON = re.compile(r'\{\s*(["}]|$)|\[\s*(["{\]]|$)')


class StreamedFile(Protocol):
    """A prompt file that is read record by record, and again where a record is needed."""

    file: BinaryIO

    def records(self) -> Iterator[tuple[int, bytes, str]]:
        """Yields each record's place in the file, its bytes, and its prompt."""

    def parse(self, record: bytes) -> str:
        """Returns the prompt of a record's bytes."""


def open_prompt_file(path: Path, column: str | None) -> "StreamedFile | list[str]":
    """Opens a prompt file. What cannot be streamed (a JSON list, Parquet) is read at once.

    Args:
        path: its suffix says what it holds, unless the content shows that it is another of the formats.
        column: the field or column that holds the prompt. By default it is found by its usual names.

    Raises:
        ValueError: if it cannot be read, or is in none of the formats.
    """
    suffix = path.suffix.lower()
    if not any(suffix in suffixes for suffixes in (_TEXT, _JSON, _DELIMITER, _PARQUET)):
        _open(path).close()  # a missing file is said to be missing
        raise ValueError(f"cannot read prompts from {path}: a prompt file is {_FORMATS}; save or rename it")
    file = _open(path)
    start = file.read(8)
    file.seek(0)
    if start.startswith(b"PAR1"):
        return _read_whole(file, lambda: _read_parquet(file, column))
    if suffix in _PARQUET:
        raise ValueError(f"prompt file {path} is not Parquet")
    for signature, message in _SIGNATURES.items():
        if start.startswith(signature):
            raise ValueError(f"prompt file {path} {message}")
    first, second = _first_contents(file, has_comments=suffix in _TEXT)
    if not first:
        raise ValueError(f"prompt file {path} holds no prompt")
    if suffix in _JSON or _STARTS_LIKE_JSON.match(first) or (suffix in _TEXT and _is_json_strings(file, first)):
        if _is_document(first, second, is_lines=suffix in _JSON_LINES):
            return _read_whole(file, lambda: _read_json(file, column))
        return JsonLines(file, column)
    if suffix in _DELIMITER:
        return _open_table(file, _DELIMITER[suffix], column)
    _refuse_header(path, first, column)
    return TextFile(file)


def _open(path: Path) -> BinaryIO:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ValueError(f"cannot read prompt file {path}: it is a folder; name the files in it")
        if not stat.S_ISREG(mode):
            raise ValueError(
                f"prompt file {path} is a pipe or device; a run reads its prompts again when it is resumed"
            )
        return open(path, "rb")
    except FileNotFoundError:
        raise ValueError(f"cannot read prompt file {path}: no such file") from None
    except OSError as error:
        raise ValueError(f"cannot read prompt file {path}: {error.strerror}") from error


class _Lines:
    """Iterates over a file's lines as text, with line ends but no byte order mark.

    `start` and `data` are the place and the bytes of the lines since the last `begin_record`.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._position = file, 0
        self.number = 0
        """Of the last line, counted from 1."""
        file.seek(0)
        self.begin_record()

    def begin_record(self) -> None:
        self.start, self.data, self.first = self._position, b"", self.number + 1

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._file.readline(_MAX_LINE)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) == _MAX_LINE:
            raise self.error(f"is longer than {_MAX_LINE // 2**20} MB; is this a list of prompts?")
        start = self._position
        self._position += len(line)
        if not start and line.startswith(_BYTE_ORDER_MARK):
            line = line[len(_BYTE_ORDER_MARK) :]
            self.start = start = len(_BYTE_ORDER_MARK)
        if b"\0" in line:
            raise self.error("holds a zero byte, so it is not UTF-8 text")
        self.data = self.data + line if self.data else line
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"prompt file {self._file.name} is not UTF-8 (byte {start + error.start}); save it as UTF-8"
            ) from error

    def error(self, message: object, number: int | None = None) -> ValueError:
        """For a line; the last one if no other is named."""
        return ValueError(f"prompt file {self._file.name}, line {number or self.number}: {message}")


class TextFile:
    """One prompt a line. Blank lines, and those that start with #, are skipped."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def records(self) -> Iterator[tuple[int, bytes, str]]:
        lines = _Lines(self.file)
        for line in lines:
            text = line.strip()
            if text and text[0] != "#":
                if control := _CONTROL.search(text):
                    raise lines.error(f"holds the control character {control[0]!r}; is it text with line ends \\n?")
                if text[0] in "[{" and _STARTS_LIKE_JSON.match(text):
                    raise lines.error("starts like JSON, but the file's first line does not")
                record = text.encode()
                yield lines.start + len(line[: len(line) - len(line.lstrip())].encode()), record, text
            lines.begin_record()

    def parse(self, record: bytes) -> str:
        return record.decode()


class JsonLines:
    """A JSON string or object on each line. Blank lines are skipped.

    The first object says which field holds the prompt: all others must have it.
    """

    def __init__(self, file: BinaryIO, column: str | None) -> None:
        self.file, self._wanted = file, column
        self._column: str | None = None

    def records(self) -> Iterator[tuple[int, bytes, str]]:
        lines = _Lines(self.file)
        for line in lines:
            if line.strip():
                try:
                    prompt = self._prompt(line)
                except ValueError as error:
                    raise lines.error(error) from None
                yield lines.start, lines.data, prompt
            lines.begin_record()

    def parse(self, record: bytes) -> str:
        return self._prompt(record.decode())

    def _prompt(self, line: str) -> str:
        value = _loads(line)
        if not isinstance(value, dict):
            return text_of(value)
        if self._column is None:
            self._column = find_column(value, self._wanted)
        return prompt_of(value, self._column)


class Table:
    """CSV or TSV. The first row names the columns, and every other row has as many fields. Blank lines are skipped."""

    def __init__(self, file: BinaryIO, delimiter: str, column: str | None) -> None:
        self.file, self._delimiter = file, delimiter
        rows = self._rows(_Lines(file))
        self._names = [name.strip() for name in next(rows, [])]
        self._column = find_column(self._names, column)
        if twice := [name for name in self._names if name and self._names.count(name) > 1]:
            raise ValueError(f"two columns are named {twice[0]!r}")

    def records(self) -> Iterator[tuple[int, bytes, str]]:
        lines = _Lines(self.file)
        rows = self._rows(lines)
        next(rows)
        for row in rows:
            try:
                if len(row) != len(self._names):
                    raise ValueError(f"the row has {len(row)} fields, but the header has {len(self._names)}")
                prompt = self._prompt(row)
            except ValueError as error:
                raise lines.error(error, lines.first) from None
            yield lines.start, lines.data, prompt

    def parse(self, record: bytes) -> str:
        [row] = csv.reader(io.StringIO(record.decode()), delimiter=self._delimiter, strict=True)
        return self._prompt(row)

    def _rows(self, lines: _Lines) -> Iterator[list[str]]:
        reader = csv.reader(lines, delimiter=self._delimiter, strict=True)
        while True:
            lines.begin_record()
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise lines.error(error, lines.first) from None
            if len(row) > 1 or any(cell.strip() for cell in row):
                yield row

    def _prompt(self, row: list[str]) -> str:
        # Columns without a name are what spreadsheets leave at the edge of a table.
        return prompt_of({name: cell for name, cell in zip(self._names, row, strict=True) if name}, self._column)


def _open_table(file: BinaryIO, delimiter: str, column: str | None) -> Table:
    """With the delimiter that the header was written with, whatever the suffix promises."""
    problem = None
    for tried in dict.fromkeys((delimiter, *",\t;")):
        try:
            return Table(file, tried, column)
        except ValueError as error:
            problem = problem or error
    raise ValueError(f"prompt file {file.name}: {problem}; its first row must name the columns")


def _read_whole(file: BinaryIO, read: Callable[[], list[str]]) -> list[str]:
    with file:
        try:
            prompts = read()
        except ValueError as error:
            raise ValueError(f"prompt file {file.name}: {error}") from None
    if not prompts:
        raise ValueError(f"prompt file {file.name} holds no prompt")
    return prompts


def _read_json(file: BinaryIO, column: str | None) -> list[str]:
    """A list of strings or objects, or an object that holds one."""
    file.seek(0)
    value = _loads(file.read().removeprefix(_BYTE_ORDER_MARK).decode())
    return read_prompts(value, column)


def _read_parquet(file: BinaryIO, column: str | None) -> list[str]:
    """All its columns but those that hold bytes, such as pictures."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"reading Parquet needs {error.name}: pip install 'noisepolicy[datasets]'") from error
    try:
        table = parquet.ParquetFile(file)
        columns = plain_columns(table.schema_arrow, column)
        batches = (batch.to_pylist() for batch in table.iter_batches(columns=columns))
        return read_prompts(itertools.chain.from_iterable(batches), column, "row")
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"cannot read it as Parquet: {' '.join(str(error).split())}") from error


def _first_contents(file: BinaryIO, *, has_comments: bool) -> tuple[str, str]:
    """The first two lines that are not blank, without white space around them; empty where there is none."""
    contents = (line.strip() for line in _Lines(file))
    first, second, *_ = *itertools.islice((c for c in contents if c and not (has_comments and c[0] == "#")), 2), "", ""
    return first, second


def _is_json_strings(file: BinaryIO, first: str) -> bool:
    """Whether every line is in double quotes, as JSON writes them."""
    return first[0] == '"' and all(_is_json_string(line) for line in _Lines(file) if line.strip())


def _is_json_string(text: str) -> bool:
    try:
        return isinstance(_loads(text), str)
    except ValueError:
        return False


def _is_document(first: str, second: str, *, is_lines: bool) -> bool:
    """Whether the file is one JSON value over all its lines. A lone object on a line is a record in JSON lines only."""
    if first[0] != "{":
        return first[0] == "["
    try:
        _loads(first)
    except ValueError:
        return first == "{" or not is_lines
    return not second and not is_lines


def _refuse_header(path: Path, first: str, column: str | None) -> None:
    """Raises ValueError where the first line of a text file is the header of a table."""
    wanted = {*USUAL_COLUMNS, *([] if column is None else [normalized(column)])}
    for delimiter in ",\t;":
        for name in first.split(delimiter):
            if normalized(name.strip("\"' \t").rstrip(":")) in wanted:
                raise ValueError(
                    f"prompt file {path} starts with {reprlib.repr(first)}, as a table with a column {name.strip()!r} "
                    "does; rename it to .csv or .tsv, or put another line first"
                )


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"this is not JSON ({error})") from None
