"""The sweep compares the same seeds; the report says what was measured and opens in a browser."""

import dataclasses
import subprocess

import pytest
import torch
from PIL import Image

from noisepolicy.evaluation import evaluate_sweep, write_report
from noisepolicy.policies import SpectralPolicy
from noisepolicy.rewards import load_reward
from noisepolicy.training.config import TrainConfig
from noisepolicy.worlds.shapes import held_out_scenes

PROMPTS = [scene.caption for scene in held_out_scenes()[:3]]


def sweep(frozen, policy, *, reward="shapes", **options):
    defaults = {"step_counts": (1, 2), "group_size": 4, "guidance_scale": 1.5, "seed": 3}
    return evaluate_sweep(policy, frozen, load_reward(reward), PROMPTS, **(defaults | options))


@pytest.fixture
def policy():
    return SpectralPolicy(latent_shape=(8, 8, 8), prompt_shape=(20, 128))


def test_an_untrained_policy_gains_exactly_nothing(frozen, policy):
    for row in sweep(frozen, policy).rows:
        assert row["num_pairs"] == 12
        assert row["gain"] == 0 and row["gain_ci95"] == [0, 0] and row["base"] == row["policy"]
        best = {entry["n"]: entry["reward"] for entry in row["best_of_n"]}
        assert set(best) == {2, 4} and row["base"]["reward"] <= best[2] <= best[4]


def test_a_policy_is_compared_on_its_own_noise(frozen, policy):
    policy.mean.bias.data += 0.3
    first, again = sweep(frozen, policy), sweep(frozen, policy)
    assert first.rows == again.rows
    assert first.rows[1]["gain"] == pytest.approx(
        first.rows[1]["policy"]["reward"] - first.rows[1]["base"]["reward"], abs=1e-6
    )
    assert first.rows[1]["gain"] != 0
    # The base side does not depend on the policy.
    assert (
        first.rows[1]["base"]
        == sweep(frozen, SpectralPolicy(latent_shape=(8, 8, 8), prompt_shape=(20, 128))).rows[1]["base"]
    )


def test_the_parts_of_a_sum_are_measured_each(frozen, policy):
    policy.mean.bias.data += 0.3
    (row,) = sweep(frozen, policy, reward="shapes + 10*red", step_counts=(2,)).rows
    assert [part["name"] for part in row["parts"]] == ["shapes", "red"]
    for side in ("base", "policy"):
        shapes, red = (part[side] for part in row["parts"])
        assert row[side]["reward"] == pytest.approx(shapes + 10 * red)
    assert row["gain"] == pytest.approx(row["parts"][0]["gain"] + 10 * row["parts"][1]["gain"])
    assert sweep(frozen, policy, step_counts=(2,)).rows[0]["parts"] == []


@pytest.mark.parametrize("num_ranks", [3, 5])
def test_processes_share_the_images(frozen, policy, num_ranks):
    """Whatever their number, the first comes to what one alone measures; 5 have four parts to share."""
    policy.mean.bias.data += 0.3
    made = [None] * num_ranks

    def share(rank):
        def collect(value):
            made[rank] = value
            return None if rank else made

        return sweep(frozen, policy, rank=rank, num_ranks=num_ranks, collect=collect)

    *others, shared = [share(rank) for rank in reversed(range(num_ranks))]
    alone = sweep(frozen, policy)
    assert [len(parts) for parts in made] == ([2, 1, 1] if num_ranks == 3 else [1, 1, 1, 1, 0])
    assert shared.rows == alone.rows and not any(other.rows or other.pairs for other in others)
    assert all(
        torch.equal(ours.policy_image, pair.policy_image) and ours.base_metrics == pair.base_metrics
        for ours, pair in zip(shared.pairs, alone.pairs, strict=True)
    )


@pytest.fixture
def report(frozen, policy, tmp_path):
    policy.mean.bias.data += 0.3
    result = sweep(frozen, policy)
    pairs = [dataclasses.replace(pair, prompt="<script>document.title='owned'</script>") for pair in result.pairs]
    summary = {
        "images_trained": 960,
        "train_seconds": 12.5,
        "seconds": {"frozen_model": 10.0, "policy": 2.5},
        "frozen_sha256_before": "ab" * 32,
        "frozen_sha256_after": "ab" * 32,
        "sweep": result.rows,
    }
    metrics = [{"images": 96 * i, "reward": 0.5 + 0.01 * i, "kl_to_prior": 0.5 * i} for i in range(1, 11)]
    config = TrainConfig().plain()
    path = tmp_path / "report.html"
    write_report(
        path,
        config=config | {"num_inference_steps": [2], "eval_steps": [1, 2]},
        summary=summary,
        metrics=metrics,
        pairs=pairs,
    )
    return path, summary


def test_report_is_self_contained_and_escaped(report):
    path, summary = report
    html = path.read_text("utf-8")
    assert "<script" not in html and "&lt;script&gt;" in html
    assert 'src="http' not in html and 'href="http' not in html
    for row in summary["sweep"]:
        assert f"{row['policy']['reward']:.3f}" in html
    assert html.count("data:image/png;base64,") == 2 * len(PROMPTS) and html.count("<svg") == 2


def test_report_says_which_model_was_measured(report):
    path, summary = report
    assert "The model's weights did not change (SHA-256 abababababab…, before and after)" in path.read_text("utf-8")
    config = TrainConfig().plain() | {"eval_steps": [1, 2], "num_inference_steps": [2]}
    other = summary | {"frozen_sha256_after": "cd" * 32}
    write_report(path, config=config, summary=other, metrics=[], pairs=[])
    html = path.read_text("utf-8")
    assert "did not change" not in html and "(SHA-256 cdcdcdcdcdcd…) is not the one it was trained with" in html


@pytest.mark.browser
def test_report_opens_in_a_browser(report, tmp_path, browser):
    path, _ = report
    screenshot = tmp_path / "report.png"
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--hide-scrollbars",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1100,2200",
    ]
    subprocess.run(
        [browser, *flags, f"--screenshot={screenshot}", path.as_uri()],
        check=True,
        capture_output=True,
        timeout=120,
    )
    pixels = torch.frombuffer(bytearray(Image.open(screenshot).convert("RGB").tobytes()), dtype=torch.uint8)
    pixels = pixels.reshape(-1, 3).int()
    # The policy's blue curves and the pictures are drawn: a blank or broken page has neither.
    is_blue = (pixels - torch.tensor([37, 99, 235])).abs().sum(1) < 30
    assert is_blue.sum() > 500 and len(torch.unique(pixels, dim=0)) > 200
