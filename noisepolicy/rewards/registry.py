"""The registry of rewards, and the grammar of the text that describes one.

    reward  =  term + term + ...          term  =  [weight *] name | name(argument, ...)
                                                |  [weight *] [folder/]module:function
                                                |  [weight *] http://... | https://...

An argument is a local folder, a hub id, for `frames` and `cached` another reward, for `pil` a module:function, or for
`votes` a folder of votes.
The module of a name is imported when its reward is made.
"""

import importlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError

from noisepolicy.named_objects import absolute_folder, import_object, with_absolute_folder
from noisepolicy.rewards.base import Reward, WeightedSum, torch_settings_kept

_MAX_DEPTH = 8


@dataclass(frozen=True)
class _Entry:
    """The class of a named reward, and the kind of arguments between its parentheses."""

    module: str
    maker: str
    takes: str = "nothing"
    """"nothing", "models" (folders or hub ids, all optional), "reward", "function", "folder" or "address" (one,
    required)."""
    max_models: int = 0


_REGISTRY: dict[str, _Entry] = {
    "shapes": _Entry("shapes", "ShapesReward"),
    "moving_shapes": _Entry("shapes", "MovingShapesReward"),
    "turbo": _Entry("shapes", "TurboReward"),
    "jpeg_compressibility": _Entry("simple", "JpegCompressibility"),
    "jpeg_incompressibility": _Entry("simple", "JpegIncompressibility"),
    "brightness": _Entry("simple", "Brightness"),
    "red": _Entry("simple", "Red"),
    "green": _Entry("simple", "Green"),
    "blue": _Entry("simple", "Blue"),
    "sharpness": _Entry("simple", "Sharpness"),
    "clipscore": _Entry("clip", "ClipScore", "models", 1),
    "pickscore": _Entry("clip", "PickScore", "models", 2),
    "aesthetic": _Entry("aesthetic", "Aesthetic", "models", 2),
    "hpsv2.1": _Entry("hps", "HumanPreferenceScore", "models", 2),
    "imagereward": _Entry("imagereward", "ImageReward", "models", 2),
    "temporal_consistency": _Entry("video", "TemporalConsistency", "models", 1),
    "frames": _Entry("video", "FrameMean", "reward"),
    "cached": _Entry("cache", "CachedReward", "reward"),
    "pil": _Entry("pil", "PilReward", "function"),
    "votes": _Entry("votes", "VotesReward", "folder"),
    "raw": _Entry("http_client", "RawHttpReward", "address"),
}


def load_reward(spec: str, *, device: torch.device | str = "cpu") -> Reward:
    """Make the reward that `spec` describes; its models, if any, run on `device`.

    `module:function` is found as Python finds modules, and in the working folder; `folder/module:function` in that
    folder.

    Raises:
        ValueError: if the text is wrong, or what it names cannot be found, loaded or reached.
    """
    terms = _terms(spec)
    names = [name for _, name in terms]
    if len(terms) == 1 and terms[0][0] is None:
        reward = _load_named(names[0], device)
    else:
        parts = [(1.0 if weight is None else weight, _load_named(name, device)) for weight, name in terms]
        reward = WeightedSum(spec, parts)
    reward.spec = spec
    return reward


def outside_parts(spec: str) -> list[str]:
    """List the parts of a reward that run code (`module:function`) or send pictures to another machine (an address).

    Nothing is imported, loaded or reached.

    Raises:
        ValueError: if the text is wrong.
    """
    parts = []
    for _, name in _terms(spec):
        entry, argument = _find(name)
        if entry is None:
            parts.append(name)
        elif entry.takes == "function" or (entry.takes == "address" and not _is_of_this_machine(argument)):
            parts.append(argument)
        elif entry.takes == "reward" and argument:
            parts += outside_parts(argument)
    return parts


def with_absolute_paths(spec: str) -> str:
    """Rewrite a reward's text so that it means the same in any working folder.

    Folders, and modules that lie in the working folder, get their absolute path, unless it holds one of `+*(),:`, which
    have a meaning here.

    Raises:
        ValueError: if the text is wrong.
    """
    texts = _split(spec, "+")
    for number, text in enumerate(texts):
        _, name = _parse_term(text, spec)
        texts[number] = _absolute_name(name).join(text.rsplit(name, 1))
    return "+".join(texts)


def without_folders(text: str) -> str:
    """Shorten absolute paths to their last part, for reports, which others read."""
    return re.sub(r"(?<![\w:/.~\]-])/([^+*(),:]*/)?(?=[^/])", "", text)


def _is_of_this_machine(address: str) -> bool:
    from noisepolicy.rewards.http_client import LOOPBACK

    return urlsplit(address).hostname in LOOPBACK


def _terms(spec: str) -> list[tuple[float | None, str]]:
    """Split a text into weights and names."""
    terms = [_parse_term(text, spec) for text in _split(spec, "+")]
    names = [name for _, name in terms]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"reward {spec!r}: {sorted(repeated)[0]!r} appears twice; give it one weight")
    return terms


def _parse_term(text: str, spec: str) -> tuple[float | None, str]:
    weight_text, *rest = _split(text, "*")
    if not rest:
        name, weight = text.strip(), None
    else:
        name, weight = "*".join(rest).strip(), _parse_weight(weight_text.strip(), spec)
    if not name:
        raise ValueError(f"reward {spec!r}: a reward is missing; write e.g. '0.7*pickscore + 0.3*aesthetic'")
    return weight, name


def _parse_weight(text: str, spec: str) -> float:
    try:
        weight = float(text)
    except ValueError as error:
        raise ValueError(f"reward {spec!r}: the weight {text!r} is not a number") from error
    if not math.isfinite(weight) or weight == 0:
        raise ValueError(f"reward {spec!r}: the weight {text!r} must be finite and not zero")
    return weight


def _split(text: str, separator: str) -> list[str]:
    """Split `text` at every `separator` outside parentheses."""
    pieces, depth, start = [], 0, 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth > _MAX_DEPTH:
            raise ValueError(f"reward {text.strip()[:40]!r}...: its parentheses are nested more than {_MAX_DEPTH} deep")
        if depth < 0:
            break
        if character == separator and depth == 0:
            pieces.append(text[start:index])
            start = index + 1
    if depth != 0:
        raise ValueError(f"reward {text.strip()!r}: its parentheses do not match")
    return [*pieces, text[start:]]


def _absolute_name(name: str) -> str:
    entry, argument = _find(name)
    if entry is None:
        return with_absolute_folder(name)
    if entry.takes == "models":
        given = ", ".join(absolute_folder(text.strip()) for text in argument.split(","))
    elif entry.takes == "function":
        given = with_absolute_folder(argument)
    elif entry.takes == "reward" and argument:
        given = with_absolute_paths(argument)
    elif entry.takes == "folder":
        given = absolute_folder(argument)
    else:
        return name
    return given.join(name.rsplit(argument, 1)) if argument else name


def _load_named(name: str, device: torch.device | str) -> Reward:
    entry, argument = _find(name)
    return Reward(name, _import_function(name) if entry is None else _make(name, entry, argument, device))


def _find(name: str) -> tuple[_Entry | None, str]:
    """Find a reward's entry (None for a `module:function`) and its arguments' text."""
    if name.startswith(("http://", "https://")):
        return _Entry("http_client", "HttpReward", "address"), name
    head, has_argument, rest = name.partition("(")
    if head.strip() in _REGISTRY and (not has_argument or rest.endswith(")")):
        return _REGISTRY[head.strip()], rest[:-1].strip()
    if ":" in name:
        return None, name
    raise ValueError(
        f"unknown reward {name!r}; choose from {sorted(_REGISTRY)} or give 'module:function' or an http(s) address"
    )


def _make(name: str, entry: _Entry, argument: str, device: torch.device | str) -> Any:
    if entry.takes == "nothing" and argument:
        raise ValueError(f"reward {name!r}: {name.partition('(')[0]} takes no argument")
    models = list(_models(argument, name, entry.max_models)) if entry.takes == "models" else []
    needed = {
        "reward": "a reward",
        "function": "a function, module:function,",
        "folder": "a folder",
        "address": "an address",
    }
    if entry.takes in needed and (not argument or (entry.takes == "function" and ":" not in argument)):
        raise ValueError(f"reward {name!r}: it needs {needed[entry.takes]} in parentheses")
    given: Any = argument
    if entry.takes == "reward":
        given = load_reward(argument, device=device)
    elif entry.takes == "function":
        given = _import_function(argument)
    try:
        maker = getattr(importlib.import_module(f"noisepolicy.rewards.{entry.module}"), entry.maker)
        if entry.takes == "nothing":
            return maker()
        if entry.takes == "models":
            return maker(*models, device=device)
        return maker(given)
    except KeyError as error:
        raise ValueError(f"reward {name!r}: its weights have no {error}") from error
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        hint = ""
        if entry.takes == "models" and not models:
            hint = f" (weights already on disk: {name}(FOLDER))"
        raise ValueError(f"reward {name!r}: {' '.join(str(error).split())}{hint}") from error


def _models(argument: str, name: str, max_models: int) -> Iterator[str]:
    """Split folders and hub ids at commas.

    Raises:
        ValueError: if there are too many, or what is written as a path is not there.
    """
    texts = [text.strip() for text in argument.split(",")] if argument else []
    if len(texts) > max_models:
        raise ValueError(f"reward {name!r}: {len(texts)} folders or ids; it takes {max_models} at most")
    for text in texts:
        path = Path(text).expanduser()
        is_path = not text or text.startswith((".", "/", "~")) or len(path.parts) > 2
        if is_path and not (text and path.is_dir()):
            raise ValueError(f"reward {name!r}: no such folder: {text!r}")
        yield str(path) if path.is_dir() else text


def _import_function(name: str) -> Any:
    with torch_settings_kept():
        function = import_object(name, "reward")
    if not callable(function):
        raise ValueError(f"reward {name!r}: {name.rpartition(':')[2]!r} is not callable")
    return function
