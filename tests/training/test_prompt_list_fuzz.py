"""Every content under every suffix, whole and damaged: the right prompts, or one line."""

import importlib.util
import io
import itertools
import json
import random

import pytest

from noisepolicy.training.prompt_list import PromptList

JSON_LINES = b'{"tag": "count", "prompt": "a photo of two cows"}\n{"tag": "colour", "prompt": "a photo of a red car"}\n'
COWS_AND_CAR = ["a photo of two cows", "a photo of a red car"]
CSV = b'Prompts,Category,Note\n"A red car, and a white sheep.",Colors,x\nA green cup on a blue table.,Positional,y\n'
CAR_AND_CUP = ["A red car, and a white sheep.", "A green cup on a blue table."]


@pytest.fixture
def read(tmp_path):
    """Writes a file and reads its prompts."""

    def read(name, content, column=None):
        (tmp_path / name).unlink(missing_ok=True)  # some file systems wait for the disk where a file is overwritten
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return list(PromptList([str(tmp_path / name)], column))

    return read


def parquet_contents():
    """A Parquet file, where pyarrow is installed."""
    if importlib.util.find_spec("pyarrow") is None:
        return {}
    from pyarrow import parquet, table

    sink = io.BytesIO()
    parquet.write_table(table({"prompt": COWS_AND_CAR, "n": [1, 2]}), sink)
    return {"Parquet": (sink.getvalue(), COWS_AND_CAR)}


CONTENTS = {
    "text": (b"a cat\na dog, in red\n", ["a cat", "a dog, in red"]),
    "quoted text": (b'"a cat"\n"a dog"\n', ["a cat", "a dog"]),
    "JSON lines": (JSON_LINES, COWS_AND_CAR),
    "JSON strings": (b'"a cat"\n"a dog"', ["a cat", "a dog"]),
    "one object": (b'{"prompt": "a cat"}\n', ["a cat"]),
    "JSON list": (json.dumps(COWS_AND_CAR).encode(), COWS_AND_CAR),
    "indented list": (json.dumps([{"prompt": text} for text in COWS_AND_CAR], indent=1).encode(), COWS_AND_CAR),
    "object with a list": (json.dumps({"data": COWS_AND_CAR}, indent=1).encode(), COWS_AND_CAR),
    "CSV": (CSV, CAR_AND_CUP),
    "one column": (b"caption\na cat\na dog\n", ["a cat", "a dog"]),
    "TSV": (b"Prompts\tn\na cat\t1\na dog, in red\t2\n", ["a cat", "a dog, in red"]),
    "UTF-16": ("a cat\na dog\n".encode("utf-16"), []),
    "UTF-16 without mark": ("a cat\na dog\n".encode("utf-16-le"), []),
    "Latin-1": (b"caf\xe9\n", []),
    "zip": (b"PK\x03\x04\x14\0\0\0", []),
    "gzip": (b"\x1f\x8b\x08\0abc", []),
    "pickle": (b"\x80\x04\x95\x0b\0\0\0\0\0\0\0]\x94\x8c\x05a cat\x94a.", []),
    "PNG": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", []),
    "nothing": (b"", []),
    "YAML": (b"prompts:\n- a cat\n", []),
    "no prompts": (b'{"a": 1}\n{"a": 2}\n', []),
}
MUST_BE_READ = {
    "txt": {
        "text",
        "quoted text",
        "JSON lines",
        "JSON strings",
        "one object",
        "JSON list",
        "indented list",
        "object with a list",
        "Parquet",
    },
    "jsonl": {
        "quoted text",
        "JSON lines",
        "JSON strings",
        "one object",
        "JSON list",
        "indented list",
        "object with a list",
        "Parquet",
    },
    "json": {
        "quoted text",
        "JSON lines",
        "JSON strings",
        "one object",
        "JSON list",
        "indented list",
        "object with a list",
        "Parquet",
    },
    "csv": {
        "CSV",
        "TSV",
        "one column",
        "JSON lines",
        "one object",
        "JSON list",
        "indented list",
        "object with a list",
        "Parquet",
    },
    "parquet": {"Parquet"},
    "md": set(),
    "yaml": set(),
    "xlsx": set(),
    "gz": set(),
    "pkl": set(),
}
MUST_BE_READ |= {"": MUST_BE_READ["txt"], "ndjson": MUST_BE_READ["jsonl"], "tsv": MUST_BE_READ["csv"]}


@pytest.mark.parametrize("suffix", MUST_BE_READ)
def test_every_content_under_every_suffix_is_read_rightly_or_refused(read, suffix):
    contents = CONTENTS | parquet_contents()
    was_read = set()
    for kind, (content, expected) in contents.items():
        for mark, end in itertools.product((b"", b"\xef\xbb\xbf"), (b"\n", b"\r\n")):
            if (mark or end != b"\n") and not kind.startswith(("text", "JSON", "CSV", "TSV")):
                continue
            try:
                prompts = read(f"prompts.{suffix}".rstrip("."), mark + content.replace(b"\n", end))
            except ValueError as error:
                assert len(str(error).splitlines()) == 1, kind
            else:
                was_read.add(kind)
                assert prompts == expected, kind
    assert was_read == MUST_BE_READ[suffix] & set(contents)


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "csv", "tsv", "parquet"])
def test_damaged_files_give_prompts_or_one_line(read, suffix, soak):
    """Bytes changed, inserted, cut out and doubled at random: no other exception, and no braces where JSON began."""
    source = random.Random(suffix)
    contents = [content for content, _ in (CONTENTS | parquet_contents()).values()]
    for _ in range(100_000 if soak else 600):
        content = bytearray(source.choice(contents))
        for _ in range(source.randint(1, 3)):
            place = source.randint(0, len(content))
            piece = source.choice(
                [
                    b'"',
                    b",",
                    b"\n",
                    b"\r",
                    b"{",
                    b"}",
                    b"[",
                    b"]",
                    b"\\",
                    b"\t",
                    b"\xff",
                    b"\0",
                    b"#",
                    b";",
                    b'""',
                    b"\\u",
                ]
            )
            what = source.randrange(4)
            if what == 0:
                content[place : place + 1] = piece
            elif what == 1:
                content[place:place] = piece
            elif what == 2:
                del content[place : place + source.randint(1, 20)]
            else:
                content[place:place] = content[place : place + source.randint(1, 20)]
        try:
            prompts = read(f"prompts.{suffix}", bytes(content))
        except ValueError as error:
            assert len(str(error).splitlines()) == 1, bytes(content)
        else:
            assert prompts and all(prompt.strip() for prompt in prompts), bytes(content)
            assert not any(prompt.startswith('{"') for prompt in prompts), bytes(content)
