"""The turbo world: captions, pictures, and the exact reward."""

import dataclasses

import pytest
import torch

from noisepolicy.rewards import load_reward
from noisepolicy.worlds.turbo import held_out_scenes, parse_caption, train_scenes
from noisepolicy.worlds.turbo.networks import build_vae
from noisepolicy.worlds.turbo.renderer import IMAGE_SIZE, render
from noisepolicy.worlds.turbo.reward import score

SCENES = held_out_scenes()[:64]
CAPTIONS = [scene.caption for scene in SCENES]


@pytest.fixture(scope="module")
def pictures():
    return render(SCENES, torch.Generator().manual_seed(3))


def test_split_is_by_content():
    def content(scenes):
        return {(frozenset(scene.items), scene.background) for scene in scenes}

    train, held_out = content(train_scenes()), content(held_out_scenes())
    assert (len(train), len(held_out)) == (8192, 512) and not train & held_out
    for scenes in (train_scenes(), held_out_scenes()):
        assert {len(scene.items) for scene in scenes} == {3, 4, 5}
        assert {scene.wording for scene in scenes} == {0, 1, 2}


def test_captions_parse_back_to_their_scene():
    for scene in held_out_scenes():
        for wording in range(3):
            said = dataclasses.replace(scene, wording=wording)
            assert parse_caption(said.caption) == scene and parse_caption(said.caption).wording == wording
    assert len({dataclasses.replace(SCENES[0], wording=wording).caption for wording in range(3)}) == 3


@pytest.mark.parametrize(
    "caption",
    [
        "a small red circle at the left and a large blue square at the top, on a white background",  # two objects
        CAPTIONS[0].replace("red", "orange").replace("blue", "orange").replace("green", "orange"),
        "white picture: big red disc left, big red box top, little blue wedge center",  # two red objects
        "white picture: big red disc left, big green box top and little blue wedge center",  # another wording's `and`
        "",
    ],
)
def test_other_texts_are_refused(caption):
    with pytest.raises(ValueError, match="not a caption of the turbo world"):
        parse_caption(caption)


def test_real_pictures(pictures):
    assert pictures.shape == (len(SCENES), 3, IMAGE_SIZE, IMAGE_SIZE)
    result = score(pictures, CAPTIONS)
    assert result.reward.min() >= 0.98 and result.strict.mean() == 1


def change_items(scene, **change):
    """Each value is a function of an item's own."""
    items = (dataclasses.replace(i, **{n: f(getattr(i, n)) for n, f in change.items()}) for i in scene.items)
    return dataclasses.replace(scene, items=tuple(items))


@pytest.mark.parametrize(
    ("mistake", "most"),
    [
        (lambda scene: change_items(scene, shape=lambda shape: (shape + 1) % 3), 0.85),
        (lambda scene: change_items(scene, size=lambda size: 1 - size), 0.88),
        (lambda scene: change_items(scene, place=lambda place: (1, 0, 3, 2, 7, 6, 5, 4, 8)[place]), 0.8),  # mirrored
        (lambda scene: dataclasses.replace(scene, background=(scene.background + 1) % 3), 0.91),
        (lambda scene: change_items(scene, color=lambda color: (color + 1) % 5), 0.75),
    ],
    ids=["shape", "size", "place", "background", "color"],
)
def test_a_picture_of_another_scene(pictures, mistake, most):
    result = score(pictures, [mistake(scene).caption for scene in SCENES])
    assert result.reward.mean() <= most and result.strict.mean() <= 0.05


def test_wording_does_not_count(pictures):
    said = [dataclasses.replace(scene, wording=(scene.wording + 1) % 3).caption for scene in SCENES]
    assert torch.equal(score(pictures, said).reward, score(pictures, CAPTIONS).reward)


def test_litter_and_missing_objects_count(pictures):
    clean = score(pictures, CAPTIONS).reward
    dirty = pictures.clone()
    dirty[:, :, :20, :20] = torch.tensor([0.84, 0.19, 0.19])[:, None, None]
    assert (score(dirty, CAPTIONS).reward < clean).float().mean() > 0.9
    blank = torch.full_like(pictures, 0.5)
    assert score(blank, CAPTIONS).reward.mean() <= 0.2
    assert score(torch.rand(pictures.shape, generator=torch.Generator().manual_seed(0)), CAPTIONS).reward.mean() <= 0.3


def test_as_a_reward(pictures):
    reward = load_reward("turbo")
    assert set(reward.metrics(pictures[:2], CAPTIONS[:2])) == {"reward", "strict"}
    assert score(pictures[:0], []).reward.shape == (0,)
    with pytest.raises(ValueError, match="2 images but 1 prompts"):
        score(pictures[:2], CAPTIONS[:1])
    with pytest.raises(ValueError, match="pictures of 3 x 192 x 192"):
        score(pictures[:2, :, ::2, ::2], CAPTIONS[:2])


def test_the_encoder_takes_means(pictures):
    latents = build_vae().encode(pictures[:2] * 2 - 1).latents
    torch.testing.assert_close(latents[:, :3], 2 * torch.nn.functional.avg_pool2d(pictures[:2], 8) - 1)
    brightness = torch.nn.functional.avg_pool2d(pictures[:2].mean(1, keepdim=True), 4)
    corners = brightness[:, :, ::2, ::2] - brightness[:, :, 1::2, 1::2]
    torch.testing.assert_close(latents[:, 3:], 6 * corners)
