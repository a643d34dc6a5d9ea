"""Settings files that somebody else wrote: refused in one line, in little time and memory."""

import pytest

from noisepolicy.training.config import load_config

PAIRS = [(f"k{number}", f"k{number + 1}") for number in range(40)]  # each twice the one before
BOMB = "k0: &k0 [x, x]\n" + "".join(f"{name}: &{name} [*{last}, *{last}]\n" for last, name in PAIRS)
MERGED = "k0: &k0 {bands: 4}\n" + "".join(f"{name}: &{name} {{<<: [*{last}, *{last}]}}\n" for last, name in PAIRS)
CASES = {
    "code": ("model: !!python/object/apply:os.system ['touch ran']", "cannot read settings"),
    "name": ("model: !!python/name:os.system", "cannot read settings"),
    "aliases": (BOMB, "aliases are not taken"),
    "merged aliases": (MERGED, "aliases are not taken"),
    "deep": ("prompts: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
    "no timestamp": ("license: !!timestamp x", "cannot read settings"),
    "no number": ("bands: !!int ''", "cannot read settings"),
    "no truth": ("tensorboard: !!bool 3", "cannot read settings"),
    "a day that is none": ("license: 2001-99-99", "cannot read settings"),
    "infinite count": ("bands: .inf", "bands must be a whole number, got inf"),
    "fraction": ("num_iterations: 2.5", "num_iterations must be a whole number, got 2.5"),
    "truth for a number": ("bands: true", "bands must be a whole number, got True"),
    "truth for a text": ("scheduler: true", "scheduler must be text, got True"),
    "mapping": ("prompts: {a: 1}", "prompts must be text"),
    "list of lists": ("prompts: [[a], [b]]", "prompts must be text"),
    "bytes": ("model: !!binary aaaa", "model must be like 'shapes'"),
    "set": ("prompts: !!set {a}", "prompts must be text"),
    "long number": ("learning_rate: 1" + "0" * 4000, "learning_rate must be a number"),
    "longer number": ("seed: " + "9" * 5000, "cannot read settings"),
    "unknown": ("__class__: x", "unknown setting '__class__'"),
    "a key that is no name": ("? [a]\n: 1", "cannot read settings"),
    "not text": (b"\xff\xfe\x00", "cannot read settings"),
    "control characters": ("model: a\x00b", "cannot read settings"),
}


@pytest.mark.parametrize("name", CASES)
def test_settings_that_are_none(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, reason = CASES[name]
    (tmp_path / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=reason) as raised:
        load_config(tmp_path / "config.yaml")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 1000
    assert not (tmp_path / "ran").exists()


def test_a_file_of_any_length_is_not_read(tmp_path):
    with open(tmp_path / "config.yaml", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="more than 4194304 bytes"):
        load_config(tmp_path / "config.yaml")


def test_what_is_meant_is_still_read(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "learning_rate: 1e-3\nkl_budget: .inf\nbands: '4'\nnum_iterations: 5.0\nlicense: 2001-01-01\nprompts: [a, 5]\n"
        "num_inference_steps: 4\nheight: null\nclip_range: 1\n"
    )
    config = load_config(tmp_path / "config.yaml")
    assert (config.learning_rate, config.kl_budget, config.bands, config.num_iterations) == (1e-3, float("inf"), 4, 5)
    assert (config.license, config.prompts, config.num_inference_steps) == ("2001-01-01", ("a", "5"), (4,))
    assert config.model.height is None and isinstance(config.clip_range, float)
