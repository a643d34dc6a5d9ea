"""Finding rewards, and refusing what they must not return."""

import subprocess
import sys

import pytest
import torch

from noisepolicy.rewards import Reward, RewardError, load_reward
from noisepolicy.rewards.cache import CachedReward
from noisepolicy.rewards.registry import outside_parts, with_absolute_paths, without_folders

IMAGES, PROMPTS = torch.rand(2, 3, 8, 8), ["one", "two"]


def test_named_reward_gives_dense_and_strict_scores():
    prompts = ["a red circle, a blue square and a green triangle from left to right"] * 2
    metrics = load_reward("shapes").metrics(torch.rand(2, 3, 64, 64), prompts)
    assert set(metrics) == {"reward", "strict"} and metrics["reward"].shape == (2,)


def test_module_function(tmp_path, monkeypatch):
    (tmp_path / "brightness_reward.py").write_text(
        "def brightness(images, prompts):\n    return images.mean((1, 2, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    reward = load_reward("brightness_reward:brightness")
    torch.testing.assert_close(reward(IMAGES, PROMPTS), IMAGES.mean((1, 2, 3)), check_dtype=False)
    assert set(reward.metrics(IMAGES, PROMPTS)) == {"reward"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pretty", "unknown reward 'pretty'; choose from"),
        ("no_such_module:f", "cannot import 'no_such_module'"),
        ("math:no_such_function", "has no 'no_such_function'"),
        ("math:pi", "not callable"),
        ("0.7*red + pretty", "unknown reward 'pretty'"),
        ("x*red", "the weight 'x' is not a number"),
        ("2e*red", "the weight '2e' is not a number"),
        ("nan*red", "must be finite and not zero"),
        ("0*red", "must be finite and not zero"),
        ("red + ", "a reward is missing"),
        ("2*", "a reward is missing"),
        ("", "a reward is missing"),
        ("red + 2*red", "'red' appears twice"),
        ("red(x)", "red takes no argument"),
        ("frames", "needs a reward in parentheses"),
        ("frames()", "needs a reward in parentheses"),
        ("frames(red", "parentheses do not match"),
        ("red) + (blue", "parentheses do not match"),
        ("clipscore(/no/such/folder)", "no such folder: '/no/such/folder'"),
        ("clipscore(a, b)", "2 folders or ids; it takes 1 at most"),
        ("pickscore(no-such/model)", "no-such/model"),
        ("aesthetic(no-such/model)", "cannot get model.safetensors of no-such/model"),
        ("pickscore", r"weights already on disk: pickscore\(FOLDER\)"),
        ("raw", "needs an address in parentheses"),
        ("raw(ftp://host)", "is not an address"),
        ("http://user:secret@host", "is not an address"),
        ("http://host/a b", "percent-encoded"),
    ],
)
def test_what_cannot_be_loaded(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        load_reward(spec)
    assert "\n" not in str(error.value)


def test_weighted_sum_tells_its_parts():
    reward = load_reward("0.7*red + -0.5 * brightness+sharpness")
    red, brightness, sharpness = (load_reward(name)(IMAGES, PROMPTS) for name in ("red", "brightness", "sharpness"))
    metrics = reward.metrics(IMAGES, PROMPTS)
    assert list(metrics) == ["reward", "red", "brightness", "sharpness"]
    torch.testing.assert_close(metrics["reward"], 0.7 * red - 0.5 * brightness + sharpness, check_dtype=False)
    torch.testing.assert_close(metrics["red"], red, check_dtype=False)
    torch.testing.assert_close(reward(IMAGES, PROMPTS), metrics["reward"], check_dtype=False)
    torch.testing.assert_close(load_reward("2*red")(IMAGES, PROMPTS), 2 * red, check_dtype=False)


def test_strict_is_kept_where_one_part_defines_it():
    prompts = ["a red circle, a blue square and a green triangle from left to right"] * 2
    images = torch.rand(2, 3, 64, 64)
    assert set(load_reward("shapes + 0.1*red").metrics(images, prompts)) == {"reward", "shapes", "red", "strict"}
    assert "strict" not in load_reward("shapes + cached(shapes)").metrics(images, prompts)


def test_a_failing_part_is_named(tmp_path, monkeypatch):
    (tmp_path / "failing_reward.py").write_text("def fail(images, prompts):\n    raise KeyError('gone')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RewardError, match=r"^reward 'failing_reward:fail' raised KeyError: 'gone'$"):
        load_reward("red + failing_reward:fail")(IMAGES, PROMPTS)
    (tmp_path / "odd_metrics.py").write_text(
        "class Odd:\n    def metrics(self, i, p):\n        return {'strict': 1}\n"
        "    def __call__(self, i, p):\n        return [1.0, 2.0]\nodd = Odd()\n"
    )
    with pytest.raises(RewardError, match="its metrics have no 'reward'"):
        load_reward("odd_metrics:odd").metrics(IMAGES, PROMPTS)


def test_frames_are_averaged():
    video = torch.rand(2, 5, 3, 8, 8)
    metrics = load_reward("frames(0.5*red + brightness)").metrics(video, PROMPTS)
    assert list(metrics) == ["reward", "red", "brightness"]
    torch.testing.assert_close(metrics["brightness"], video.mean((1, 2, 3, 4)), check_dtype=False)
    each = torch.stack([load_reward("0.5*red + brightness")(video[:, k], PROMPTS) for k in range(5)]).mean(0)
    torch.testing.assert_close(load_reward("frames(0.5*red + brightness)")(video, PROMPTS), each, check_dtype=False)


def test_cache_scores_each_pair_once():
    calls = []

    def slow(images, prompts):
        calls.append(list(prompts))
        return images.mean((1, 2, 3))

    cached = CachedReward(Reward("slow", slow), max_items=3)
    images = torch.rand(3, 3, 8, 8)[[0, 1, 0]]
    prompts = ["one", "two", "one"]
    torch.testing.assert_close(cached(images, prompts), images.mean((1, 2, 3)), check_dtype=False)
    cached(images, prompts)
    assert calls == [["one", "two"]]
    cached(images, ["one", "other", "one"])  # the same image with another prompt
    assert calls[1:] == [["other"]]
    cached(torch.rand(2, 3, 8, 8), PROMPTS)  # pushes the oldest out
    cached(images[1:2], ["two"])
    assert calls[3:] == [["two"]]
    assert cached(images[:0], []).shape == (0,)


def test_nothing_heavy_is_imported_before_it_is_needed():
    code = (
        "import sys; from noisepolicy.rewards import load_reward; load_reward('0.5*red + shapes');"
        "print([m for m in ('transformers', 'diffusers', 'starlette', 'uvicorn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda images, prompts: torch.tensor([1.0, float("nan")]), "returned nan for prompt 'two'"),
        (lambda images, prompts: torch.tensor([float("inf"), 1.0]), "returned inf for prompt 'one'"),
        (lambda images, prompts: torch.zeros(2, 2), r"returned shape \(2, 2\) for 2 images"),
        (lambda images, prompts: torch.zeros(3), r"returned shape \(3,\) for 2 images"),
        (lambda images, prompts: 1.0, r"returned shape \(\) for 2 images"),
        (lambda images, prompts: None, "returned NoneType"),
        (lambda images, prompts: 1 / 0, "raised ZeroDivisionError: division by zero"),
    ],
)
def test_bad_results_stop_with_the_rewards_name(function, message):
    with pytest.raises(RewardError, match=f"reward 'mine' {message}"):
        Reward("mine", function)(IMAGES, PROMPTS)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import os; os.environ['NO_SUCH_TOKEN']", "KeyError: 'NO_SUCH_TOKEN'"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("import os; os.no_such", "AttributeError: module 'os' has no attribute 'no_such'"),
    ],
)
def test_a_module_that_cannot_be_imported_says_why(source, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    name = f"broken_{reason.partition(':')[0].lower()}"
    (tmp_path / f"{name}.py").write_text(source)
    with pytest.raises(ValueError, match=rf"cannot import '{name}' \({reason}") as error:
        load_reward(f"{name}:f")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["sub/path_reward", "./sub/path_reward.py", "/sub/path_reward"])
def test_a_module_of_another_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "path_reward", raising=False)
    for folder, value in (("sub", 1.0), ("other", 2.0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "path_reward.py").write_text(f"def f(images, prompts):\n    return [{value}]\n")
    name = name.replace("/sub", f"{tmp_path}/sub") if name.startswith("/") else name
    absolute = f"{tmp_path}/sub/path_reward:f"
    assert with_absolute_paths(f"0.5*{name}:f + red") == f"0.5*{absolute} + red"
    assert with_absolute_paths(absolute) == absolute and without_folders(absolute) == "path_reward:f"
    assert outside_parts(f"frames({absolute})") == [absolute]
    assert load_reward(f"{name}:f")(torch.zeros(1, 3, 2, 2), ["a"]).item() == 1
    with pytest.raises(ValueError, match=r"'path_reward' is imported from elsewhere, .*/sub/path_reward.py"):
        load_reward("other/path_reward:f")
    for missing, message in (("none/path_reward:f", "no such folder: 'none'"), ("sub/none:f", "cannot import 'none'")):
        with pytest.raises(ValueError, match=message):
            load_reward(missing)


def test_a_reward_means_the_same_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("models/clip", "pkg"):
        (tmp_path / folder).mkdir(parents=True)
    for module in ("own.py", "pkg/inner.py"):
        (tmp_path / module).write_text("raise RuntimeError('it is not imported')")
    for text, absolute in {
        "0.5*blue + sharpness": None,
        "pickscore": None,
        "pickscore(org/name)": None,
        "os:system": None,
        "numpy:mean": None,
        "http://127.0.0.1:8000/models/clip": None,
        "raw(http://h/a)": None,
        "none:f": None,
        "clipscore(models/clip)": "clipscore({}/models/clip)",
        "2*pickscore( models/clip , org/name)+red": "2*pickscore( {}/models/clip, org/name)+red",
        "own:f": "{}/own:f",
        "-1 * cached(frames(own:f))": "-1 * cached(frames({}/own:f))",
        "pil(own:f)": "pil({}/own:f)",
        "pkg.inner:f": "{}/pkg.inner:f",
    }.items():
        wanted = text if absolute is None else absolute.format(tmp_path)
        assert with_absolute_paths(text) == wanted == with_absolute_paths(wanted)


def test_a_module_that_is_imported_already_is_not_the_folder_s(tmp_path, monkeypatch):
    """As in this repository's own folder, where the sources lie beside the package that is installed."""
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "__init__.py").touch()
    (tmp_path / "not_imported_yet.py").touch()
    monkeypatch.chdir(tmp_path)
    assert with_absolute_paths("json.decoder:scanstring") == "json.decoder:scanstring"
    assert with_absolute_paths("not_imported_yet:score") == f"{tmp_path}/not_imported_yet:score"
