"""Rewards without weights: high for what they should like, and equal to what another library computes."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy import ndimage

from noisepolicy.rewards import RewardError, load_reward

PROMPTS = ["one", "two"]
FLAT = torch.full((2, 3, 32, 32), 0.5)
NOISE = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_jpeg_size_in_kb():
    expected = []
    for image in NOISE:
        buffer = io.BytesIO()
        pixels = np.round(image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
        expected.append(len(buffer.getvalue()) / 1000)
    torch.testing.assert_close(
        load_reward("jpeg_incompressibility")(NOISE, PROMPTS), torch.tensor(expected), check_dtype=False
    )
    torch.testing.assert_close(
        load_reward("jpeg_compressibility")(NOISE, PROMPTS), -torch.tensor(expected), check_dtype=False
    )
    assert (
        load_reward("jpeg_compressibility")(FLAT, PROMPTS) > load_reward("jpeg_compressibility")(NOISE, PROMPTS)
    ).all()


def test_brightness_and_colours():
    image = torch.zeros(1, 3, 4, 4)
    image[:, 0], image[:, 1] = 1.0, 0.5
    values = {name: load_reward(name)(image, ["a"]).item() for name in ("brightness", "red", "green", "blue")}
    assert values == pytest.approx({"brightness": 0.5, "red": 0.75, "green": 0.0, "blue": -0.75})
    for name in ("red", "green", "blue"):
        assert load_reward(name)(FLAT, PROMPTS).abs().max() < 1e-6


def test_sharpness():
    sharpness = load_reward("sharpness")
    pixels = (NOISE[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    blurred = np.array(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(2)))
    crisp, soft = (torch.from_numpy(p).permute(2, 0, 1)[None] / 255 for p in (pixels, blurred))
    luma = pixels.astype(np.float64) @ (0.299, 0.587, 0.114)
    expected = ndimage.laplace(luma)[1:-1, 1:-1].var()
    assert sharpness(crisp, ["a"]).item() == pytest.approx(expected, rel=1e-4)
    assert sharpness(soft, ["a"]) < sharpness(crisp, ["a"]) / 10
    assert sharpness(FLAT, PROMPTS).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("name", "images", "message"),
    [
        ("red", torch.rand(2, 4, 3, 8, 8), r"write frames\(...\) around it"),
        ("brightness", torch.rand(2, 1, 8, 8), "expected \\(batch, 3, height, width\\)"),
        ("brightness", torch.rand(3, 3, 8, 8), "3 images but 2 prompts"),
        ("sharpness", torch.rand(2, 3, 2, 8), "no inner pixel"),
        ("frames(red)", torch.rand(2, 3, 8, 8), "scores video"),
    ],
)
def test_wrong_images(name, images, message):
    with pytest.raises(RewardError, match=message):
        load_reward(name)(images, PROMPTS)
