"""Prompt files: text, JSON lines, JSON, CSV, TSV and Parquet. A file that fits none of them is refused."""

import itertools
import reprlib
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from noisepolicy.training.prompt_records import USUAL_COLUMNS, normalized, plain_columns, read_prompts
from noisepolicy.training.prompt_streams import (
    BYTE_ORDER_MARK,
    STARTS_LIKE_JSON,
    JsonLines,
    Lines,
    StreamedFile,
    Table,
    TextFile,
    load_json,
)

_TEXT = ("", ".txt", ".text", ".list", ".lst", ".prompt", ".prompts", ".caption", ".captions")
_JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
_JSON = (".json", *_JSON_LINES)
_DELIMITER = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
_PARQUET = (".parquet", ".pq")
_OTHERS = (
    *(".yaml", ".yml", ".toml", ".ini", ".md", ".html", ".xml", ".log"),
    *(".rtf", ".pdf", ".doc", ".docx", ".odt", ".xls", ".xlsx", ".ods"),
    *(".zip", ".tar", ".gz", ".bz2", ".xz", ".zst", ".7z"),
    *(".pkl", ".pickle", ".npy", ".npz", ".pt", ".pth", ".safetensors", ".arrow", ".feather", ".db", ".sqlite"),
)
FILE_SUFFIXES = (*_TEXT[1:], *_JSON, *_DELIMITER, *_PARQUET, *_OTHERS)
"""Suffixes of prompt files. A single word that ends in one is a file's name, whether the file exists or not."""

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


def open_prompt_file(path: Path, column: str | None) -> "StreamedFile | list[str]":
    """Open a prompt file. A file that cannot be streamed (a JSON list, Parquet) is read at once.

    Args:
        path: The file. Its suffix tells the format, unless the content shows another one.
        column: Field or column that holds the prompt. Default: found by its usual names.

    Raises:
        ValueError: if the file cannot be read, or is in none of the formats.
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
    if suffix in _JSON or STARTS_LIKE_JSON.match(first) or (suffix in _TEXT and _is_json_strings(file, first)):
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


def _open_table(file: BinaryIO, delimiter: str, column: str | None) -> Table:
    """Open a table with the first delimiter that gives the prompt's column; the suffix tells the likeliest one."""
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
    """Read a list of strings or objects, or an object that holds such a list."""
    file.seek(0)
    value = load_json(file.read().removeprefix(BYTE_ORDER_MARK).decode())
    return read_prompts(value, column)


def _read_parquet(file: BinaryIO, column: str | None) -> list[str]:
    """Read all columns except those that hold bytes, such as pictures."""
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
    """Return the first two lines that are not blank, stripped; an empty string stands for a missing line."""
    contents = (line.strip() for line in Lines(file))
    first, second, *_ = *itertools.islice((c for c in contents if c and not (has_comments and c[0] == "#")), 2), "", ""
    return first, second


def _is_json_strings(file: BinaryIO, first: str) -> bool:
    """Tell whether every line is in double quotes, as JSON writes them."""
    return first[0] == '"' and all(_is_json_string(line) for line in Lines(file) if line.strip())


def _is_json_string(text: str) -> bool:
    try:
        return isinstance(load_json(text), str)
    except ValueError:
        return False


def _is_document(first: str, second: str, *, is_lines: bool) -> bool:
    """Tell whether the whole file is one JSON value. A file with a lone object on one line is JSON lines."""
    if first[0] != "{":
        return first[0] == "["
    try:
        load_json(first)
    except ValueError:
        return first == "{" or not is_lines
    return not second and not is_lines


def _refuse_header(path: Path, first: str, column: str | None) -> None:
    """Raise ValueError if the first line of a text file is the header of a table."""
    wanted = {*USUAL_COLUMNS, *([] if column is None else [normalized(column)])}
    for delimiter in ",\t;":
        for name in first.split(delimiter):
            if normalized(name.strip("\"' \t").rstrip(":")) in wanted:
                raise ValueError(
                    f"prompt file {path} starts with {reprlib.repr(first)}, as a table with a column {name.strip()!r} "
                    "does; rename it to .csv or .tsv, or put another line first"
                )
