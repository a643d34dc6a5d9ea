"""Trains the embedded video model: `python -m noisepolicy.worlds.moving_shapes.pretrain WORK_FOLDER`.

The stages are those of `shapes/stages.py`, with the image world's autoencoder to start from; run again, the command
goes on where it was stopped. The result is a text-to-video pipeline in diffusers' format, safetensors, UNet and
autoencoder in fp16. Seeded.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, TextToVideoSDPipeline

from noisepolicy.worlds.moving_shapes.captions import NUM_OBJECTS, WAYS, train_scenes
from noisepolicy.worlds.moving_shapes.networks import MAX_TOKENS, TEXT_WIDTH, build_unet
from noisepolicy.worlds.moving_shapes.renderer import render
from noisepolicy.worlds.shapes import model_folder as image_model_folder
from noisepolicy.worlds.shapes.captions import COLORS, SHAPES
from noisepolicy.worlds.shapes.networks import build_scheduler, build_text_encoder, name_weights_for_every_transformers
from noisepolicy.worlds.shapes.stages import Stages, World
from noisepolicy.worlds.shapes.tokenizer import build_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work_folder", type=Path, help="checkpoints go here, and the finished model to its model/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=600)
    parser.add_argument("--text-steps", type=int, default=1000)
    parser.add_argument("--num-clips", type=int, default=16_384, help="encoded once for the UNet")
    parser.add_argument("--unet-steps", type=int, default=2400)
    arguments = parser.parse_args()
    folder = arguments.work_folder
    torch.manual_seed(arguments.seed)
    words = ["a", "and", "moving", *COLORS, *SHAPES, *WAYS]
    tokenizer = build_tokenizer(folder / "tokenizer", words, max_tokens=MAX_TOKENS)
    vae = AutoencoderTiny.from_pretrained(image_model_folder(), subfolder="vae", torch_dtype=torch.float32)
    vae.train().requires_grad_(True)
    text_encoder, unet = build_text_encoder(tokenizer, TEXT_WIDTH), build_unet()

    num_classes = [len(COLORS)] * NUM_OBJECTS + [len(SHAPES)] * NUM_OBJECTS + [len(WAYS)] * NUM_OBJECTS
    stages = Stages(World(train_scenes(), num_classes, render), folder, arguments.seed)
    stages.autoencoder(vae, num_steps=arguments.vae_steps, learning_rate=5e-4)
    stages.text_encoder(text_encoder, tokenizer, num_steps=arguments.text_steps)
    data = stages.latents(vae, num_scenes=arguments.num_clips)
    stages.unet(unet, data, text_encoder, tokenizer, num_steps=arguments.unet_steps, batch_size=32)
    pipeline = TextToVideoSDPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=build_scheduler()
    )
    # The text encoder stays float32: transformers loads a file in the type it was saved in, diffusers in float32.
    pipeline.unet.half()
    pipeline.vae.half()
    pipeline.save_pretrained(folder / "model")
    # Transformers 4 reads the files that this writes; transformers 5 saves other ones.
    build_tokenizer(folder / "model" / "tokenizer", words, max_tokens=MAX_TOKENS)
    name_weights_for_every_transformers(folder / "model" / "text_encoder")
    print(f"wrote {folder / 'model'}")


if __name__ == "__main__":
    main()
