"""Prompt lists as people have them: each format, what is refused, streaming, and damaged files under every suffix."""

import csv
import importlib.util
import io
import itertools
import json
import random
import sys
import zlib

import numpy as np
import pytest

from noisepolicy.prompt import Prompt, metadata_of
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


def parquet(table):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    sink = io.BytesIO()
    parquet.write_table(pyarrow.table(table), sink)
    return sink.getvalue()


def test_text_files(read, tmp_path):
    content = "\ufeff# of animals\na cat\r\n\n  ein Bär \n\t#1: commented out\n\u3000 zwölf Bären\t\r\na dog".encode()
    assert read("prompts.txt", content) == ["a cat", "ein Bär", "zwölf Bären", "a dog"]
    assert read("prompts", content) == read("PROMPTS.TXT", content) == read("p.prompts", content)
    assert list(PromptList(["A dog and a cat", str(tmp_path / "prompts"), " a hen "]))[::4] == [
        "A dog and a cat",
        "a dog",
    ]
    for message, bad in {
        r"not UTF-8 \(byte 12\); save it as UTF-8": b"a cat\n\n  caf\xe9\n",
        "holds no prompt": b"\n \n# a cat\n",
        "line 1: holds the control character": b"a cat\ra dog\r",
        "line 2: holds a zero byte": b"a cat\na\0 dog",
        "line 2: starts like JSON": b'a cat\n{"prompt": "a dog"}\n',
        "is UTF-16": "a cat\n".encode("utf-16"),
        "is compressed": b"\x1f\x8b\x08\0\0\0\0",
        "is a zip archive or an office document": b"PK\x03\x04",
        "is a PDF": b"%PDF-1.7",
    }.items():
        with pytest.raises(ValueError, match=message):
            read("bad.txt", bad)
    with pytest.raises(ValueError, match="is a pipe or device"):
        PromptList(["/dev/null"])
    with pytest.raises(ValueError, match=r"line 1: is longer than 64 MB"):
        read("one_line.txt", b"a" * (64 * 2**20 + 1))


def test_weights_and_wildcards_in_brackets_are_text(read):
    lines = ["[[a cat]] on a mat", "[a cat:a dog:0.5]", "{red|blue} car", "{{a|b}} c", "(a hen:1.2), [low quality]"]
    assert read("prompts.txt", "\n".join(lines)) == lines


def test_json_lines(read):
    assert read("prompts.jsonl", JSON_LINES) == COWS_AND_CAR
    assert read("prompts.jsonl", b'\xef\xbb\xbf"a cat"\r\n\r\n "a \\u0062ear\\n" \n') == ["a cat", "a bear"]
    assert read("one.jsonl", '{"Caption": " a\\ncat ", "n": [1, null]}') == ["a\ncat"]
    prompts = read("prompts.ndjson", JSON_LINES)
    assert all(isinstance(prompt, Prompt) for prompt in prompts)
    assert [metadata_of(prompt) for prompt in prompts] == [{"tag": "count"}, {"tag": "colour"}]
    # The first record's field is everybody's: the third is not read from another one.
    with pytest.raises(
        ValueError, match=r"prompts.jsonl, line 4: the field 'prompt' is missing; the fields are 'text'"
    ):
        read("prompts.jsonl", b"\n" + JSON_LINES + b'{"text": "a cat"}\n')


@pytest.mark.parametrize("suffix", ["jsonl", "json", "txt", "csv"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a cat"', "line 3: this is not JSON"),
        ("a cat", "line 3: this is not JSON"),
        ("12", "line 3: prompt is a number, not text"),
        ('["a cat"]', "line 3: prompt is a list, not text"),
        ('{"tag": "a"}', "line 3: the field 'prompt' is missing; the fields are 'tag'"),
        ('{"prompt": null}', "line 3: 'prompt' is empty"),
        ('{"prompt": " "}', "line 3: 'prompt' is empty"),
        ('{"prompt": ["a cat"]}', "line 3: 'prompt' is a list, not text"),
        ('{"prompt": "\\ud800"}', "line 3: 'prompt' is no valid Unicode text"),
        ('{"prompt": ' + "[" * 100_000, "line 3: JSON is nested too deeply"),
        ('{"prompt": ' + "9" * 5000 + "}", "line 3: "),
    ],
)
def test_a_bad_line_of_json_is_named(read, suffix, line, message):
    with pytest.raises(ValueError, match=message):
        read(f"prompts.{suffix}", JSON_LINES.decode() + line + "\n" + JSON_LINES.decode())


def test_json_lists(read):
    for suffix, indent in itertools.product(("json", "jsonl", "txt"), (None, 2)):
        name = f"prompts.{suffix}"
        records = [{"prompt": "a cat", "n": 1}, {"prompt": "a dog", "n": 2}]
        assert read(name, json.dumps(["a cat", " a dog "], indent=indent)) == ["a cat", "a dog"]
        prompts = read(name, json.dumps(records, indent=indent))
        assert prompts == ["a cat", "a dog"] and metadata_of(prompts[1]) == {"n": 2}
        if indent:
            assert read(name, json.dumps({"version": 1, "data": records}, indent=indent)) == prompts
    assert read("a.json", '{"prompts": ["a cat", "a dog"], "tags": ["x"]}') == ["a cat", "a dog"]
    assert read("a.json", '{"prompt": "a cat", "n": 1}') == ["a cat"]
    assert read("a.json", '{"caption": "a cat"}\n{"caption": "a dog"}') == ["a cat", "a dog"]
    columns = read("a.json", '{"prompt": ["a cat", "a dog"], "tag": ["x", "y"]}')
    assert columns == ["a cat", "a dog"] and metadata_of(columns[1]) == {"tag": "y"}
    for message, bad in {
        "holds no prompt": "[]",
        "this is not JSON": '["a cat", "a dog"',
        "prompt 2: prompt is empty": '["a cat", ""]',
        "prompt 1: prompt is a list": '[["a cat"]]',
        "prompt 2: the field 'prompt' is missing": '[{"prompt": "a cat"}, {"text": "a dog"}]',
        "not clear which of 'train', 'test'": '{"train": ["a cat"], "test": ["a dog"]}',
        "not clear which of 'prompt', 'parts'": '{"prompt": "a cat", "parts": [1]}',
        "no column is named prompt, caption or text": '{"a": {"prompt": "a cat"}}',
        "line 1: prompt is a number": "3",
        "nested too deeply": "[" * 100_000,
    }.items():
        with pytest.raises(ValueError, match=message):
            read("bad.json", bad)


def test_csv_and_tsv(read):
    prompts = read("prompts.csv", CSV)
    assert prompts == CAR_AND_CUP and metadata_of(prompts[0]) == {"Category": "Colors", "Note": "x"}
    rows = [["id", "Prompt", "note"], ["1", 'a "red", car', "two\nlines"], ["2", "a\r\nhen", ""], ["3", "ein Bär", '"']]
    for delimiter, suffix, end in itertools.product(",\t;", ("csv", "tsv"), ("\n", "\r\n")):
        sink = io.StringIO()
        csv.writer(sink, delimiter=delimiter, lineterminator=end).writerows(rows)
        prompts = read(f"prompts.{suffix}", "\ufeff" + sink.getvalue() + end)
        assert prompts == ['a "red", car', "a\r\nhen", "ein Bär"]
        assert metadata_of(prompts[0]) == {"id": "1", "note": "two\nlines"}
    assert read("one.csv", "prompt\n\na cat\n  \na dog") == ["a cat", "a dog"]
    assert read("edge.csv", "prompt,,\na cat,,\n") == ["a cat"]  # as spreadsheets leave them
    # Quotes are text in PartiPrompts.tsv, of which one prompt starts with them.
    assert read("p.tsv", 'Prompt\tn\n"G I G G L E" painted\t1\na "red" car\t2\n') == [
        '"G I G G L E" painted',
        'a "red" car',
    ]
    assert read("p.tsv", 'Prompt\tn\n"never closed\t1\na cat\t2\n3 "\t3\n') == ['"never closed', "a cat", '3 "']
    with pytest.raises(ValueError, match="line 3: double quotes enclose a field here, but are text in another row"):
        read("p.tsv", 'Prompt\tn\n"G I" painted\t1\n"a ""red"" car"\t2\n')
    assert read("stray.tsv", 'Prompt\tn\na 5" screen\t1\n') == ['a 5" screen']


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "a cat,animals\na dog,animals\n",
            "no column is named prompt, caption or text; the columns are 'a cat', 'animals'",
        ),
        ("a cat\na dog\n", "its first row must name the columns"),
        ("prompt,n\na cat,1\na red, car,2\n", "line 3: the row has 3 fields, but the header has 2"),
        ("prompt,n\na cat\n", "line 2: the row has 1 fields"),
        ('prompt,n\na cat,1\n\n"a ""red""\ncar",2\n"never closed,3\na dog,4\n', "line 6: unexpected end of data"),
        ('prompt,n\n"a" cat,1\n', "line 2: ',' expected after"),
        ("prompt,n\na cat,1\n ,2\n", "line 3: 'prompt' is empty"),
        ("prompt,n,n\na cat,1,2\n", "two columns are named 'n'"),
        ("prompt,Prompt\na cat,a dog\n", "the prompt may be in any of 'prompt', 'Prompt'"),
        ("prompt,n\n", "holds no prompt"),
        ('""\n', "holds no prompt"),
        ("prompt\ra cat\ra dog", "its first row cannot be read .new-line character"),
        ("prompt,n\na c\0at,1\n", "line 2: holds a zero byte"),
        ("prompt,n\n" + "a" * 200_000 + ",1\n", "line 2: field larger than field limit"),
    ],
)
def test_tables_that_are_none(read, content, message):
    with pytest.raises(ValueError, match=message):
        read("bad.csv", content)


def test_a_table_named_as_text_is_refused(read):
    for first in ("Prompts,Category,Note", "prompt", "id\tcaption", '"text";"n"', "# mine\nPrompt", "prompts:"):
        for name in ("prompts.txt", "prompts"):
            with pytest.raises(ValueError, match="as a table with a column"):
                read(name, first + "\na cat\n")
    with pytest.raises(ValueError, match="as a table with a column 'Satz'"):
        read("prompts.txt", "id,Satz\n1,ein Bär\n", "satz")
    assert read("prompts.txt", "a text, in red\na prompt reply") == ["a text, in red", "a prompt reply"]


def test_quoted_lines_of_a_text_file_lose_their_quotes_together(read):
    assert read("prompts.txt", '"a cat"\n"a \\"big\\" dog"\n') == ["a cat", 'a "big" dog']
    assert read("prompts.txt", '"Hello" he said\n"a dog"\n') == ['"Hello" he said', '"a dog"']


def test_the_column_can_be_named(read):
    content = '{"Satz": "ein Bär", "prompt": "a bear"}\n'
    for name in ("a.jsonl", "a.json"):
        assert read(name, content) == ["a bear"]
        assert read(name, content, "Satz") == read(name, content, "satz ") == ["ein Bär"]
        with pytest.raises(
            ValueError, match=r"no column is named 'text'; the columns are 'Satz', 'prompt'; --prompt-col"
        ):
            read(name, content, "text")
    both = "Text,text\na cat,a dog\n"
    assert read("a.csv", both, "text") == ["a dog"] and read("a.csv", both, "Text") == ["a cat"]
    assert read("a.csv", "id,caption,prompt\n1,a cat,a dog\n") == ["a dog"]  # in the order of preference
    assert metadata_of(read("a.csv", "id,caption,prompt\n1,a cat,a dog\n", "caption")[0])["prompt"] == "a dog"


def test_parquet(read, tmp_path):
    table = {
        "id": [1, None],
        "Prompt": ["a cat", " a dog "],
        "image": [{"bytes": b"\xff", "path": "a"}] * 2,
        "box": [{"x": [1.5]}, None],
    }
    data = parquet(table)
    for name in ("a.parquet", "a.pq", "a.txt", "a.csv"):
        prompts = read(name, data)
        assert prompts == ["a cat", "a dog"]
        assert [metadata_of(prompt) for prompt in prompts] == [
            {"id": 1, "box": {"x": [1.5]}},
            {"id": None, "box": None},
        ]
    assert read("a.parquet", parquet({"Satz": ["ein Bär"], "n": [1]}), "Satz") == ["ein Bär"]
    for message, bad in {
        "row 2: 'prompt' is empty": parquet({"prompt": ["a cat", None]}),
        "row 1: 'prompt' is a number": parquet({"prompt": [1]}),
        "row 1: 'prompt' is a value of type bytes": parquet({"prompt": [b"a cat"]}),
        "the columns are 'a', 'b'": parquet({"a": [1], "b": [2]}),
        "holds no prompt": parquet({"prompt": []}),
        "is not Parquet": b"a cat\n",
        "cannot read it as Parquet": data[:-9],
    }.items():
        with pytest.raises(ValueError, match=message):
            read("bad.parquet", bad)


def test_parquet_without_its_package_names_the_extra(read, monkeypatch):
    data = parquet({"prompt": ["a cat"]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"reading Parquet needs pyarrow: pip install 'noisepolicy\[datasets\]'"):
        read("a.parquet", data)


@pytest.mark.parametrize("suffix", ["yaml", "md", "xlsx", "docx", "gz", "pkl", "txt.gz", "html", "v2"])
def test_files_of_other_kinds_are_refused(read, suffix):
    with pytest.raises(ValueError, match=r"a prompt file is text \(.txt, one prompt a line\), .jsonl"):
        read(f"prompts.{suffix}", "a cat\na dog\n")


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("p.txt", ["  a cat  ", "a dog"]),
        ("p.jsonl", ['{"prompt": "a cat", "n": 1}', '{"prompt": "a dog", "n": 2}']),
        ("p.csv", ['"a cat",1', '"a dog",2']),
    ],
)
def test_a_change_of_a_file_in_use_is_noticed(tmp_path, name, lines):
    head = "prompt,n\n" if name.endswith("csv") else ""
    (tmp_path / name).write_text(head + "\n".join(lines))
    prompts = PromptList([str(tmp_path / name), "a hen"])
    assert prompts[:] == ["a cat", "a dog", "a hen"] and prompts[-1] == "a hen"
    for changed in (lines[1].replace("dog", "cow"), lines[1].replace("2", "3"), ""):
        if changed != lines[1]:
            (tmp_path / name).write_text(head + lines[0] + "\n" + changed)
            assert prompts[0] == "a cat"
            with pytest.raises(ValueError, match=f"{name} was changed while it was in use"):
                prompts[1]


def test_selections_read_the_same_records(tmp_path):
    rows = [{"prompt": f"prompt {number}\n" * (number % 3 + 1), "n": number} for number in range(100)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" * (row["n"] % 4 + 1) for row in rows))
    prompts = PromptList(["a cat", str(tmp_path / "p.jsonl")])
    wanted = np.arange(101) % 7 == 3
    chosen = prompts.select(wanted)
    assert [metadata_of(prompt)["n"] for prompt in chosen] == [n for n in range(100) if (n + 1) % 7 == 3]
    assert (chosen.crc32 == [zlib.crc32(prompt.encode()) for prompt in chosen]).all()


def parquet_contents():
    """A Parquet file, where pyarrow is installed."""
    if importlib.util.find_spec("pyarrow") is None:
        return {}
    return {"Parquet": (parquet({"prompt": COWS_AND_CAR, "n": [1, 2]}), COWS_AND_CAR)}


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
