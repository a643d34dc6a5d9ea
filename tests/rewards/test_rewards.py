"""Finding rewards, and refusing what they must not return."""

import pytest
import torch

from noisepolicy.rewards import Reward, RewardError, load_reward

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
    torch.testing.assert_close(reward(IMAGES, PROMPTS), IMAGES.mean((1, 2, 3)))
    assert set(reward.metrics(IMAGES, PROMPTS)) == {"reward"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pretty", "unknown reward 'pretty'; choose from"),
        ("no_such_module:f", "cannot import 'no_such_module'"),
        ("math:no_such_function", "has no 'no_such_function'"),
        ("math:pi", "not callable"),
    ],
)
def test_unknown_rewards(spec, message):
    with pytest.raises(ValueError, match=message):
        load_reward(spec)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda images, prompts: torch.tensor([1.0, float("nan")]), "returned nan for prompt 'two'"),
        (lambda images, prompts: torch.tensor([float("inf"), 1.0]), "returned inf for prompt 'one'"),
        (lambda images, prompts: torch.zeros(2, 1), r"returned shape \(2, 1\) for 2 images"),
        (lambda images, prompts: torch.zeros(3), r"returned shape \(3,\) for 2 images"),
        (lambda images, prompts: 1.0, r"returned shape \(\) for 2 images"),
        (lambda images, prompts: None, "returned NoneType"),
        (lambda images, prompts: 1 / 0, "raised ZeroDivisionError: division by zero"),
    ],
)
def test_bad_results_stop_with_the_rewards_name(function, message):
    with pytest.raises(RewardError, match=f"reward 'mine' {message}"):
        Reward("mine", function)(IMAGES, PROMPTS)
