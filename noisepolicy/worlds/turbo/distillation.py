"""Distribution matching distillation (Yin et al., arXiv 2311.18828 and 2405.14867): from a guided teacher to a student.

The student makes a picture in one, two or four steps of its own sampler, without guidance. Where its distribution and
the guided teacher's differ is told by two predictions for the student's picture with noise added: the teacher's, and
that of a third network, the critic, which is kept trained on the student's pictures. No picture of the data is needed.
As with the distilled models that people run, it finds the likely pictures of a prompt and leaves out the others.
"""

import copy
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch.nn import functional as F

from noisepolicy.storage import load_optimizer_tensors, optimizer_tensors, read_tensors, write_tensors
from noisepolicy.worlds.shapes.networks import build_scheduler

STEP_COUNTS = (1, 2, 4)
_BATCH = 24
_LEARNING_RATE, _CRITIC_LEARNING_RATE = 2e-4, 6e-4
_CHECKPOINT_EVERY = 50
_LOG_EVERY = 25


@dataclass(frozen=True)
class Text:
    """The encoded captions: `(captions, tokens, width)`, and the empty one, `(1, tokens, width)`."""

    captions: torch.Tensor
    empty: torch.Tensor


class _Denoiser:
    """Predicts clean latents with a UNet that predicts v."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.unet = unet
        products = build_scheduler().alphas_cumprod
        self.signal, self.noise = products.sqrt(), (1 - products).sqrt()

    def levels(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return signal and noise at timesteps `(batch,)`, for latents."""
        return self.signal[timesteps][:, None, None, None], self.noise[timesteps][:, None, None, None]

    def velocity(self, noisy: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            noisy = noisy.contiguous(memory_format=torch.channels_last)
            return self.unet(noisy, timesteps, text).sample.float()

    def clean(self, noisy: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        signal, noise = self.levels(timesteps)
        return signal * noisy - noise * self.velocity(noisy, timesteps, text)

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        signal_level, noise_level = self.levels(timesteps)
        return signal_level * clean + noise_level * noise


def distill(
    teacher: UNet2DConditionModel,
    text: Text,
    folder: Path,
    *,
    num_steps: int,
    guidance_scale: float,
    seed: int,
) -> UNet2DConditionModel:
    """Return the student: the moving average of its weights after `num_steps` updates.

    A killed run goes on from its last checkpoint in `folder`.
    """
    teacher.to(memory_format=torch.channels_last)  # as after its training: a loaded one would round otherwise
    student, critic = copy.deepcopy(teacher), copy.deepcopy(teacher)
    students = [student, critic]
    for unet in students:
        unet.train().requires_grad_(True)
    average = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    # The critic has to follow the student: it learns faster.
    optimizers = [
        torch.optim.AdamW(student.parameters(), lr=_LEARNING_RATE, betas=(0.0, 0.99), weight_decay=0.0),
        torch.optim.AdamW(critic.parameters(), lr=_CRITIC_LEARNING_RATE, betas=(0.0, 0.99), weight_decay=0.0),
    ]
    checkpoint, first_step = folder / "student_checkpoint.safetensors", 0
    if checkpoint.exists():
        tensors = read_tensors(checkpoint)
        for number, (unet, optimizer) in enumerate(zip(students, optimizers, strict=True)):
            unet.load_state_dict({name: tensors[f"{number}.{name}"] for name in average})
            load_optimizer_tensors(optimizer, tensors, f"optimizer{number}")
        average = {name: tensors[f"average.{name}"] for name in average}
        first_step = int(tensors["step"])
    guide, maker, follower = _Denoiser(teacher), _Denoiser(student), _Denoiser(critic)
    shape = (_BATCH, teacher.config.in_channels, teacher.config.sample_size, teacher.config.sample_size)

    start, sums = time.monotonic(), torch.zeros(2)
    for step in range(first_step, num_steps):
        generator = torch.Generator().manual_seed((seed << 32) + 2_000_000 + step)
        condition = text.captions[torch.randint(len(text.captions), (_BATCH,), generator=generator)]
        made = _make(maker, condition, shape, generator)

        timesteps = torch.randint(20, 980, (_BATCH,), generator=generator)
        noisy = guide.add_noise(made.detach(), torch.randn(shape, generator=generator), timesteps)
        with torch.no_grad():
            both = torch.cat([condition, text.empty.expand_as(condition)])
            with_text, without = guide.clean(noisy.repeat(2, 1, 1, 1), timesteps.repeat(2), both).chunk(2)
            wanted = without + guidance_scale * (with_text - without)
            difference = follower.clean(noisy, timesteps, condition) - wanted
            difference /= (made - wanted).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-3)
        student_loss = 0.5 * F.mse_loss(made, (made - difference).detach())
        _update(student, optimizers[0], student_loss)

        noise = torch.randn(shape, generator=generator)
        timesteps = torch.randint(1000, (_BATCH,), generator=generator)
        signal_level, noise_level = follower.levels(timesteps)
        predicted = follower.velocity(follower.add_noise(made.detach(), noise, timesteps), timesteps, condition)
        critic_loss = F.mse_loss(predicted, signal_level * noise - noise_level * made.detach())
        _update(critic, optimizers[1], critic_loss)

        state = student.state_dict()
        decay = min(0.99, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.values()), [state[name] for name in average], 1 - decay)
        sums += torch.tensor([difference.abs().mean().item(), critic_loss.item()])
        if (step + 1) % _LOG_EVERY == 0:
            values = "  ".join(f"{value:.4f}" for value in (sums / _LOG_EVERY).tolist())
            print(f"student {step + 1}/{num_steps}  {values}  {time.monotonic() - start:.0f} s", flush=True)
            sums.zero_()
        if (step + 1) % _CHECKPOINT_EVERY == 0:
            tensors = {f"average.{name}": tensor for name, tensor in average.items()}
            for number, (unet, optimizer) in enumerate(zip(students, optimizers, strict=True)):
                tensors |= {f"{number}.{name}": tensor for name, tensor in unet.state_dict().items()}
                tensors |= optimizer_tensors(optimizer, f"optimizer{number}")
            write_tensors(checkpoint, tensors | {"step": torch.tensor(step + 1)})
    student.load_state_dict(average)
    return student.eval().requires_grad_(False)


def _make(
    student: _Denoiser, condition: torch.Tensor, shape: tuple[int, ...], generator: torch.Generator
) -> torch.Tensor:
    """Make latents as the student's sampler does, up to a random one of its steps: the gradient is that step's."""
    num_steps = STEP_COUNTS[int(torch.randint(len(STEP_COUNTS), (), generator=generator))]
    last = int(torch.randint(num_steps, (), generator=generator))
    timesteps = [1000 - 1000 * k // num_steps - 1 for k in range(num_steps)]
    noisy = torch.randn(shape, generator=generator)
    for k, timestep in enumerate(timesteps[: last + 1]):
        now = torch.full((len(condition),), timestep)
        with torch.set_grad_enabled(k == last):
            clean = student.clean(noisy, now, condition)
        if k < last:
            signal, noise = student.levels(now)
            residual = (noisy - signal * clean) / noise
            noisy = student.add_noise(clean, residual, torch.full_like(now, timesteps[k + 1]))
    return clean


def _update(unet: UNet2DConditionModel, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
    optimizer.step()
