"""`noisepolicy-bench variety` at its smallest, and its selection of groups and measure of places on known pictures."""

import json

import pytest
import torch
from PIL import Image

import noisepolicy
from noisepolicy.benchmarks import variety
from noisepolicy.cli.bench import main
from noisepolicy.worlds.shapes import parse_caption
from noisepolicy.worlds.shapes.renderer import paint

CAPTION = "a red circle, a blue square and a green triangle from left to right"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    settings = {"num_iterations": 1, "batch_size": 8, "critic_warmup": 8, "critic_updates": 1, "num_candidates": 4}
    noisepolicy.Run(
        "shapes", output_dir=folder, eval_num_prompts=0, checkpoint_every=1, device="cpu", **settings
    ).train()
    return folder


@pytest.mark.slow
def test_a_row_for_each_way(run, tmp_path, capsys):
    assert main(["variety", str(run), str(run), "--num-prompts", "1", "--output", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["name"]: row for row in result["variety"]}
    assert {"plain noise", "low frequencies x 1.5", "noise on the prompt x 1.0", "policy, variety 0.2"} <= rows.keys()
    base = rows["plain noise"]
    assert base["variety"] == base["nearest"] == base["places"] == [1.0] and base["gain_ci95"] == [0.0, 0.0]
    first, second = rows["policy, variety 0.2"]["reward"]
    assert first == second != rows["policy, variety 0.0"]["reward"][0], "the same policy twice"
    assert rows["group inference of 4, spread x 1.0"]["nearest"][0] > 1
    assert rows["group inference of 4, spread x 0.2"]["reward"][0] > base["reward"][0]
    assert Image.open(tmp_path / "variety.png").size[0] > 500
    assert Image.open(tmp_path / "variety_pictures.png").size == (120 + 8 * 118, 3 * 118 + 6)


def pictures(heights):
    """Pictures of the caption, whose objects stand at these heights, in pixels from the top."""
    scene = parse_caption(CAPTION)
    across = torch.tensor([[12.0, 32.0, 52.0]]).expand(len(heights), -1)
    centers = torch.stack([across, torch.tensor(heights)[:, None].expand(-1, 3)], 2)
    colors, shapes = (torch.tensor([which]).expand(len(heights), -1) for which in (scene.colors, scene.shapes))
    background = torch.full((len(heights), 1, 1, 1), 0.92)
    return paint(background, centers, torch.full((len(heights), 3), 8.0), colors, shapes, size=64)


def test_places_are_counted_along_the_free_axis():
    images = pictures([20.0, 32.0, 44.0])
    assert variety._spread_of_places(images, CAPTION) == pytest.approx(12, abs=0.5)
    assert variety._spread_of_places(images[[1, 1]], CAPTION) == 0


def test_what_is_refused(run, tmp_path, capsys):
    assert main(["variety", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert main(["variety", str(run), "--num-prompts", "0"]) == 2
    assert "must be positive" in capsys.readouterr().err
