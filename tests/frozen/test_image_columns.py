"""Prompts that come with images: image-to-image and inpainting, each picture from its own."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import noisepolicy
from noisepolicy.frozen import FrozenDiffusersPipeline
from noisepolicy.frozen.noise import Draws, watching
from noisepolicy.prompt import Prompt

TEXTS = ["a red circle", "a blue square above a red circle"]
SIZE = {"height": 16, "width": 24}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        Image.fromarray((pixels[..., 0] > 128).astype(np.uint8) * 255).save(folder / f"mask{number}.png")
    return folder


@pytest.fixture(scope="module")
def make(family_folder):
    def pipeline(kind):
        made = kind.from_pretrained(str(family_folder("StableDiffusionPipeline")))
        made.set_progress_bar_config(disable=True)
        return made

    return pipeline


def prompts_of(files):
    return [
        Prompt(text, {"image": str(files / f"{n}.png"), "mask_image": str(files / f"mask{n}.png")})
        for n, text in enumerate(TEXTS)
    ]


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        (diffusers.StableDiffusionImg2ImgPipeline, ("image",)),
        (diffusers.StableDiffusionInpaintPipeline, ("image", "mask_image")),
    ],
)
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_each_picture_is_made_from_its_prompts_images(make, files, kind, columns, guidance_scale):
    pipeline, prompts = make(kind), prompts_of(files)
    frozen = FrozenDiffusersPipeline(pipeline, image_columns=columns, call={"strength": 0.6}, **SIZE)
    settings = {"num_inference_steps": 4, "guidance_scale": guidance_scale}
    latents = torch.randn(2, *frozen.latent_shape, generator=torch.Generator().manual_seed(0))
    images = frozen.generate(latents, frozen.encode(prompts), seeds=[3, 4], **settings)
    for number, prompt in enumerate(prompts):
        given = {name: Image.open(prompt.metadata[name]).convert("RGB") for name in columns}
        given = {name: image.resize((24, 16), Image.Resampling.LANCZOS) for name, image in given.items()}
        with watching(pipeline, Draws(latents[number : number + 1])):
            expected = pipeline(
                str(prompt),
                **given,
                **(SIZE if "mask_image" in columns else {}),
                strength=0.6,
                generator=torch.Generator().manual_seed(3 + number),
                output_type="pt",
                **settings,
            ).images
        torch.testing.assert_close(images[number : number + 1], expected, rtol=0, atol=1e-5)
    swapped = [Prompt(str(prompt), other.metadata) for prompt, other in zip(prompts, prompts[::-1], strict=True)]
    others = frozen.generate(latents, frozen.encode(swapped), seeds=[3, 4], **settings)
    assert ((others - images).abs().flatten(1).amax(1) > 0.01).all()


def test_a_run_on_a_file_of_prompts_with_images(make, files, tmp_path):
    rows = [
        f"a {colour} {shape},{files / f'{number % 2}.png'}"
        for number, (colour, shape) in enumerate((c, s) for c in ("red", "blue") for s in ("circle", "square"))
    ]
    (tmp_path / "prompts.csv").write_text("\n".join(["prompt,image", *rows]))
    seen = []

    def closeness(images, prompts, metadata):
        seen.extend(fields["image"] for fields in metadata)
        return images.mean((1, 2, 3))

    run = noisepolicy.train(
        make(diffusers.StableDiffusionImg2ImgPipeline),
        prompts=tmp_path / "prompts.csv",
        reward=closeness,
        image_columns=["image"],
        call={"strength": 0.6},
        **SIZE,
        num_inference_steps=4,
        batch_size=4,
        num_iterations=2,
        critic_warmup=4,
        critic_updates=1,
        critic_batch_size=4,
        bands=2,
        eval_num_prompts=0,
        output_dir=tmp_path / "run",
    )
    assert run.metrics[-1]["kl_to_prior"] > 0
    assert set(seen) == {str(files / "0.png"), str(files / "1.png")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_columns": ["image"]}, "image_columns needs height and width"),
        ({"image_columns": ["picture"], **SIZE}, "takes no picture, which image_columns names"),
    ],
)
def test_columns_that_cannot_be_used(make, options, message):
    with pytest.raises(ValueError, match=message):
        FrozenDiffusersPipeline(make(diffusers.StableDiffusionImg2ImgPipeline), **options)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [({}, "has no path of an image in a field named image"), ({"image": "no.png"}, "cannot read the image no.png")],
)
def test_images_that_are_not_there(make, metadata, message):
    frozen = FrozenDiffusersPipeline(
        make(diffusers.StableDiffusionImg2ImgPipeline), image_columns=["image"], call={"strength": 0.6}, **SIZE
    )
    with pytest.raises(ValueError, match=message):
        frozen.encode([Prompt("a red circle", metadata)])
