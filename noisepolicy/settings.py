"""Settings as dataclasses: the type, the bounds and the help of a setting stand beside its field.

A dataclass of settings may hold others, e.g. `TrainConfig.critic` holds a `CriticConfig`. Files, flags and keyword
arguments know every setting by one flat name: the nested `critic.updates` is `critic_updates`, and `--critic-updates`.
A setting that is a mapping, e.g. `call`, has an open set of options, each with a dotted name: `call.strength`, and
`--call.strength`.
"""

import ast
import dataclasses
import functools
import inspect
import json
import math
import re
import reprlib
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

Config = TypeVar("Config")


@dataclass(frozen=True)
class Bounds:
    """The numbers that a setting may have. Infinity is refused unless `may_be_infinite`, NaN always."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    may_be_infinite: bool = False

    def __str__(self) -> str:
        """Return the rule in words, e.g. "must be in [0, 1)"."""
        if self.at_most is None and self.below is None:
            if self.above == 0 or self.at_least == 1:
                return "must be positive"
            return "must not be negative" if self.at_least == 0 else f"must be at least {self.at_least:,}"
        low = f"({self.above:,}" if self.at_least is None else f"[{self.at_least:,}"
        return f"must be in {low}, {self.at_most:,}]" if self.below is None else f"must be in {low}, {self.below:,})"

    def hold(self, value: float) -> bool:
        """Tell whether the value is within the bounds."""
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )


COUNT = Bounds(at_least=1)
POSITIVE = Bounds(above=0)
POSITIVE_OR_INFINITE = Bounds(above=0, may_be_infinite=True)
NOT_NEGATIVE = Bounds(at_least=0)
_FINITE = Bounds(at_least=-math.inf)


@dataclass(frozen=True)
class Group:
    """Marks the field that begins a group of flags in `--help`."""

    title: str


@dataclass(frozen=True)
class Flat:
    """Gives a field's outside name: a setting's flat name, or the prefix of a nested dataclass's settings."""

    name: str


@dataclass(frozen=True)
class Options:
    """Gives the prefix of the dotted names of a mapping's options, e.g. "call" for `call.strength`."""

    prefix: str


@dataclass(frozen=True)
class Setting:
    """One setting of a dataclass of settings."""

    name: str
    """The flat name."""
    path: tuple[str, ...]
    """Attribute names that lead to it."""
    kind: type
    """Type of the value, or of each value of a list: int, float, bool, str or Path; dict for a mapping of options."""
    is_list: bool
    is_optional: bool
    choices: tuple[str, ...]
    bounds: Bounds | None
    default: Any
    help: str
    group: str
    options: str | None = None
    """Prefix of a mapping's options."""

    @property
    def flag(self) -> str:
        """The setting's flag, with dashes."""
        return "--" + (self.name.replace("_", "-") if self.options is None else f"{self.options}.NAME")

    def checked(self, value: Any) -> Any:
        """Convert the value to the setting's own type: a list becomes a tuple, a whole number may stand for a float.

        Raises:
            ValueError: if the value is of another type, out of bounds, or not one of the choices.
        """
        if value is None and self.is_optional:
            return None
        if self.options is not None:
            return self._checked_options(value)
        if not self.is_list:
            return self._checked_one(value)
        values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        if self.kind is int and not values:
            raise ValueError(f"{self.flag} must be one or more numbers, got none")
        return tuple(self._checked_one(item) for item in values)

    def _checked_options(self, values: Any) -> dict[str, Any]:
        if not isinstance(values, Mapping):
            raise ValueError(f"{self.name} must map names to values, got {reprlib.repr(values)}")
        for name in values:
            if not isinstance(name, str) or not name.isidentifier():
                raise ValueError(f"{self.name} must map names to values, got the name {reprlib.repr(name)}")
        return {name: _plain(value, f"--{self.options}.{name}") for name, value in values.items()}

    def _checked_one(self, value: Any) -> Any:
        if self.choices and value not in self.choices:
            raise ValueError(f"{self.flag} must be one of {', '.join(self.choices)}, got {reprlib.repr(value)}")
        try:
            result = _converted(value, self.kind)
        except (ValueError, OverflowError):
            like = "true or false" if self.kind is bool else f"like {self.default!r}" if self.default else _A[self.kind]
            raise ValueError(f"{self.flag} must be {like}, got {reprlib.repr(value)}") from None
        if self.kind in (int, float):
            bounds = self.bounds or _FINITE
            if math.isnan(result) or (math.isinf(result) and not bounds.may_be_infinite):
                raise ValueError(f"{self.flag} must be a finite number, got {result}")
            if not bounds.hold(result):
                raise ValueError(f"{self.flag} {bounds}, got {result}")
        return result


_A = {int: "a whole number", float: "a number", str: "text", Path: "a path", bool: "true or false"}


def _plain(value: Any, flag: str) -> Any:
    """Convert an option's value to what YAML and JSON know. Arrays and tensors become lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item, flag) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, flag) for key, item in value.items()}
    if value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError(f"{flag} must be a number, text, true, false, null or a list, got {reprlib.repr(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{flag} must be a finite number, got {value}")
    return value


def _converted(value: Any, kind: type) -> Any:
    if kind is bool or isinstance(value, bool):
        if kind is not bool or not isinstance(value, bool):
            raise ValueError
        return value
    if kind is str:
        if isinstance(value, date):  # a text that YAML takes for a date
            return str(value)
        if isinstance(value, int | float | Path):
            return str(value)
        if not isinstance(value, str):
            raise ValueError
        return value
    if kind is Path:
        if not isinstance(value, str | Path):
            raise ValueError
        return Path(value)
    # PyYAML reads 1e-4, which has no point, as text. NumPy's numbers are numbers too.
    if not isinstance(value, Real | str) or (kind is int and not isinstance(value, Integral | str) and value % 1):
        raise ValueError
    return kind(value)


@functools.cache
def settings_of(kind: type) -> dict[str, Setting]:
    """Return every setting of a dataclass and of those inside it, by flat name, in order."""
    return {setting.name: setting for setting in _walk(kind, (), "", kind.__name__)}


def find_setting(kind: type, name: str) -> Setting | None:
    """Return the setting of a flat name, or the mapping that a dotted name is an option of; None if there is none."""
    settings, (prefix, dot, _) = settings_of(kind), str(name).partition(".")
    return next((each for each in settings.values() if each.options == prefix), None) if dot else settings.get(name)


def _walk(kind: type, path: tuple[str, ...], prefix: str, group: str) -> list[Setting]:
    settings: list[Setting] = []
    hints, helps = get_type_hints(kind, include_extras=True), _field_docstrings(kind)
    for field in dataclasses.fields(kind):
        hint, notes = hints[field.name], ()
        if get_origin(hint) is Annotated:
            hint, *notes = get_args(hint)
        group = next((note.title for note in notes if isinstance(note, Group)), group)
        flat = next((note.name for note in notes if isinstance(note, Flat)), None)
        prefix_of_options = next((note.prefix for note in notes if isinstance(note, Options)), None)
        place = (*path, field.name)
        if dataclasses.is_dataclass(hint):
            settings += _walk(hint, place, prefix if flat is None else flat, group)
            continue
        (kind_of_value,) = [each for each in get_args(hint) if each is not NoneType] if _is_union(hint) else [hint]
        is_list = get_origin(kind_of_value) is tuple
        if is_list:
            kind_of_value = get_args(kind_of_value)[0]
        elif prefix_of_options is not None:
            kind_of_value = dict
        choices = get_args(kind_of_value) if get_origin(kind_of_value) is Literal else ()
        settings.append(
            Setting(
                name=prefix + field.name if flat is None else flat,
                path=place,
                kind=str if choices else kind_of_value,
                is_list=is_list,
                is_optional=_is_union(hint),
                choices=choices,
                bounds=next((note for note in notes if isinstance(note, Bounds)), None),
                default=field.default if prefix_of_options is None else {},
                help=" ".join(helps.get(field.name, "").split()),
                group=group,
                options=prefix_of_options,
            )
        )
    return settings


def _is_union(hint: Any) -> bool:
    return NoneType in get_args(hint)


def _field_docstrings(kind: type) -> dict[str, str]:
    """Return the docstrings under a dataclass's fields."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    found = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            found[statement.target.id] = ast.literal_eval(following.value)
    return found


def with_names(kind: type, message: str) -> str:
    """Replace flags in a message by the settings' names: `batch_size` for `--batch-size`."""
    names = {setting.flag: name for name, setting in settings_of(kind).items()}
    return re.sub(r"--[a-z][a-z-]+", lambda flag: names.get(flag[0], flag[0]), message)


def flat_values(config: Any) -> dict[str, Any]:
    """Return every setting's value by flat name."""
    return {
        name: functools.reduce(getattr, setting.path, config) for name, setting in settings_of(type(config)).items()
    }


def with_settings(config: Config, **values: Any) -> Config:
    """Copy a config with these settings, by flat name; each value is checked.

    A dotted name sets one option of a mapping and keeps the others.

    Raises:
        ValueError: if there is no such setting, or a value does not fit it.
    """
    known = settings_of(type(config))
    values = _with_whole_mappings(config, values)
    if unknown := [name for name in values if name not in known]:
        raise ValueError(f"unknown setting {reprlib.repr(unknown[0])}; see noisepolicy-train --help")
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *parents, last = known[name].path
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = known[name].checked(value)
    return _replaced(config, tree)


def _with_whole_mappings(config: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Replace dotted names by the mapping that they belong to, with these options."""
    whole = {name: value for name, value in values.items() if "." not in name}
    for name in [name for name in values if name not in whole]:
        setting = find_setting(type(config), name)
        if setting is None:
            whole[name] = values[name]
        else:
            before = whole.get(setting.name, functools.reduce(getattr, setting.path, config))
            whole[setting.name] = {**setting.checked(before), name.partition(".")[2]: values[name]}
    return whole


def _replaced(config: Config, tree: dict[str, Any]) -> Config:
    return dataclasses.replace(
        config,
        **{
            name: _replaced(getattr(config, name), value) if dataclasses.is_dataclass(getattr(config, name)) else value
            for name, value in tree.items()
        },
    )


def option_value(text: str) -> Any:
    """Read an option's value from a command line: JSON, numbers with commas between, or text."""
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    for attempt in (text, f"[{text}]") if text else ():
        with suppress(ValueError, RecursionError):
            return json.loads(attempt)
    return text


def plain_values(config: Any) -> dict[str, Any]:
    """Return every setting's value by flat name, as YAML and JSON know it."""
    return {
        name: list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
        for name, value in flat_values(config).items()
    }
