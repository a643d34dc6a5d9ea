"""A CLIP tokenizer for the captions: byte-level BPE that makes each word of the world one token.

The vocabulary is CLIP's own kind (every byte, every byte at a word's end, then the merges), so any text tokenizes.
"""

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

from noisepolicy.storage import write_json, write_text
from noisepolicy.worlds.shapes.captions import COLORS, DIRECTIONS, SHAPES

WORDS = ("a", "and", *COLORS, *SHAPES, *(word for text in DIRECTIONS for word in text.split()))
MAX_TOKENS = 20
"""Length of a prompt: start token, 15 words and commas, end token, and three more, which have read the caption."""

_START, _END, _WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


def build_tokenizer(folder: Path, words: Iterable[str] = WORDS, *, max_tokens: int = MAX_TOKENS) -> CLIPTokenizer:
    """Writes `vocab.json` and `merges.txt` to `folder` and loads them as a `CLIPTokenizer`.

    Args:
        words: Words that are to be one token each. Default: the image world's.
        max_tokens: Length of a prompt in tokens.
    """
    merges = _learn_merges([[*word[:-1], word[-1] + _WORD_END] for word in dict.fromkeys(words)])

    alphabet = list(_byte_symbols())
    tokens = [*alphabet, *(symbol + _WORD_END for symbol in alphabet), *(a + b for a, b in merges), _START, _END]
    write_json(folder / "vocab.json", {token: index for index, token in enumerate(dict.fromkeys(tokens))})
    write_text(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        unk_token=_END,
        bos_token=_START,
        eos_token=_END,
        pad_token=_END,
        model_max_length=max_tokens,
    )


def _learn_merges(words: list[list[str]]) -> list[tuple[str, str]]:
    """Run byte-pair encoding (Sennrich et al., arXiv 1508.07909) until every word is one symbol."""
    merges = []
    while pairs := Counter(pair for word in words for pair in pairwise(word)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        words = [_merge(word, best) for word in words]
    return merges


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in word:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def _byte_symbols() -> list[str]:
    """Return GPT-2's printable symbols of the 256 bytes: printable bytes are themselves, the others start at U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
