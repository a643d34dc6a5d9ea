"""Trains the embedded model that the package ships: `python -m noisepolicy.shapes.pretrain WORK_FOLDER`.

Five stages, each leaving a file in the work folder; a stage whose file is there is skipped and a killed UNet stage
goes on from its last checkpoint, so the command is simply run again:

1. the autoencoder, on freshly drawn scenes;
2. the text encoder alone, to say each object's colour and shape and the direction from its end tokens, then frozen:
   trained jointly with the UNet, relations stay near chance for 100,000 images;
3. 20,480 pictures encoded once;
4. the UNet on the stored latents, v-prediction, 10% of captions dropped for guidance, exponential moving average;
5. the pipeline in diffusers' format, safetensors; UNet and autoencoder in fp16.

Seeded; about 25 minutes on two cores of an Intel Xeon with AMX (`--vae-bf16`; slower without that flag).
"""

import argparse
import time
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from noisepolicy.shapes.captions import COLORS, DIRECTIONS, NUM_OBJECTS, SHAPES, Scene, train_scenes
from noisepolicy.shapes.networks import TEXT_WIDTH, build_scheduler, build_text_encoder, build_unet, build_vae
from noisepolicy.shapes.renderer import render
from noisepolicy.shapes.tokenizer import build_tokenizer
from noisepolicy.storage import load_optimizer_tensors, optimizer_tensors, read_tensors, write_tensors

_LATENT_BATCH = 128
_CHECKPOINT_EVERY = 250


def _generator(seed: int, step: int) -> torch.Generator:
    """A fresh generator per step, so that a resumed stage draws what an uninterrupted one would."""
    return torch.Generator().manual_seed((seed << 32) + step)


def _choose(generator: torch.Generator, count: int) -> list[Scene]:
    scenes = train_scenes()
    return [scenes[i] for i in torch.randint(len(scenes), (count,), generator=generator).tolist()]


def _tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    return tokenizer(captions, padding="max_length", return_tensors="pt").input_ids


def _log(stage: str, step: int, num_steps: int, loss: float, start: float) -> None:
    if step % 100 == 0 or step == num_steps:
        print(f"{stage} {step}/{num_steps}  loss {loss:.5f}  {time.monotonic() - start:.0f} s", flush=True)


def train_vae(vae: AutoencoderTiny, num_steps: int, seed: int, *, use_bf16: bool) -> None:
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, num_steps, pct_start=0.05)
    start = time.monotonic()
    for step in range(num_steps):
        generator = _generator(seed, step)
        pixels = render(_choose(generator, 32), generator) * 2 - 1
        with torch.autocast("cpu", torch.bfloat16, enabled=use_bf16):
            latents = vae.encoder(pixels)
            jittered = latents + 0.05 * torch.randn(latents.shape, generator=generator)
            decoded = vae.decoder(jittered).float()
        difference = decoded - pixels
        loss = (difference**2).mean() + 0.3 * difference.abs().mean() + 1e-3 * (latents.float() ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        _log("autoencoder", step + 1, num_steps, loss.item(), start)


def train_text_encoder(encoder: CLIPTextModel, tokenizer: CLIPTokenizer, num_steps: int, seed: int) -> None:
    sizes = [len(COLORS)] * NUM_OBJECTS + [len(SHAPES)] * NUM_OBJECTS + [len(DIRECTIONS)]
    head = torch.nn.Linear(TEXT_WIDTH, sum(sizes))
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, num_steps, pct_start=0.1)
    start = time.monotonic()
    for step in range(num_steps):
        scenes = _choose(_generator(seed, step), 128)
        tokens = _tokens(tokenizer, [scene.caption for scene in scenes])
        has_read_all = (tokens == tokenizer.eos_token_id).nonzero(as_tuple=True)
        logits = head(encoder(tokens).last_hidden_state[has_read_all])
        targets = torch.tensor([[*scene.colors, *scene.shapes, scene.direction] for scene in scenes])
        targets = targets[has_read_all[0]]
        losses = [F.cross_entropy(part, target) for part, target in zip(logits.split(sizes, 1), targets.T, strict=True)]
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        _log("text encoder", step + 1, num_steps, loss.item(), start)


@torch.no_grad()
def encode_pictures(vae: AutoencoderTiny, num_pictures: int, seed: int) -> dict[str, torch.Tensor]:
    index_of = {scene: index for index, scene in enumerate(train_scenes())}
    latents, scene_index = [], []
    for batch in range(-(-num_pictures // _LATENT_BATCH)):
        generator = _generator(seed, 1_000_000 + batch)
        scenes = _choose(generator, _LATENT_BATCH)
        latents.append(vae.encoder(render(scenes, generator) * 2 - 1))
        scene_index += [index_of[scene] for scene in scenes]
    return {"latents": torch.cat(latents), "scene_index": torch.tensor(scene_index)}


def train_unet(
    unet: UNet2DConditionModel,
    data: dict[str, torch.Tensor],
    text: torch.Tensor,
    null_text: torch.Tensor,
    *,
    num_steps: int,
    seed: int,
    checkpoint: Path,
) -> None:
    """Trains `unet` on scaled latents and leaves the moving average of its weights in it."""
    scheduler = build_scheduler()
    unet.to(memory_format=torch.channels_last).train()
    average = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1.5e-3, weight_decay=0.01, betas=(0.9, 0.99))
    first_step = 0
    if checkpoint.exists():
        tensors = read_tensors(checkpoint)
        unet.load_state_dict({name: tensors[f"unet.{name}"] for name in average})
        average = {name: tensors[f"average.{name}"] for name in average}
        load_optimizer_tensors(optimizer, tensors, "optimizer")
        first_step = int(tensors["step"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, num_steps, pct_start=0.05)
    for _ in range(first_step):
        schedule.step()

    start = time.monotonic()
    for step in range(first_step, num_steps):
        generator = _generator(seed, step)
        index = torch.randint(len(data["latents"]), (64,), generator=generator)
        clean = data["latents"][index]
        timesteps = torch.randint(1000, (64,), generator=generator)
        # The last timesteps decide what few-step sampling does with its noise: see them more often.
        is_late = torch.rand(64, generator=generator) < 0.15
        timesteps = torch.where(is_late, torch.randint(850, 1000, (64,), generator=generator), timesteps)
        noise = torch.randn(clean.shape, generator=generator)
        is_dropped = torch.rand(64, generator=generator) < 0.1
        condition = torch.where(is_dropped[:, None, None], null_text, text[data["scene_index"][index]])
        noisy = scheduler.add_noise(clean, noise, timesteps).contiguous(memory_format=torch.channels_last)
        prediction = unet(noisy, timesteps, condition).sample
        loss = F.mse_loss(prediction, scheduler.get_velocity(clean, noise, timesteps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.999, (1 + step) / (10 + step))
        state = unet.state_dict()
        torch._foreach_lerp_(list(average.values()), [state[name] for name in average], 1 - decay)
        _log("unet", step + 1, num_steps, loss.item(), start)
        if (step + 1) % _CHECKPOINT_EVERY == 0:
            tensors = {f"unet.{name}": tensor for name, tensor in state.items()}
            tensors |= {f"average.{name}": tensor for name, tensor in average.items()}
            tensors |= optimizer_tensors(optimizer, "optimizer")
            write_tensors(checkpoint, tensors | {"step": torch.tensor(step + 1)})
    unet.load_state_dict(average)
    unet.eval().requires_grad_(False)


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
    folder, seed = arguments.work_folder, arguments.seed
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(folder / "tokenizer")
    vae, text_encoder, unet = build_vae(), build_text_encoder(tokenizer), build_unet()

    def run_stage(name: str, module: torch.nn.Module, train) -> None:
        path = folder / f"{name}.safetensors"
        if path.exists():
            module.load_state_dict(read_tensors(path))
        else:
            train()
            write_tensors(path, module.state_dict())
        module.eval().requires_grad_(False)

    run_stage("vae", vae, lambda: train_vae(vae, arguments.vae_steps, seed, use_bf16=arguments.vae_bf16))
    run_stage(
        "text_encoder",
        text_encoder,
        lambda: train_text_encoder(text_encoder, tokenizer, arguments.text_steps, seed),
    )
    latents_path = folder / "latents.safetensors"
    if not latents_path.exists():
        write_tensors(latents_path, encode_pictures(vae, arguments.num_pictures, seed))
    data = read_tensors(latents_path)
    scaling_factor = 1 / data["latents"].std().item()
    data["latents"] *= scaling_factor
    vae.register_to_config(scaling_factor=scaling_factor)

    with torch.no_grad():
        text = text_encoder(_tokens(tokenizer, [scene.caption for scene in train_scenes()])).last_hidden_state
        null_text = text_encoder(_tokens(tokenizer, [""])).last_hidden_state
    run_stage(
        "unet",
        unet,
        lambda: train_unet(
            unet,
            data,
            text,
            null_text,
            num_steps=arguments.unet_steps,
            seed=seed,
            checkpoint=folder / "unet_checkpoint.safetensors",
        ),
    )
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
    print(f"wrote {folder / 'model'}")


if __name__ == "__main__":
    main()
