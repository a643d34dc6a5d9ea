"""Damaged run files: a run goes on to the same bits, or says what is wrong and touches nothing."""

import os
import shutil

import pytest

from noisepolicy.policies import NoisePolicy
from noisepolicy.training.run_folder import RunFolder

pytestmark = pytest.mark.slow


def flip(path, place=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 16
    path.write_bytes(data)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    path.write_bytes(b"")


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def replace(old, new):
    return lambda path: path.write_bytes(path.read_bytes().replace(old, new, 1))


def cut_within(word):
    return lambda path: os.truncate(path, path.read_bytes().index(word.encode()) + 5)


def lines(count):
    return lambda path: path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:count]))


def newest(run):
    return max((run.path / "checkpoints").iterdir())


GOES_ON = {
    "checkpoint flipped": (newest, flip, "skipping damaged checkpoint"),
    "checkpoint's header flipped": (newest, lambda path: flip(path, 0.0001), "skipping damaged checkpoint"),
    "checkpoint cut": (newest, cut, "cut short or damaged"),
    "checkpoint emptied": (newest, empty, "is empty"),
    "checkpoint gone": (newest, remove, ""),
    "last row flipped": ("history/rows.bin", lambda path: flip(path, 0.999), "rows.bin is damaged"),
    "prompts flipped": ("prompts/rows.bin", flip, "the run's prompts are encoded again"),
    "prompts gone": ("prompts", remove, "the run's prompts are encoded again"),
    "policy gone": ("policy", remove, ""),
    "policy flipped": ("policy/policy.safetensors", flip, ""),
    "metrics gone": ("metrics.jsonl", remove, "metrics.jsonl lacks"),
    "line of metrics flipped": (
        "metrics.jsonl",
        replace(b'{"iteration"', b'{"iter\xffation"'),
        "line 1 of run/metrics",
    ),
}


@pytest.mark.parametrize("case", GOES_ON)
def test_goes_on_to_the_same_bits(stopped_run, whole_run, case):
    place, damage, warning = GOES_ON[case]
    path = place(stopped_run) if callable(place) else stopped_run.path / place
    damage(path)
    stopped_run.resume()
    stopped_run.finish().assert_same(whole_run, metrics="metrics" not in case)
    assert warning in stopped_run.stderr and ("warning:" in stopped_run.stderr) == bool(warning)


REFUSED = {
    "checkpoints gone": ("checkpoints", remove, "no checkpoint in run/checkpoints can be used; nothing was changed"),
    "first row flipped": ("history/rows.bin", lambda path: flip(path, 0.0), "no checkpoint in run/checkpoints"),
    "rows gone": ("history/rows.bin", remove, "no checkpoint in run/checkpoints can be used"),
    "rows emptied": ("history/rows.bin", empty, "no checkpoint in run/checkpoints can be used"),
    "history's header cut": ("history/header.json", cut, "no checkpoint in run/checkpoints can be used"),
    "settings gone": ("config.yaml", remove, "is not a run folder (there is no run/config.yaml)"),
    "settings emptied": ("config.yaml", empty, "must hold a YAML mapping"),
    "settings cut": ("config.yaml", cut_within("rollout_batch_size"), "cannot read settings from run/config.yaml"),
    "settings cut at a line": ("config.yaml", lines(45), "but its checkpoints were made with"),
    "a setting altered": ("config.yaml", replace(b"seed: 0", b"seed: 1"), "says seed is 1, but its checkpoints were"),
    "a setting's name flipped": ("config.yaml", replace(b"seed", b"sead"), "unknown setting 'sead'"),
    "prompts altered": ("../prompts.txt", replace(b"bb", b"bc"), "prompts are not those that the run's checkpoints"),
    "prompts gone": ("../prompts.txt", remove, "copy/prompts.txt: no such file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_and_nothing_is_touched(stopped_run, case):
    place, damage, message = REFUSED[case]
    damage(stopped_run.path / place)
    before = stopped_run.content()
    stopped_run.resume()
    assert stopped_run.wait() == 2, stopped_run.stderr
    assert message in stopped_run.error
    assert stopped_run.content() == before


def test_both_checkpoints_damaged(stopped_run):
    for number, path in enumerate((stopped_run.path / "checkpoints").iterdir()):
        (flip, cut)[number % 2](path)
    before = stopped_run.content()
    stopped_run.resume()
    assert stopped_run.wait() == 2 and "no checkpoint in run/checkpoints can be used" in stopped_run.error
    assert stopped_run.stderr.count("skipping damaged checkpoint") == 2
    assert stopped_run.content() == before


def test_a_folder_whose_settings_are_gone_is_not_started_anew(stopped_run):
    (stopped_run.path / "config.yaml").unlink()
    before = stopped_run.content()
    stopped_run.start_new()
    assert stopped_run.wait() == 2 and "checkpoints of a run whose config.yaml is gone" in stopped_run.error
    assert stopped_run.content() == before


@pytest.mark.parametrize("damage", [flip, cut, empty, remove], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("file", ["config.json", "policy.safetensors"])
def test_a_damaged_policy_is_not_loaded(stopped_run, file, damage):
    damage(stopped_run.path / "policy" / file)
    run = RunFolder(stopped_run.path)
    with pytest.raises((ValueError, FileNotFoundError), match=r"run/policy|has no policy yet"):
        NoisePolicy.from_pretrained(run.checked_policy())


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        lambda path: path.write_text("[]"),
        lambda path: path.write_text('{"images_trained": 9, "train_seconds": 1.0, "seconds": {"policy": "<b>"}}'),
    ],
    ids=["cut", "a list", "a text for a number"],
)
def test_a_damaged_summary_says_how_to_write_it_again(whole_run, tmp_path, damage):
    shutil.copytree(whole_run.path, tmp_path / "run")
    damage(tmp_path / "run" / "summary.json")
    with pytest.raises(ValueError, match=r"summary.json is damaged .* write it again with: noisepolicy-train --resume"):
        RunFolder(tmp_path / "run").read_summary()
