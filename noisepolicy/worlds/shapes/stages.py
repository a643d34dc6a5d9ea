"""The stages that train an embedded world's model, of images or of clips.

Each leaves a file in the work folder; a stage whose file is there is skipped and a killed UNet stage goes on from its
last checkpoint, so a script of them is simply run again:

1. the autoencoder, on freshly drawn scenes, frame by frame;
2. the text encoder alone, to say each object's attributes from its end tokens, then frozen: trained jointly with the
   UNet, relations stay near chance for 100,000 images;
3. scenes encoded once;
4. the UNet on the stored latents, v-prediction, 10% of captions dropped for guidance, exponential moving average.

Everything is drawn from generators named by seed and step.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from noisepolicy.storage import load_optimizer_tensors, optimizer_tensors, read_tensors, write_tensors
from noisepolicy.worlds.shapes.networks import build_scheduler

_LATENT_BATCH = 128
_VAE_FRAMES = 64  # of a batch of clips
_CROPS = 4  # of a picture
_CHECKPOINT_EVERY = 250


@dataclass(frozen=True)
class World:
    """The scenes that a model is trained on, and how to draw them."""

    scenes: Sequence[Any]
    """Scenes for training; each has a `caption`, and `labels`, its content as class numbers."""
    num_classes: Sequence[int]
    """Number of classes of each label."""
    render: Callable[[Sequence[Any], torch.Generator], torch.Tensor]
    """Draws scenes: images `(batch, 3, height, width)` or clips `(batch, frames, 3, height, width)`, in [0, 1]."""
    label_tokens: Sequence[int] | None = None
    """Number of the token that says each label, -1 the last; None: every token from the end token on says all."""

    def choose(self, generator: torch.Generator, count: int) -> list[Any]:
        return [self.scenes[i] for i in torch.randint(len(self.scenes), (count,), generator=generator).tolist()]


@dataclass(frozen=True)
class Stages:
    """Runs stages in `folder`."""

    world: World
    folder: Path
    seed: int

    def autoencoder(
        self,
        vae: AutoencoderTiny,
        *,
        num_steps: int,
        use_bf16: bool = False,
        learning_rate: float = 2e-3,
        crop_size: int | None = None,
    ) -> None:
        """Train on whole frames, or on crops of that size: there are `_CROPS` of each picture."""
        train = self._train_vae
        options = {"use_bf16": use_bf16, "learning_rate": learning_rate, "crop_size": crop_size}
        self._run("vae", vae, lambda: train(vae, num_steps, **options))

    def text_encoder(
        self, encoder: CLIPTextModel, tokenizer: CLIPTokenizer, *, num_steps: int, use_bf16: bool = False
    ) -> None:
        train = self._train_text_encoder
        self._run("text_encoder", encoder, lambda: train(encoder, tokenizer, num_steps, use_bf16=use_bf16))

    def latents(self, vae: AutoencoderTiny, *, num_scenes: int) -> dict[str, torch.Tensor]:
        """Encode scenes, scaled to unit variance, and set the VAE's scale. Returns latents and the scenes' numbers."""
        path = self.folder / "latents.safetensors"
        if not path.exists():
            write_tensors(path, self._encode_scenes(vae, num_scenes))
        data = read_tensors(path)
        scaling_factor = 1 / data["latents"].std().item()
        data["latents"] *= scaling_factor
        vae.register_to_config(scaling_factor=scaling_factor)
        return data

    def unet(
        self,
        unet: torch.nn.Module,
        data: dict[str, torch.Tensor],
        encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        *,
        num_steps: int,
        batch_size: int = 64,
        use_bf16: bool = False,
        learning_rate: float = 1.5e-3,
        late_share: float = 0.15,
        first_late: int = 850,
    ) -> None:
        """Train on the stored latents, with `late_share` of the timesteps from `first_late` on.

        The late timesteps decide what few-step sampling does with its noise, and only there is the caption needed: in
        larger latents objects show through more noise.
        """
        text, null_text = self.text_table(encoder, tokenizer)
        train = self._train_unet
        options = {"use_bf16": use_bf16, "learning_rate": learning_rate}
        options |= {"late_share": late_share, "first_late": first_late}
        self._run("unet", unet, lambda: train(unet, data, text, null_text, num_steps, batch_size, **options))

    def text_table(self, encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode the caption of every scene, and the empty caption."""
        with torch.no_grad():
            captions = [scene.caption for scene in self.world.scenes]
            parts = _tokens(tokenizer, captions).split(_LATENT_BATCH)
            text = torch.cat([encoder(part).last_hidden_state for part in parts])
            null_text = encoder(_tokens(tokenizer, [""])).last_hidden_state
        return text, null_text

    def _run(self, name: str, module: torch.nn.Module, train: Callable[[], None]) -> None:
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            module.load_state_dict(read_tensors(path))
        else:
            train()
            write_tensors(path, module.state_dict())
        module.eval().requires_grad_(False)

    def _generator(self, step: int) -> torch.Generator:
        """Make a fresh generator for a step, so that a resumed stage draws the same as an uninterrupted one."""
        return torch.Generator().manual_seed((self.seed << 32) + step)

    def _train_vae(
        self, vae: AutoencoderTiny, num_steps: int, *, use_bf16: bool, learning_rate: float, crop_size: int | None
    ) -> None:
        optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, num_steps, pct_start=0.05)
        start = time.monotonic()
        for step in range(num_steps):
            generator = self._generator(step)
            if crop_size is None:
                pixels = _frames(self.world.render(self.world.choose(generator, 32), generator))[:_VAE_FRAMES] * 2 - 1
            else:
                pictures = self.world.render(self.world.choose(generator, 32 // _CROPS), generator)
                pixels = (_crops(pictures, crop_size, generator) * 2 - 1).contiguous(memory_format=torch.channels_last)
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

    def _train_text_encoder(
        self, encoder: CLIPTextModel, tokenizer: CLIPTokenizer, num_steps: int, *, use_bf16: bool
    ) -> None:
        sizes = list(self.world.num_classes)
        head = torch.nn.Linear(encoder.config.hidden_size, sum(sizes))
        optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, num_steps, pct_start=0.1)
        start = time.monotonic()
        for step in range(num_steps):
            scenes = self.world.choose(self._generator(step), 128)
            tokens = _tokens(tokenizer, [scene.caption for scene in scenes])
            with torch.autocast("cpu", torch.bfloat16, enabled=use_bf16):
                hidden = encoder(tokens).last_hidden_state.float()
            targets = torch.tensor([scene.labels for scene in scenes])
            if self.world.label_tokens is None:
                has_read_all = (tokens == tokenizer.eos_token_id).nonzero(as_tuple=True)
                logits = head(hidden[has_read_all]).split(sizes, 1)
                targets = targets[has_read_all[0]]
            else:
                parts = head(hidden).split(sizes, 2)
                logits = [part[:, token] for part, token in zip(parts, self.world.label_tokens, strict=True)]
            pairs = zip(logits, targets.T, strict=True)
            loss = torch.stack([F.cross_entropy(part, target) for part, target in pairs]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            _log("text encoder", step + 1, num_steps, loss.item(), start)

    @torch.no_grad()
    def _encode_scenes(self, vae: AutoencoderTiny, num_scenes: int) -> dict[str, torch.Tensor]:
        index_of = {scene: index for index, scene in enumerate(self.world.scenes)}
        latents, scene_index = [], []
        for batch in range(-(-num_scenes // _LATENT_BATCH)):
            generator = self._generator(1_000_000 + batch)
            scenes = self.world.choose(generator, _LATENT_BATCH)
            pictures = self.world.render(scenes, generator)
            encoded = vae.encoder(_frames(pictures) * 2 - 1)
            if pictures.ndim == 5:  # latents of clips are (channels, frames, height, width)
                encoded = encoded.unflatten(0, pictures.shape[:2]).transpose(1, 2)
            latents.append(encoded)
            scene_index += [index_of[scene] for scene in scenes]
        return {"latents": torch.cat(latents), "scene_index": torch.tensor(scene_index)}

    def _train_unet(
        self,
        unet: torch.nn.Module,
        data: dict[str, torch.Tensor],
        text: torch.Tensor,
        null_text: torch.Tensor,
        num_steps: int,
        batch_size: int,
        *,
        use_bf16: bool,
        learning_rate: float,
        late_share: float,
        first_late: int,
    ) -> None:
        """Train `unet` and leave the moving average of its weights in it."""
        checkpoint = self.folder / "unet_checkpoint.safetensors"
        scheduler = build_scheduler()
        is_video = data["latents"].ndim == 5
        memory_format = torch.contiguous_format if is_video else torch.channels_last
        unet.to(memory_format=memory_format).train()
        average = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
        optimizer = torch.optim.AdamW(unet.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.99))
        first_step = 0
        if checkpoint.exists():
            tensors = read_tensors(checkpoint)
            unet.load_state_dict({name: tensors[f"unet.{name}"] for name in average})
            average = {name: tensors[f"average.{name}"] for name in average}
            load_optimizer_tensors(optimizer, tensors, "optimizer")
            first_step = int(tensors["step"])
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, num_steps, pct_start=0.05)
        for _ in range(first_step):
            schedule.step()

        start = time.monotonic()
        for step in range(first_step, num_steps):
            generator = self._generator(step)
            index = torch.randint(len(data["latents"]), (batch_size,), generator=generator)
            clean = data["latents"][index]
            timesteps = torch.randint(1000, (batch_size,), generator=generator)
            is_late = torch.rand(batch_size, generator=generator) < late_share
            late = torch.randint(first_late, 1000, (batch_size,), generator=generator)
            timesteps = torch.where(is_late, late, timesteps)
            noise = torch.randn(clean.shape, generator=generator)
            is_dropped = torch.rand(batch_size, generator=generator) < 0.1
            condition = torch.where(is_dropped[:, None, None], null_text, text[data["scene_index"][index]])
            noisy = scheduler.add_noise(clean, noise, timesteps).contiguous(memory_format=memory_format)
            with torch.autocast("cpu", torch.bfloat16, enabled=use_bf16):
                prediction = unet(noisy, timesteps, condition).sample.float()
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


def _frames(pictures: torch.Tensor) -> torch.Tensor:
    """Return images as they are, and clips as a batch of their frames."""
    return pictures if pictures.ndim == 4 else pictures.flatten(0, 1)


def _crops(pictures: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """Cut `_CROPS` squares of `size` pixels from each picture, at random places."""
    height, width = pictures.shape[2:]
    tops = torch.randint(height - size + 1, (len(pictures), _CROPS), generator=generator).tolist()
    lefts = torch.randint(width - size + 1, (len(pictures), _CROPS), generator=generator).tolist()
    places = [(n, y, x) for n in range(len(pictures)) for y, x in zip(tops[n], lefts[n], strict=True)]
    return torch.stack([pictures[n, :, y : y + size, x : x + size] for n, y, x in places])


def _tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    return tokenizer(captions, padding="max_length", return_tensors="pt").input_ids


def _log(stage: str, step: int, num_steps: int, loss: float, start: float) -> None:
    if step % 100 == 0 or step == num_steps:
        print(f"{stage} {step}/{num_steps}  loss {loss:.5f}  {time.monotonic() - start:.0f} s", flush=True)
