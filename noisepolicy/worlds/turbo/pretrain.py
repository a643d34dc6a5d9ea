"""Trains the turbo world's model: `python -m noisepolicy.worlds.turbo.pretrain WORK_FOLDER`.

The stages of `shapes/stages.py` make a teacher, from pictures; `distillation.py` makes the student from it. Run again,
the command goes on where it was stopped. Teacher and student are written as Stable Diffusion pipelines in diffusers'
format, safetensors in fp16, to `teacher/` and `model/`; the package ships the latter. Seeded.

`python -m noisepolicy.benchmarks.distilled WORK_FOLDER` measures both.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, SchedulerMixin, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

from noisepolicy.storage import read_tensors_and_metadata, write_tensors
from noisepolicy.worlds.shapes.networks import build_scheduler, build_text_encoder, name_weights_for_every_transformers
from noisepolicy.worlds.shapes.stages import Stages, World
from noisepolicy.worlds.shapes.tokenizer import build_tokenizer
from noisepolicy.worlds.turbo.captions import BACKGROUNDS, COLORS, PLACES, SHAPES, SIZES, WORDS, train_scenes
from noisepolicy.worlds.turbo.distillation import Text, distill
from noisepolicy.worlds.turbo.networks import MAX_TOKENS, NUM_SLOTS, build_turbo_scheduler, build_unet, build_vae
from noisepolicy.worlds.turbo.renderer import render


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work_folder", type=Path, help="checkpoints go here, and the models to its teacher/ and model/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=1500)
    parser.add_argument("--text-steps", type=int, default=250)
    parser.add_argument("--num-pictures", type=int, default=6144, help="encoded once for the teacher")
    parser.add_argument("--teacher-steps", type=int, default=3300)
    parser.add_argument("--student-steps", type=int, default=600)
    parser.add_argument("--guidance-scale", type=float, default=2.0, help="of the teacher that the student follows")
    arguments = parser.parse_args()
    folder = arguments.work_folder
    torch.manual_seed(arguments.seed)
    tokenizer = build_tokenizer(folder / "tokenizer", WORDS, max_tokens=MAX_TOKENS)
    vae = build_vae().to(memory_format=torch.channels_last)
    text_encoder, teacher = build_text_encoder(tokenizer), build_unet()

    of_color = [len(SHAPES) + 1, len(SIZES) + 1, len(PLACES) + 1]
    num_classes = of_color * len(COLORS) + [len(BACKGROUNDS)]
    label_tokens = [k - NUM_SLOTS for k in range(len(COLORS)) for _ in of_color] + [-1]
    stages = Stages(World(train_scenes(), num_classes, render, label_tokens), folder, arguments.seed)
    stages.autoencoder(vae, num_steps=arguments.vae_steps, crop_size=64, use_bf16=True)
    stages.text_encoder(text_encoder, tokenizer, num_steps=arguments.text_steps, use_bf16=True)
    data = stages.latents(vae, num_scenes=arguments.num_pictures)
    stages.unet(
        teacher,
        data,
        text_encoder,
        tokenizer,
        num_steps=arguments.teacher_steps,
        batch_size=48,
        use_bf16=True,
        learning_rate=1e-3,
        late_share=0.5,
        first_late=700,
    )
    save_pipeline(folder / "teacher", teacher, vae, text_encoder, build_scheduler())
    student = distill(
        teacher,
        Text(*stages.text_table(text_encoder, tokenizer)),
        folder,
        num_steps=arguments.student_steps,
        guidance_scale=arguments.guidance_scale,
        seed=arguments.seed,
    )
    save_pipeline(folder / "model", student, vae, text_encoder, build_turbo_scheduler())


def save_pipeline(
    folder: Path,
    unet: UNet2DConditionModel,
    vae: AutoencoderTiny,
    text_encoder: CLIPTextModel,
    scheduler: SchedulerMixin,
) -> None:
    """Write a Stable Diffusion pipeline with its weights in 16 bits. The modules given stay as they are."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=build_tokenizer(folder / "tokenizer", WORDS, max_tokens=MAX_TOKENS),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    # Transformers 4 reads the files that this writes; transformers 5 saves other ones.
    build_tokenizer(folder / "tokenizer", WORDS, max_tokens=MAX_TOKENS)
    name_weights_for_every_transformers(folder / "text_encoder")
    # Here, not with `half()`: the configurations still say float32, the type in which all parts are then loaded.
    for path in folder.glob("*/*.safetensors"):
        tensors, metadata = read_tensors_and_metadata(path)
        write_tensors(path, {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}, metadata)
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
