"""The exact reward: right scenes score one, each kind of mistake costs."""

import dataclasses

import pytest
import torch
from diffusers import AutoencoderTiny

from noisepolicy.worlds.shapes import held_out_scenes, model_folder, train_scenes
from noisepolicy.worlds.shapes.renderer import PALETTE, render
from noisepolicy.worlds.shapes.reward import score

SCENES = (*held_out_scenes(), *train_scenes()[:256])
CAPTIONS = [scene.caption for scene in SCENES]


@pytest.fixture(scope="module")
def images():
    return render(SCENES, torch.Generator().manual_seed(3))


def test_real_scenes(images):
    result = score(images, CAPTIONS)
    assert result.reward.mean() >= 0.99
    assert result.strict.mean() >= 0.97


def test_real_scenes_through_the_autoencoder(images):
    vae = AutoencoderTiny.from_pretrained(model_folder(), subfolder="vae")
    with torch.no_grad():
        decoded = (vae.decoder(vae.encoder(images * 2 - 1)) / 2 + 0.5).clamp(0, 1)
    result = score(decoded, CAPTIONS)
    assert result.reward.mean() >= 0.97
    assert result.strict.mean() >= 0.85


def swap_places(scene):
    return dataclasses.replace(
        scene, colors=scene.colors[1::-1] + scene.colors[2:], shapes=scene.shapes[1::-1] + scene.shapes[2:]
    )


def wrong_color(scene):
    return dataclasses.replace(scene, colors=(({0, 1, 2, 3} - set(scene.colors)).pop(), *scene.colors[1:]))


def wrong_shape(scene):
    return dataclasses.replace(scene, shapes=((scene.shapes[0] + 1) % 3, *scene.shapes[1:]))


def wrong_direction(scene):
    return dataclasses.replace(scene, direction=1 - scene.direction)


@pytest.mark.parametrize(
    ("mistake", "most"), [(swap_places, 0.9), (wrong_color, 0.7), (wrong_shape, 0.93), (wrong_direction, 0.93)]
)
def test_a_picture_of_another_scene(mistake, most):
    drawn = render([mistake(scene) for scene in SCENES], torch.Generator().manual_seed(3))
    result = score(drawn, CAPTIONS)
    assert result.reward.mean() < most
    # Another direction is right by chance where the places across happen to be in order.
    assert result.strict.mean() < (0.2 if mistake is wrong_direction else 0.01)


def paste(images, color, x, y, size=14):
    changed = images.clone()
    changed[:, :, y : y + size, x : x + size] = PALETTE[color][:, None, None]
    return changed


def test_a_missing_object(images):
    blank = torch.full_like(images, 0.93)
    first = torch.tensor([scene.colors[0] for scene in SCENES])
    is_first = ((images - PALETTE[first][:, :, None, None]) ** 2).sum(1, keepdim=True) < 0.14
    result = score(torch.where(is_first, blank, images), CAPTIONS)
    assert result.reward.mean() < 0.75 and result.strict.mean() == 0


@pytest.mark.parametrize("is_named_color", [False, True])
def test_an_extra_object(images, is_named_color):
    rows = []
    for image, scene in zip(images, SCENES, strict=True):
        color = scene.colors[0] if is_named_color else ({0, 1, 2, 3} - set(scene.colors)).pop()
        # Into the emptiest corner.
        corners = [(x, y) for x in (0, 50) for y in (0, 50)]
        x, y = min(corners, key=lambda at: image[:, at[1] : at[1] + 14, at[0] : at[0] + 14].var().item())
        rows.append(paste(image[None], color, x, y)[0])
    result = score(torch.stack(rows), CAPTIONS)
    assert result.reward.mean() < 0.9 and result.strict.mean() < 0.05


def test_bounds_and_blank_pictures():
    noise = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    blank = torch.ones(8, 3, 64, 64)
    for images in (noise, blank):
        result = score(images, CAPTIONS[:8])
        assert ((result.reward >= 0) & (result.reward <= 1)).all() and (result.strict == 0).all()
    assert score(blank[:0], []).reward.shape == (0,)


def test_a_picture_scores_the_same_in_any_batch(images):
    together = score(images[:9], CAPTIONS[:9])
    alone = torch.cat([score(images[i : i + 1], CAPTIONS[i : i + 1]).reward for i in range(9)])
    assert torch.equal(together.reward, alone)


def test_lengths_must_agree(images):
    with pytest.raises(ValueError, match="2 images but 1 prompts"):
        score(images[:2], CAPTIONS[:1])
