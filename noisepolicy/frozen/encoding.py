"""Prompts encoded once, whatever the form in which a diffusers pipeline keeps them.

A pipeline asks its own `encode_prompt`, once or several times a call. Watching it do so for a few prompts tells the
form of the results: which tensors have a row for each prompt, which rows differ between prompts, which are as long as
their prompt, and which are the same for every prompt, as guidance's negative ones. From then on results are kept by
prompt, as a `PromptEmbeds`, and handed to the pipeline when it asks.

Where the results of several prompts cannot be taken apart, or a prompt comes with images, prompts are watched one at a
time, and the pipeline must be called for one at a time.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from noisepolicy.frozen.base import PromptEmbeds
from noisepolicy.frozen.blame import not_finite

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_BATCH_SIZE = 256
_ONE = ["a photo of a cat"]
_THREE = ["", *_ONE, " ".join(["a red house beside a blue tree and"] * 120)]
"""Prompts to watch: the shortest, that of `_ONE`, and one that is longer than what text encoders read."""
_SAME = 2e-2
"""Largest difference of a prompt's row alone and in a batch, over the largest value: text encoders may be 16-bit."""


class Encoding(NamedTuple):
    """One call of `encode_prompt`."""

    arguments: dict[str, Any]
    result: Any


@contextmanager
def encodings(pipeline: "DiffusionPipeline") -> Iterator[list[Encoding]]:
    """List the calls of the pipeline's `encode_prompt` within this context.

    Raises:
        ValueError: if the pipeline has no such method.
    """
    name, original = encode_prompt_of(pipeline)
    calls: list[Encoding] = []
    depth = 0  # some call themselves, for a second prompt

    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        given = inspect.signature(original).bind(*args, **kwargs).arguments
        # Some pipelines put other text in the lists that they are given.
        arguments = {name: list(value) if isinstance(value, list) else value for name, value in given.items()}
        depth += 1
        try:
            result = original(*args, **kwargs)
        finally:
            depth -= 1
        if depth == 0:
            calls.append(Encoding(arguments, result))
        return result

    with replaced(pipeline, name, encode_prompt):
        yield calls


@contextmanager
def answering(pipeline: "DiffusionPipeline", results: Sequence[Any]) -> Iterator[None]:
    """Let the calls of the pipeline's `encode_prompt` return these results, one after the other."""
    answers = iter(results)
    with replaced(pipeline, encode_prompt_of(pipeline)[0], lambda *args, **kwargs: next(answers)):
        yield


def first_embeds(results: Iterable[Any]) -> torch.Tensor | None:
    """Find one prompt's token embeddings, `(1, tokens, width)`, among results of `encode_prompt`; None if not there."""
    for result in results:
        if isinstance(result, torch.Tensor):
            if result.is_floating_point() and result.ndim == 3 and len(result) == 1:
                return result
        elif _is_row_list(result, 1) and result[0].is_floating_point() and result[0].ndim == 2:
            return result[0][None]
        elif isinstance(result, tuple | list | Mapping):
            inside = first_embeds(result.values() if isinstance(result, Mapping) else result)
            if inside is not None:
                return inside
    return None


class PromptEncoder:
    """Encodes prompts as a pipeline does, and stands in for its `encode_prompt` with what was encoded before.

    Args:
        pipeline: The pipeline; its `encode_prompt` is replaced within `standing_in`.
        watch: Function of prompts, and of whether classifier-free guidance is on, that calls the pipeline far enough
            to see how it encodes the prompts.
        names: Names of the results of `encode_prompt`, for a family whose loop asks for them by name.
        one_at_a_time: Watch prompts one at a time, each by a call of its own.

    Raises:
        ValueError: if the results cannot be taken apart by prompt.
    """

    def __init__(
        self,
        pipeline: "DiffusionPipeline",
        watch: Callable[[list[str], bool], list[Encoding]],
        *,
        names: Sequence[str] = (),
        one_at_a_time: bool = False,
    ) -> None:
        self._pipeline, self._names, self._watch = pipeline, names, watch
        self.one_at_a_time = one_at_a_time
        self._kind = type(pipeline).__name__
        self._method, self._original = encode_prompt_of(pipeline)
        self._columns: list[_Column] = []
        """Columns of rows that differ between prompts."""
        self._unmatched: list[_Column] = []
        """Columns of the calls without guidance that were not met yet in those with it."""
        one, three = [*_ONE], [*_THREE]
        self._plans: dict[bool, list[tuple[dict[str, Any], Any]]] = {}
        for is_guided in (False, True):
            calls = (
                [watch([prompt], is_guided) for prompt in (*one, *three)]
                if one_at_a_time
                else [watch(prompts, is_guided) for prompts in (one, three)]
            )
            one[:], three[:] = _ONE, _THREE  # Z-Image writes its template into the list that it is given
            if not calls[0] or len(set(map(len, calls))) != 1:
                raise ValueError(f"{self._kind} does not encode its prompts by {self._method}")
            self._plans[is_guided] = [
                (
                    first.arguments,
                    self._plan_alone(first.result, [other.result for other in others])
                    if one_at_a_time
                    else self._plan(first.result, others[0].result),
                )
                for first, *others in zip(*calls, strict=True)
            ]
            self._unmatched = list(self._columns)
            if one_at_a_time:
                continue
            for arguments, tree in self._plans[is_guided]:
                if any(map(_names, _leaves(tree))) and one not in arguments.values():
                    raise ValueError(f"{self._kind} changes prompts before it encodes them")
        embeddings = [column for column in self._columns if column.example.is_floating_point()]
        if not embeddings:
            raise ValueError(f"{self._kind} gives every prompt the same embeddings")
        self._main = next((column for column in embeddings if column.example.ndim == 2), embeddings[0])
        if self._main.example.ndim == 2:
            self._main.name = "prompt_embeds"

    def encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Compute the prompts' embeddings, one row each, by the pipeline's own `encode_prompt`.

        Raises:
            ValueError: if the embeddings hold NaN or infinity, or a prompt has more tokens than the pipeline was seen
                to take.
        """
        if self.one_at_a_time:
            return PromptEmbeds.cat([self._encode_alone(prompt) for prompt in prompts])
        # Rows as long as their prompt are padded in a batch; alone they are seen as they are.
        size = 1 if any(column.max_tokens for column in self._columns) else _BATCH_SIZE
        parts = [self._encode(list(prompts[begin : begin + size])) for begin in range(0, len(prompts), size)]
        return PromptEmbeds.cat(parts)

    def asks_for(self, text: str) -> bool:
        """Tell whether the pipeline encodes `text` beside the prompts when it is guided."""
        values = [value for arguments, _ in self._plans[True] for value in arguments.values()]
        return any(isinstance(value, str | list) and value in (text, [text]) for value in values)

    @contextmanager
    def standing_in(self, embeds: PromptEmbeds, *, is_guided: bool) -> Iterator[list[str]]:
        """Answer the pipeline's calls of `encode_prompt` by `embeds`; yields prompts to call the pipeline with."""
        with answering(self._pipeline, self.results(embeds, is_guided=is_guided)):
            yield _ONE * len(embeds)

    def results(self, embeds: PromptEmbeds, *, is_guided: bool) -> list[Any]:
        """Return what each call of `encode_prompt` returns for these prompts."""
        tensors = embeds.tensors()
        lengths = next((tensors[column.length_name] for column in self._columns if column.max_tokens), None)
        return [
            _replace_leaves(tree, lambda leaf: leaf.assemble(tensors, len(embeds), lengths))
            for _, tree in self._plans[is_guided]
        ]

    def named(self, embeds: PromptEmbeds, *, is_guided: bool) -> dict[str, torch.Tensor]:
        """Return the results of `encode_prompt` by `names`, without those that are None."""
        results = zip(self._names, self.results(embeds, is_guided=is_guided)[0], strict=True)
        return {name: value for name, value in results if value is not None}

    def _plan(self, one: Any, three: Any, name: str = "") -> Any:
        """Return the result of encoding one prompt, with leaves in the place of its tensors."""
        if _is_row_list(one, 1) and _is_row_list(three, 3):
            column = self._column(one[0], three, name)
            if column is not None:
                return _ListLeaf([column])
        elif isinstance(one, torch.Tensor) and isinstance(three, torch.Tensor):
            leaf = self._tensor_leaf(one, three, name) or _shared_leaf(one, three)
            if leaf is not None:
                return leaf
        elif one is None and isinstance(three, torch.Tensor) and three.ndim == 2 and len(three) == 3:
            masked = next((column for column in self._columns if column.max_tokens == three.shape[1]), None)
            if masked is not None:
                return _MaskLeaf(three.dtype, masked)  # of padding, which this prompt does not have
        elif isinstance(one, Mapping) and isinstance(three, Mapping) and one.keys() == three.keys():
            return {key: self._plan(one[key], three[key]) for key in one}
        elif isinstance(one, tuple | list) and type(one) is type(three) and len(one) == len(three):
            names = self._names if len(self._names) == len(one) and not self._plans else [""] * len(one)
            return type(one)([self._plan(*parts) for parts in zip(one, three, names, strict=True)])
        elif type(one) is type(three) and one == three:
            return one
        raise ValueError(f"{self._kind} encodes prompts in a form that cannot be taken apart by prompt")

    def _plan_alone(self, one: Any, others: Sequence[Any]) -> Any:
        """Return the result of encoding one prompt, with leaves in the place of what differs for other prompts."""
        if isinstance(one, torch.Tensor) and all(isinstance(other, torch.Tensor) for other in others):
            shapes = [other.shape for other in others if len(other.shape) == one.ndim]
            axes = [axis for axis in range(one.ndim) if any(shape[axis] != one.shape[axis] for shape in shapes)]
            if len(axes) <= 1 and len(shapes) == len(others):
                axis = axes[0] if axes else 0
                rows = [tensor.movedim(axis, 0) if one.ndim else tensor for tensor in (one, *others)]
                column = self._column(rows[0], rows[1:], "")
                if column is not None:
                    return _WholeLeaf(axis, [column]) if column.name else one
        elif isinstance(one, Mapping) and all(isinstance(o, Mapping) and o.keys() == one.keys() for o in others):
            return {key: self._plan_alone(one[key], [other[key] for other in others]) for key in one}
        elif isinstance(one, tuple | list) and all(type(o) is type(one) and len(o) == len(one) for o in others):
            return type(one)([self._plan_alone(*parts) for parts in zip(one, zip(*others, strict=True), strict=True)])
        elif all(type(other) is type(one) and other == one for other in others):
            return one
        raise ValueError(f"{self._kind} encodes prompts in a form that differs from prompt to prompt")

    def _tensor_leaf(self, one: torch.Tensor, three: torch.Tensor, name: str) -> "_TensorLeaf | None":
        for axis in range(min(one.ndim, three.ndim)):
            if 0 < 3 * one.shape[axis] == three.shape[axis]:
                together = three.movedim(axis, 0).split(3)
                pairs = zip(one.movedim(axis, 0), together, strict=True)
                columns = [self._column(row, list(rows), name) for row, rows in pairs]
                return _TensorLeaf(axis, columns) if None not in columns else None
        return None

    def _column(self, one: torch.Tensor, three: Sequence[torch.Tensor], name: str) -> "_Column | None":
        """Return the column that holds a prompt's row, or None if there is none.

        The same rows, with guidance and without, are one column.
        """
        self._check_finite([one])
        is_short = any(row.shape != one.shape for row in three)
        if is_short and (one.ndim == 0 or any(row.shape[1:] != one.shape[1:] for row in three)):
            return None
        if not is_short and not _is_close(one, three[1]):
            return None
        column = _Column(one, name or f"encoded_{len(self._columns)}", max(map(len, three)) if is_short else 0)
        if not is_short and all(_is_close(one, row) for row in three):
            column.name = ""
            return column
        for known in self._unmatched:
            if known.max_tokens == column.max_tokens and _is_close(known.example, one):
                self._unmatched.remove(known)
                return known
        self._columns.append(column)
        return column

    def _encode_alone(self, prompt: str) -> PromptEmbeds:
        tensors: dict[str, torch.Tensor] = {}
        for is_guided, plan in self._plans.items():
            if any(name not in tensors for _, tree in plan for leaf in _leaves(tree) for name in _names(leaf)):
                for (_, tree), call in zip(plan, self._watch([prompt], is_guided), strict=True):
                    _take_apart(tree, call.result, tensors)
        return self._embeds(tensors)

    def _check_finite(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            if not tensor.isfinite().all():
                encoder = type(getattr(self._pipeline, "text_encoder", None) or self._pipeline).__name__
                raise ValueError(not_finite(f"the text encoder {encoder}", tensor.dtype))

    def _encode(self, prompts: list[str]) -> PromptEmbeds:
        tensors: dict[str, torch.Tensor] = {}
        for arguments, tree in (call for plan in self._plans.values() for call in plan):
            if any(name not in tensors for leaf in _leaves(tree) for name in _names(leaf)):
                result = self._original(**_for_prompts(arguments, prompts))
                _take_apart(tree, result, tensors)
        return self._embeds(tensors)

    def _embeds(self, tensors: dict[str, torch.Tensor]) -> PromptEmbeds:
        if self._main.name != "prompt_embeds":
            rows = tensors[self._main.name]
            tensors["prompt_embeds"] = rows.reshape(len(rows), -1, rows.shape[-1])
        self._check_finite(tensors.values())
        return PromptEmbeds.of(tensors)


@dataclass
class _Column:
    """A row for each prompt: kept by name, or one that is the same for every prompt."""

    example: torch.Tensor
    """The row of `_ONE`."""
    name: str
    """Name in `PromptEmbeds`; "" if every prompt's row is `example`."""
    max_tokens: int
    """Largest length of rows that are as long as their prompt; 0 for rows of one length."""

    @property
    def length_name(self) -> str:
        return f"{self.name}_length"

    def store(self, rows: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        """Keep rows, `(prompts, ...)`; those as long as their prompt are padded with zeros to the largest length."""
        if self.max_tokens:
            if rows.shape[1] > self.max_tokens:
                raise ValueError(f"a prompt has {rows.shape[1]} tokens; at most {self.max_tokens} can be kept")
            tensors[self.length_name] = torch.full((len(rows),), rows.shape[1], device=rows.device)
            padding = rows.new_zeros(len(rows), self.max_tokens - rows.shape[1], *rows.shape[2:])
            rows = torch.cat([rows, padding], 1)
        tensors[self.name] = rows

    def rows(self, tensors: Mapping[str, torch.Tensor], count: int) -> torch.Tensor:
        """Return the rows of `count` prompts, padded to the longest of them."""
        if not self.name:
            return self.example.repeat(count, *[1] * self.example.ndim)  # bfloat16 rounds differently without copies
        rows = tensors[self.name]
        return rows[:, : int(tensors[self.length_name].max())] if self.max_tokens else rows


@dataclass
class _TensorLeaf:
    """A tensor with a row for each prompt along an axis."""

    axis: int
    columns: list[_Column]
    """Columns that follow one another along the axis, as guidance's negative prompts and the prompts."""

    def assemble(self, tensors: Mapping[str, torch.Tensor], count: int, lengths: torch.Tensor | None) -> torch.Tensor:
        device = next(iter(tensors.values())).device
        parts = [column.rows(tensors, count).to(device) for column in self.columns]
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).movedim(0, self.axis)

    def take_apart(self, value: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        rows = value.movedim(self.axis, 0)
        for column, part in zip(self.columns, rows.chunk(len(self.columns)), strict=True):
            if column.name:
                column.store(part, tensors)


@dataclass
class _ListLeaf:
    """A list with a tensor for each prompt."""

    columns: list[_Column]

    def assemble(
        self, tensors: Mapping[str, torch.Tensor], count: int, lengths: torch.Tensor | None
    ) -> list[torch.Tensor]:
        [column] = self.columns
        rows = column.rows(tensors, count).to(next(iter(tensors.values())).device)
        if not column.max_tokens:
            return list(rows)
        return [row[:length] for row, length in zip(rows, tensors[column.length_name].tolist(), strict=True)]

    def take_apart(self, value: list[torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
        if self.columns[0].name:
            self.columns[0].store(torch.stack(value), tensors)


@dataclass
class _WholeLeaf:
    """A tensor of one prompt, whatever its axes."""

    axis: int
    """Axis that may be as long as the prompt."""
    columns: list[_Column]

    def assemble(self, tensors: Mapping[str, torch.Tensor], count: int, lengths: torch.Tensor | None) -> torch.Tensor:
        [row] = self.columns[0].rows(tensors, count)
        return row.movedim(0, self.axis) if row.ndim else row

    def take_apart(self, value: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        self.columns[0].store((value.movedim(self.axis, 0) if value.ndim else value)[None], tensors)


@dataclass
class _SharedLeaf:
    """A tensor that all prompts share; cut along an axis to the length of the longest prompt."""

    tensor: torch.Tensor
    axis: int | None
    columns = ()

    def assemble(self, tensors: Mapping[str, torch.Tensor], count: int, lengths: torch.Tensor | None) -> torch.Tensor:
        tensor = self.tensor if self.axis is None else self.tensor.narrow(self.axis, 0, int(lengths.max()))
        return tensor.to(next(iter(tensors.values())).device)

    def take_apart(self, value: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        pass


@dataclass
class _MaskLeaf:
    """A mask of the tokens that are no padding; None where there is no padding."""

    dtype: torch.dtype
    masked: _Column
    columns = ()

    def assemble(
        self, tensors: Mapping[str, torch.Tensor], count: int, lengths: torch.Tensor | None
    ) -> torch.Tensor | None:
        mask = tensors[f"{self.masked.name}_mask"][:, : int(tensors[self.masked.length_name].max())]
        return None if mask.all() else mask

    def take_apart(self, value: torch.Tensor | None, tensors: dict[str, torch.Tensor]) -> None:
        rows, lengths = tensors[self.masked.name], tensors[self.masked.length_name]
        mask = (torch.arange(rows.shape[1], device=rows.device) < lengths[:, None]).to(self.dtype)
        if value is not None:  # some pad a prompt to a multiple of a number
            mask[:, : value.shape[1]] = value
        tensors[f"{self.masked.name}_mask"] = mask


_Leaf = _TensorLeaf | _ListLeaf | _WholeLeaf | _SharedLeaf | _MaskLeaf


def _shared_leaf(one: torch.Tensor, three: torch.Tensor) -> _SharedLeaf | None:
    if one.ndim != three.ndim:
        return None
    axes = [axis for axis in range(one.ndim) if one.shape[axis] != three.shape[axis]]
    if not axes:
        return _SharedLeaf(one, None) if torch.equal(one, three) else None
    axis, length = axes[0], one.shape[axes[0]]
    if len(axes) > 1 or length > three.shape[axis] or not torch.equal(three.narrow(axis, 0, length), one):
        return None
    return _SharedLeaf(three, axis)


def encode_prompt_of(pipeline: "DiffusionPipeline") -> tuple[str, Callable[..., Any]]:
    """Return the name of the method by which a pipeline encodes its prompts, and the method.

    Raises:
        ValueError: if the pipeline has none.
    """
    for name in ("encode_prompt", "_encode_prompt"):
        if hasattr(pipeline, name):
            return name, getattr(pipeline, name)
    raise ValueError(f"{type(pipeline).__name__} has no encode_prompt, by which pipelines encode their prompts")


@contextmanager
def replaced(pipeline: "DiffusionPipeline", name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Give this pipeline, and not its class, another method within this context."""
    own = vars(pipeline).get(name)
    vars(pipeline)[name] = function
    try:
        yield
    finally:
        if own is None:
            del vars(pipeline)[name]
        else:
            vars(pipeline)[name] = own


def _for_prompts(arguments: dict[str, Any], prompts: list[str]) -> dict[str, Any]:
    """Return the arguments that encoded `_ONE`, for other prompts: a list of one entry becomes one entry a prompt."""

    def fit(name: str, value: Any) -> Any:
        if value == _ONE:
            return prompts
        if name == "batch_size":
            return len(prompts)
        return value * len(prompts) if isinstance(value, list) and len(value) == 1 else value

    return {name: fit(name, value) for name, value in arguments.items()}


def _is_row_list(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(isinstance(row, torch.Tensor) for row in value)


def _is_close(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point() or one.numel() == 0:
        return torch.equal(one, other)
    return bool((one - other).abs().max() <= _SAME * one.abs().max())


def _replace_leaves(tree: Any, function: Callable[[_Leaf], Any]) -> Any:
    if isinstance(tree, _Leaf):
        return function(tree)
    if isinstance(tree, dict):
        return {key: _replace_leaves(value, function) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)([_replace_leaves(value, function) for value in tree])
    return tree


def _leaves(tree: Any) -> list[_Leaf]:
    leaves: list[_Leaf] = []
    _replace_leaves(tree, leaves.append)
    return leaves


def _names(leaf: _Leaf) -> list[str]:
    return [column.name for column in leaf.columns if column.name]


def _take_apart(tree: Any, result: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Store the rows of a result by name."""
    if isinstance(tree, _Leaf):
        tree.take_apart(result, tensors)
    elif isinstance(tree, dict):
        for key, value in tree.items():
            _take_apart(value, result[key], tensors)
    elif isinstance(tree, tuple | list):
        for value, part in zip(tree, result, strict=True):
            _take_apart(value, part, tensors)
