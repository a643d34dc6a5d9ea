"""Files or prompts, prompts from Python and from the hub, those that are held out, and when a run's are others."""

import random
import sys

import pytest

from noisepolicy.prompt import Prompt, metadata_of
from noisepolicy.training.config import TrainConfig
from noisepolicy.training.prompt_list import PromptList, is_prompt_file
from noisepolicy.training.prompt_records import identity, read_prompts
from noisepolicy.training.task import _hold_out, _without_repeats


def test_what_is_taken_for_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "a cat").write_text("a dog")
    words = [
        "AC/DC",
        "24/7",
        "a sign that says README.md",
        "v1.5",
        "and/or.",
        "hf: a face",
        "/imagine a cat",
        "a/b c",
        "x" * 5000,
        "a\0b",
    ]
    assert list(PromptList(words)) == words
    assert list(PromptList(["a cat"])) == ["a dog"]
    for missing in (
        "prompts.txt",
        "data/prompts.jsonl",
        "README.md",
        "P.CSV",
        "data/prompts",
        "./x",
        "/no/x",
        "/my files/a.txt",
        " a.txt ",
    ):
        with pytest.raises(ValueError, match=r"cannot read prompt file .*: no such file"):
            PromptList([missing])
    for folder in ("data", str(tmp_path)):
        with pytest.raises(ValueError, match="it is a folder"):
            PromptList([folder])
    for empty in ("", " "):
        with pytest.raises(ValueError, match="a prompt is empty"):
            PromptList([empty])
    assert (
        is_prompt_file("https://x.org/prompts") and not is_prompt_file("hf:a/b.csv") and not is_prompt_file("a cat.txt")
    )
    with pytest.raises(ValueError, match="a prompt is no valid Unicode text"):
        PromptList(["a \udcff cat"])


class TestFromPython:
    def test_text_and_records(self):
        assert read_prompts(prompt for prompt in ("a cat", "a dog ")) == ["a cat", "a dog"]
        prompts = read_prompts([{"caption": "a cat", "n": 1}, "a dog", Prompt("a hen", {"n": 2})])
        assert prompts == ["a cat", "a dog", "a hen"] and [metadata_of(prompt) for prompt in prompts] == [
            {"n": 1},
            {},
            {"n": 2},
        ]
        assert list(PromptList([["a cat"], "a dog", [{"Satz": "ein Bär"}]], "Satz")) == ["a cat", "a dog", "ein Bär"]
        assert read_prompts({"prompt": ["a cat"], "n": [1]}) == ["a cat"]
        for message, bad in {
            "got text": "a cat",
            "got a value of type bytes": b"a cat",
            "got a number": 3,
            "got a set": {"a cat"},
            "prompt 2: prompt is a number": ["a cat", 3],
            "prompt 1: no column is named": [{"n": 1}],
            "prompt 1: the field 'n' holds a value of type object": [{"prompt": "a cat", "n": object()}],
            "prompt 1: a field's name must be text, got 3": [{"prompt": "a cat", 3: 1}],
        }.items():
            with pytest.raises(ValueError, match=message):
                read_prompts(bad)
        with pytest.raises(ValueError, match="holds no prompt"):
            PromptList([[]])

    def test_datasets(self):
        datasets = pytest.importorskip("datasets")
        from PIL import Image

        features = datasets.Features(image=datasets.Image(), Caption=datasets.Value("string"), n=datasets.Value("int8"))
        rows = {"image": [Image.new("RGB", (4, 4))] * 3, "Caption": ["a cat", "a dog", "a hen"], "n": [0, 1, 2]}
        dataset = datasets.Dataset.from_dict(rows, features=features)
        for source in (dataset, dataset.to_iterable_dataset()):
            prompts = PromptList([source])
            assert list(prompts) == rows["Caption"] and metadata_of(prompts[2]) == {"n": 2}
        assert list(PromptList([dataset.select([2, 0])])) == ["a hen", "a cat"]
        mapped = dataset.to_iterable_dataset().map(lambda row: {"twice": 2 * row["n"]}, remove_columns="image")
        assert metadata_of(PromptList([mapped], "caption")[1]) == {"n": 1, "twice": 2}
        assert read_prompts(dataset["Caption"]) == rows["Caption"]
        assert read_prompts(dataset.remove_columns("image").to_pandas()) == rows["Caption"]
        with pytest.raises(ValueError, match="these are the splits 'train', 'test' of a dataset; give one of them"):
            read_prompts(datasets.DatasetDict(train=dataset, test=dataset))

    def test_a_run_takes_them(self, make_trainer, tmp_path):
        trainer = make_trainer(tmp_path, prompts=[{"prompt": "a", "n": 1}, {"prompt": "bb", "n": 2}], num_iterations=1)
        assert metadata_of(trainer._task.train_prompts[1]) == {"n": 2}
        list(trainer)
        with pytest.raises(ValueError, match="prompts: prompt 1: prompt is empty"):
            make_trainer(tmp_path / "empty", prompts=[""])


class TestHub:
    """`datasets` itself takes OWNER/NAME for a folder where there is one; the tests run without a network."""

    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        pytest.importorskip("datasets")
        monkeypatch.chdir(tmp_path)
        (tmp_path / "owner" / "name").mkdir(parents=True)
        return tmp_path / "owner" / "name"

    def test_a_dataset(self, folder):
        from datasets import Dataset

        Dataset.from_dict({"Prompt": ["a cat", "a dog"], "n": [1, 2]}).to_parquet(folder / "train.parquet")
        Dataset.from_dict({"Prompt": ["a hen"], "n": [3]}).to_parquet(folder / "validation.parquet")
        prompts = PromptList(["hf:owner/name", "hf:owner/name:validation", "hf:owner/name:train[1:]"])
        assert list(prompts) == ["a cat", "a dog", "a hen", "a dog"] and metadata_of(prompts[2]) == {"n": 3}
        with pytest.raises(ValueError, match=r"cannot read prompts from hf:owner/name:test: Unknown split"):
            PromptList(["hf:owner/name:test"])
        with pytest.raises(ValueError, match=r"no column is named 'Satz'"):
            PromptList(["hf:owner/name"], "Satz")
        (folder / "train.parquet").write_bytes(b"PAR1 no more")
        with pytest.raises(ValueError, match=r"cannot read prompts from hf:owner/name: .*Parquet"):
            PromptList(["hf:owner/name"])

    def test_what_cannot_be_loaded(self, folder, monkeypatch):
        with pytest.raises(RuntimeError, match=r"cannot read prompts from hf:nobody/nothing: .*nobody/nothing"):
            PromptList(["hf:nobody/nothing"])
        with pytest.raises(ValueError, match="cannot read prompts from hf:owner/name: "):
            PromptList(["hf:owner/name"])
        for name in ("hf:", "hf:name", "hf:a/b/c", "hf:../x", "hf:a/b:"):
            with pytest.raises(ValueError, match=r"is hf:owner/name or hf:owner/name:split, got hf:"):
                PromptList([name])
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ValueError, match=r"needs the package datasets: pip install 'noisepolicy\[datasets\]'"):
            PromptList(["hf:owner/name"])


class TestHoldOut:
    def test_a_fifth_always(self):
        source = random.Random(0)
        for count in (2, 3, 4, 5, 7, 8, 9, 10, 50, 301):
            for _ in range(20 if count < 50 else 2):
                texts = [f"prompt {source.getrandbits(60)}" for _ in range(count)]
                train, held_out = (set(part) for part in _hold_out(PromptList(texts)))
                assert len(held_out) == max(1, round(count / 5)) and train | held_out == set(texts)
                assert not train & held_out
                source.shuffle(texts)
                assert set(_hold_out(PromptList(texts))[1]) == held_out

    def test_a_text_is_on_one_side(self):
        texts = [f"prompt {number % 10}" for number in range(1000)]
        records = [{"prompt": text, "n": number} for number, text in enumerate(texts)]
        train, held_out = _hold_out(PromptList([texts, records]))
        assert len(set(held_out)) == 2 and len(held_out) == 400 and not set(train) & set(held_out)

    def test_one_prompt_is_too_few(self):
        for texts in (["a cat"], ["a cat"] * 5):
            with pytest.raises(ValueError, match=r"to hold some out for evaluation; give --eval-prompts FILE"):
                _hold_out(PromptList(texts))


def test_a_column_without_a_list_is_refused():
    with pytest.raises(ValueError, match="--prompt-column names a column of --prompts"):
        TrainConfig.of(prompt_column="text").check()


class TestIdentity:
    def test_text_is_itself_and_metadata_counts(self):
        assert identity("ein Bär") == identity(Prompt("ein Bär")) == "ein Bär".encode()
        others = [
            "a\nb",
            "a",
            Prompt("a", {"n": 1}),
            Prompt("a", {"n": 2}),
            Prompt("a", {"m": 1}),
            Prompt("a", {"n": "1"}),
        ]
        assert len({identity(prompt) for prompt in others}) == len(others)
        assert identity(Prompt("a", {"m": 1, "n": 2})) == identity(Prompt("a", {"n": 2, "m": 1}))

    def test_a_run_does_not_go_on_with_other_metadata(self, make_trainer, resume_trainer, tmp_path):
        prompts = [Prompt("a", {"n": 1, "prompt": "another"}), "bb"]
        list(make_trainer(tmp_path, prompts=prompts, num_iterations=1))
        assert [metadata_of(prompt) for prompt in resume_trainer(tmp_path)._task.train_prompts] == [
            {"n": 1, "prompt": "another"},
            {},
        ]
        kept = tmp_path / "prompts.jsonl"
        kept.write_text(kept.read_text().replace('"n": 1', '"n": 2'))
        with pytest.raises(ValueError, match="the training prompts are not those"):
            resume_trainer(tmp_path)

    def test_find_takes_a_text_once(self):
        assert _without_repeats(PromptList(["a red circle", "a red circle"])) == ["a red circle"]
        with pytest.raises(ValueError, match="the prompt 'a' comes twice, with different metadata"):
            _without_repeats([Prompt("a", {"n": 1}), Prompt("a", {"n": 2})])
