"""A prompt that remembers the other fields of the record it was read from."""

from collections.abc import Mapping
from typing import Any


class Prompt(str):
    """Text with metadata: the other columns of its line in the prompt file, by name.

    A prompt is a `str` everywhere. Rewards that take `metadata` get the metadata.
    """

    __slots__ = ("metadata",)

    metadata: dict[str, Any]

    def __new__(cls, text: str, metadata: Mapping[str, Any] | None = None) -> "Prompt":
        prompt = super().__new__(cls, text)
        prompt.metadata = dict(metadata or {})
        return prompt

    def __reduce__(self) -> tuple[Any, ...]:
        return Prompt, (str(self), self.metadata)


def metadata_of(prompt: str) -> dict[str, Any]:
    """Return the prompt's metadata; empty for plain text."""
    return dict(prompt.metadata) if isinstance(prompt, Prompt) else {}
