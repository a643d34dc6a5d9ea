"""Trains the embedded model that the package ships: `python -m noisepolicy.worlds.shapes.pretrain WORK_FOLDER`.

The stages are those of `stages.py`; run again, the command goes on where it was stopped. The result is a Stable
Diffusion pipeline in diffusers' format, safetensors, UNet and autoencoder in fp16.

Seeded; about 25 minutes on two cores of an Intel Xeon with AMX (`--vae-bf16`; slower without that flag).
"""

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from noisepolicy.worlds.shapes.captions import COLORS, DIRECTIONS, NUM_OBJECTS, SHAPES, train_scenes
from noisepolicy.worlds.shapes.networks import (
    build_scheduler,
    build_text_encoder,
    build_unet,
    build_vae,
    name_weights_for_every_transformers,
)
from noisepolicy.worlds.shapes.renderer import render
from noisepolicy.worlds.shapes.stages import Stages, World
from noisepolicy.worlds.shapes.tokenizer import build_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work_folder", type=Path, help="checkpoints go here, and the finished model to its model/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=3000)
    parser.add_argument("--text-steps", type=int, default=1000)
    parser.add_argument("--num-pictures", type=int, default=20_480, help="encoded once for the UNet")
    parser.add_argument("--unet-steps", type=int, default=2000)
    parser.add_argument("--vae-bf16", action="store_true", help="worth it on processors with AMX only")
    arguments = parser.parse_args()
    folder = arguments.work_folder
    torch.manual_seed(arguments.seed)
    tokenizer = build_tokenizer(folder / "tokenizer")
    vae, text_encoder, unet = build_vae(), build_text_encoder(tokenizer), build_unet()

    num_classes = [len(COLORS)] * NUM_OBJECTS + [len(SHAPES)] * NUM_OBJECTS + [len(DIRECTIONS)]
    stages = Stages(World(train_scenes(), num_classes, render), folder, arguments.seed)
    stages.autoencoder(vae, num_steps=arguments.vae_steps, use_bf16=arguments.vae_bf16)
    stages.text_encoder(text_encoder, tokenizer, num_steps=arguments.text_steps)
    data = stages.latents(vae, num_scenes=arguments.num_pictures)
    stages.unet(unet, data, text_encoder, tokenizer, num_steps=arguments.unet_steps)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    # The text encoder stays float32: transformers loads a file in the type it was saved in, diffusers in float32.
    pipeline.unet.half()
    pipeline.vae.half()
    pipeline.save_pretrained(folder / "model")
    build_tokenizer(folder / "model" / "tokenizer")  # transformers 4 reads its files; transformers 5 saves other ones
    name_weights_for_every_transformers(folder / "model" / "text_encoder")
    print(f"wrote {folder / 'model'}")


if __name__ == "__main__":
    main()
