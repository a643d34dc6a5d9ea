"""The embedded video world: captions, clips, and the exact reward."""

import dataclasses

import pytest
import torch

from noisepolicy.rewards import load_reward
from noisepolicy.rewards.base import RewardError
from noisepolicy.worlds.moving_shapes import NUM_FRAMES, held_out_scenes, parse_caption, train_scenes
from noisepolicy.worlds.moving_shapes.renderer import FRAME_SIZE, render
from noisepolicy.worlds.moving_shapes.reward import score

SCENES = held_out_scenes()[:128]
CAPTIONS = [scene.caption for scene in SCENES]


@pytest.fixture(scope="module")
def clips():
    return render(SCENES, torch.Generator().manual_seed(3))


def test_split_is_a_partition_of_all_combinations():
    train, held_out = set(train_scenes()), set(held_out_scenes())
    assert (len(train), len(held_out)) == (1472, 256) and not train & held_out
    for scenes in (train, held_out):
        assert {label for scene in scenes for label in scene.ways} == set(range(4))


def test_captions_parse_back_to_their_scene():
    for scene in held_out_scenes():
        assert parse_caption(scene.caption) == scene
    with pytest.raises(ValueError, match="not a caption of the moving shapes"):
        parse_caption("a red circle moving left")


def test_real_clips(clips):
    assert clips.shape == (len(SCENES), NUM_FRAMES, 3, FRAME_SIZE, FRAME_SIZE)
    result = score(clips, CAPTIONS)
    assert result.reward.mean() >= 0.98 and result.strict.mean() >= 0.95


def other_ways(scene):
    return dataclasses.replace(scene, ways=tuple(way ^ 1 for way in scene.ways))  # left for right, up for down


def other_shapes(scene):
    return dataclasses.replace(scene, shapes=tuple((shape + 1) % 3 for shape in scene.shapes))


def other_colors(scene):
    return dataclasses.replace(scene, colors=scene.colors[::-1])


@pytest.mark.parametrize(("mistake", "most"), [(other_ways, 0.6), (other_shapes, 0.82), (other_colors, 0.8)])
def test_a_clip_of_another_scene(clips, mistake, most):
    result = score(clips, [mistake(scene).caption for scene in SCENES])
    # Two objects alike but for their colours look the same with them swapped.
    is_other = torch.tensor([len({*zip(scene.shapes, scene.ways, strict=True)}) == 2 for scene in SCENES])
    assert result.reward[is_other].mean() <= most
    assert result.strict[is_other].mean() <= 0.02


@pytest.mark.parametrize(
    ("change", "most"),
    [
        (lambda clips: clips[:, :1].expand_as(clips), 0.56),  # nothing moves
        (lambda clips: clips[:, [0, 3, 1, 4, 2, 5]], 0.93),  # it jumps about and still arrives
        (lambda clips: clips.flip(1), 0.56),  # backwards
        (lambda clips: torch.where(torch.arange(NUM_FRAMES)[:, None, None, None] == 2, clips.amax(), clips), 0.6),
    ],
    ids=["still", "jumping", "backwards", "a blank frame"],
)
def test_motion_counts(clips, change, most):
    result = score(change(clips), CAPTIONS)
    assert result.reward.mean() <= most and result.strict.mean() <= 0.02


def test_litter_counts(clips):
    dirty = clips.clone()
    dirty[:, :, :, :8, :8] = torch.tensor([0.8, 0.2, 0.2])[:, None, None]
    assert (score(dirty, CAPTIONS).reward < score(clips, CAPTIONS).reward).float().mean() > 0.9


def test_as_a_reward(clips):
    reward = load_reward("moving_shapes")
    assert set(reward.metrics(clips[:2], CAPTIONS[:2])) == {"reward", "strict"}
    with pytest.raises(RewardError, match="it scores video"):
        load_reward("moving_shapes")(clips[:2, 0], CAPTIONS[:2])
    with pytest.raises(ValueError, match="two frames or more"):
        score(clips[:2, :1], CAPTIONS[:2])
    assert score(clips[:0], []).reward.shape == (0,)
