"""Prompts from records: the field that holds the text, the checks of it, and the other fields."""

import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

from noisepolicy.prompt import Prompt, metadata_of

USUAL_COLUMNS = ("prompt", "prompts", "caption", "captions", "text")
"""Names of the field that holds the prompt, in order of preference. Upper and lower case are the same."""

_SHOWN_COLUMNS = 12
_BATCH_ROWS = 1000


def find_column(names: Iterable[Any], column: str | None) -> str:
    """Return the one of `names` that holds the prompt: `column`, or else the first of `USUAL_COLUMNS` that is there.

    Raises:
        ValueError: if no name fits, or several names differ in upper and lower case only.
    """
    names = [name for name in names if isinstance(name, str)]
    if column in names:
        return column
    for wanted in USUAL_COLUMNS if column is None else (column,):
        found = [name for name in names if normalized(name) == normalized(wanted)]
        if len(found) > 1:
            raise ValueError(f"the prompt may be in any of {_listed(found)}; --prompt-column names the right one")
        if found:
            return found[0]
    wanted = "prompt, caption or text" if column is None else reprlib.repr(column)
    raise ValueError(
        f"no column is named {wanted}; the columns are {_listed(names)}; --prompt-column names the right one"
    )


def normalized(name: str) -> str:
    """Return a column's name without surrounding spaces and in lower case, to compare names by."""
    return name.strip().casefold()


def text_of(value: Any, name: str = "prompt") -> str:
    """Return a prompt's text without the white space around it.

    Args:
        value: The field's value, which must be text.
        name: Name of the field, for messages.

    Raises:
        ValueError: if the value is not text, or is empty.
    """
    if not isinstance(value, str | None):
        raise ValueError(f"{name} is {_kind(value)}, not text")
    text = str(value or "").strip()
    if not text:
        raise ValueError(f"{name} is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is no valid Unicode text (character {error.start + 1})") from None
    return text


def prompt_of(record: Mapping[str, Any], column: str) -> Prompt:
    """Return the record's prompt; its other fields are the metadata.

    Raises:
        ValueError: if `column` is missing, empty or not text.
    """
    if column not in record:
        raise ValueError(f"the field {reprlib.repr(column)} is missing; the fields are {_listed(record)}")
    text = text_of(record[column], reprlib.repr(column))
    return Prompt(text, {name: value for name, value in record.items() if name != column})


def read_prompts(source: Any, column: str | None = None, unit: str = "prompt") -> list[str]:
    """Read prompts that are in memory: text stays text, and a record becomes a `Prompt` with its other fields.

    Args:
        source: Texts or records (mappings), a `datasets` dataset, a pandas DataFrame, or a mapping that holds one list.
        column: Field of the records that holds the prompt. Default: found by its usual names.
        unit: Word for one item of the source, for messages.

    Raises:
        ValueError: if an item is not a prompt; the message says which.
    """
    prompts: list[str] = []
    found: str | None = None
    for number, item in enumerate(_items(source, column), 1):
        try:
            if isinstance(item, Prompt):
                text_of(item)
                _check_plain(item.metadata)
                prompts.append(item)
            elif isinstance(item, Mapping):
                found = found or find_column(item, column)
                prompts.append(prompt_of(item, found))
                _check_plain(prompts[-1].metadata)
            else:
                prompts.append(text_of(item))
        except ValueError as error:
            raise ValueError(f"{unit} {number}: {error}") from None
    return prompts


def _items(source: Any, column: str | None) -> Iterable[Any]:
    """Return a container's texts or records, where iterating over it would give something else."""
    if isinstance(source, str | bytes):
        raise ValueError(f"prompts must be a list of text or of records, got {_kind(source)}")
    if isinstance(source, Mapping):
        return _items_of_mapping(source, column)
    if isinstance(source, set | frozenset):
        raise ValueError("prompts must be in an order that every run repeats, got a set; give a sorted list")
    if hasattr(source, "iterrows"):  # a pandas DataFrame, which iterates over the names of its columns
        return source.to_dict("records")
    if hasattr(source, "with_format") and hasattr(source, "iter"):
        return dataset_records(source, column)
    if not isinstance(source, Iterable) and not hasattr(source, "__getitem__"):
        raise ValueError(f"prompts must be a list of text or of records, got {_kind(source)}")
    return source


def _items_of_mapping(mapping: Mapping[Any, Any], column: str | None) -> list[Any]:
    """Return the list of prompts in a mapping, or the mapping itself if it is one record."""
    if any(hasattr(value, "with_format") for value in mapping.values()):
        raise ValueError(f"these are the splits {_listed(mapping)} of a dataset; give one of them")
    lists = {name: value for name, value in mapping.items() if isinstance(value, list)}
    if not lists:
        return [mapping]
    try:
        name = find_column(mapping, column)
    except ValueError:
        name = next(iter(lists)) if len(lists) == 1 else None
    if name not in lists:
        raise ValueError(f"it is not clear which of {_listed(mapping)} are the prompts; give a list of them alone")
    values = lists[name]
    if len(lists) > 1 and all(len(other) == len(values) for other in lists.values()):  # a table, column by column
        return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
    return values


def dataset_records(dataset: Any, column: str | None) -> Iterator[dict[str, Any]]:
    """Return the rows of a `datasets` dataset, streamed or not, without its columns of pictures and other bytes."""
    if dataset.features is not None:
        schema = dataset.features.arrow_schema
        dataset = dataset.select_columns(plain_columns(schema, column))
    for table in dataset.with_format("arrow").iter(_BATCH_ROWS):
        yield from table.select(plain_columns(table.schema, column)).to_pylist()


def plain_columns(schema: Any, column: str | None) -> list[str]:
    """Return the names of a pyarrow schema's columns that hold no bytes, and the name of the prompt's column.

    Raises:
        ValueError: if no column holds prompts, or two columns have the same name.
    """
    if twice := [name for name in schema.names if schema.names.count(name) > 1]:
        raise ValueError(f"two columns are named {reprlib.repr(twice[0])}")
    prompt = find_column(schema.names, column)
    return [field.name for field in schema if field.name == prompt or not _holds_bytes(field.type)]


def _holds_bytes(kind: Any) -> bool:
    """Tell whether values of the pyarrow type have bytes in them, at any depth."""
    kind = getattr(kind, "storage_type", kind)
    if kind.num_fields:
        return any(_holds_bytes(kind.field(index).type) for index in range(kind.num_fields))
    return "binary" in str(kind)


def identity(prompt: str) -> bytes:
    """Return bytes that identify a prompt's text and metadata; without metadata they are the text itself."""
    metadata = metadata_of(prompt)
    if not metadata and "\n" not in prompt:
        return prompt.encode()
    return json.dumps([prompt, metadata], sort_keys=True, default=_as_text).encode()


def _check_plain(metadata: Mapping[str, Any]) -> None:
    """Raise ValueError for values that different runs would write in different ways."""
    for name, value in metadata.items():
        if not isinstance(name, str):
            raise ValueError(f"a field's name must be text, got {reprlib.repr(name)}")
        try:
            json.dumps(value, sort_keys=True, default=_as_text)
        except (TypeError, ValueError, RecursionError):
            raise ValueError(
                f"the field {reprlib.repr(name)} holds {_kind(value)}; fields beside the prompt must be text, numbers, "
                "dates, or lists or dictionaries of them"
            ) from None


def _as_text(value: Any) -> str:
    if isinstance(value, date | time | timedelta | Decimal):  # a datetime is a date
        return str(value)
    raise TypeError


def _kind(value: Any) -> str:
    """Name the value's type in words for users."""
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"a value of type {type(value).__name__}")


def _listed(names: Iterable[Any]) -> str:
    names = [reprlib.repr(name) for name in names]
    rest = len(names) - _SHOWN_COLUMNS
    return (", ".join(names[:_SHOWN_COLUMNS]) or "none") + (f" and {rest} more" if rest > 0 else "")
