"""Prompt files that are read record by record: text, JSON lines, CSV and TSV."""

import csv
import io
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, Protocol

from noisepolicy.training.prompt_records import find_column, prompt_of, text_of

STARTS_LIKE_JSON = re.compile(r'\{\s*(["}]|$)|\[\s*(["{\]]|$)')
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MAX_LINE = 64 * 2**20
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


class StreamedFile(Protocol):
    """A prompt file that is read record by record; a record can be read again later."""

    file: BinaryIO

    def records(self) -> Iterator[tuple[int, bytes, str]]:
        """Yield each record's place in the file, its bytes, and its prompt."""

    def parse(self, record: bytes) -> str:
        """Return the prompt of a record's bytes."""


class Lines:
    """Iterates over a file's lines as text, with line ends but no byte order mark.

    `start` and `data` are the place and the bytes of the lines since the last `begin_record`.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._position = file, 0
        self.number = 0
        """Number of the line read last, counted from 1."""
        file.seek(0)
        self.begin_record()

    def begin_record(self) -> None:
        self.start, self.data, self.first = self._position, b"", self.number + 1

    def __iter__(self) -> "Lines":
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
        if not start and line.startswith(BYTE_ORDER_MARK):
            line = line[len(BYTE_ORDER_MARK) :]
            self.start = start = len(BYTE_ORDER_MARK)
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
        """Make an error about a line; by default, the line read last."""
        return ValueError(f"prompt file {self._file.name}, line {number or self.number}: {message}")


class TextFile:
    """One prompt a line. Blank lines, and those that start with #, are skipped."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def records(self) -> Iterator[tuple[int, bytes, str]]:
        lines = Lines(self.file)
        for line in lines:
            text = line.strip()
            if text and text[0] != "#":
                if control := _CONTROL.search(text):
                    raise lines.error(f"holds the control character {control[0]!r}; is it text with line ends \\n?")
                if text[0] in "[{" and STARTS_LIKE_JSON.match(text):
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
        lines = Lines(self.file)
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
        value = load_json(line)
        if not isinstance(value, dict):
            return text_of(value)
        if self._column is None:
            self._column = find_column(value, self._wanted)
        return prompt_of(value, self._column)


class Table:
    """CSV or TSV. The first row names the columns, and every other row has as many fields. Blank lines are skipped."""

    def __init__(self, file: BinaryIO, delimiter: str, column: str | None) -> None:
        self.file = file
        self._format: dict[str, Any] = {"delimiter": delimiter, "strict": True}
        try:
            rows = csv.reader(Lines(file), **self._format)
            header = next((row for row in rows if not _is_blank(row)), None)
        except csv.Error as error:
            raise ValueError(f"its first row cannot be read ({error})") from None
        if header is None:
            raise ValueError("it holds no prompt")
        self._names = [name.strip() for name in header]
        self._column = find_column(self._names, column)
        if twice := [name for name in self._names if name and self._names.count(name) > 1]:
            raise ValueError(f"two columns are named {twice[0]!r}")
        if delimiter == "\t" and not self._is_quoted():
            self._format["quoting"] = csv.QUOTE_NONE

    def records(self) -> Iterator[tuple[int, bytes, str]]:
        lines = Lines(self.file)
        rows = self._rows(lines)
        next(rows)
        for row in rows:
            try:
                if len(row) != len(self._names):
                    raise ValueError(f"the row has {len(row)} fields, but the header has {len(self._names)}")
                if "quoting" in self._format and any(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in row):
                    raise ValueError("double quotes enclose a field here, but are text in another row")
                prompt = self._prompt(row)
            except ValueError as error:
                raise lines.error(error, lines.first) from None
            yield lines.start, lines.data, prompt

    def _is_quoted(self) -> bool:
        """Tell whether double quotes enclose fields. In many TSV files they are text, like any other character."""
        try:
            return not any("\t" in cell for row in csv.reader(Lines(self.file), **self._format) for cell in row)
        except csv.Error:
            return False

    def parse(self, record: bytes) -> str:
        [row] = csv.reader(io.StringIO(record.decode()), **self._format)
        return self._prompt(row)

    def _rows(self, lines: Lines) -> Iterator[list[str]]:
        reader = csv.reader(lines, **self._format)
        while True:
            lines.begin_record()
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise lines.error(error, lines.first) from None
            if not _is_blank(row):
                yield row

    def _prompt(self, row: list[str]) -> str:
        # Columns without a name are what spreadsheets leave at the edge of a table.
        return prompt_of({name: cell for name, cell in zip(self._names, row, strict=True) if name}, self._column)


def _is_blank(row: list[str]) -> bool:
    return len(row) < 2 and not "".join(row).strip()


def load_json(text: str) -> Any:
    """Parse JSON; raise ValueError with the reason on one line if it is none."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"this is not JSON ({error})") from None
