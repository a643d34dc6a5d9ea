"""DDPO: policy gradients on the weights of the denoiser (Black et al., arXiv 2305.13301), here by LoRA.

Denoising is an episode. Its state is the latents x_t, its action the next latents, and its policy the sampler's step

    x_{t-1} ~ N( mean(x_t, unet(x_t, t, prompt)), std_t^2 )                DDIM with eta (arXiv 2010.02502, equation 12)

so every step has an exact log-density, and the reward of the image is the reward of every step of its trajectory. The
loss is the importance-sampled one with PPO's clip (DDPO_IS), its log-densities float32 and summed over the latents'
dimensions, so that the ratio is the ratio of two densities:

    loss = mean over trajectories and steps of  -min( ratio A, clip(ratio, 1 - clip_range, 1 + clip_range) A )

The last step of DDIM goes to a noise level of zero, where std_t is 0 for every eta: no density, no gradient. DDPO's own
code clamps the std inside the density alone, so the sample comes from another distribution than the one it is scored
under. Here a step's noise is really drawn with max(std_t, min_std), and the density is that of the draw; with a
`min_std` of 0 such a step has nothing to learn from and is left out.

Unlike a noise policy this changes the model: `frozen()` is a copy of the tuned one, sampled without noise as the base
model is. Not here: other schedulers' steps, other denoisers, several devices.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

from noisepolicy.frozen import FrozenDiffusersPipeline
from noisepolicy.frozen.loading import load_pipeline
from noisepolicy.ops import gaussian_log_prob, ppo_clip_loss
from noisepolicy.rewards import Reward
from noisepolicy.storage import load_optimizer_tensors, optimizer_tensors, read_tensors, write_tensors
from noisepolicy.training.checkpoint import with_prefix, without_prefix
from noisepolicy.training.rollout import stream_generator, stream_seed

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class DdpoConfig:
    """Settings of DDPO. The defaults learned fastest on the embedded model at 2 steps."""

    batch_size: int = 128
    """Number of images in an iteration."""
    minibatch_size: int = 64
    """Number of images in a gradient step, and of images that are sampled at a time."""
    num_epochs: int = 2
    """Number of passes over an iteration's images."""
    num_inference_steps: int = 2
    guidance_scale: float = 1.5
    """Guidance scale of sampling and training: the density is that of the guided step."""
    eta: float = 1.0
    """DDIM's noise, in [0, 1]; 1 is DDPM's."""
    min_std: float = 0.3
    """Smallest standard deviation of a step."""
    clip_range: float = 0.2
    max_advantage: float = 5.0
    lora_rank: int = 8
    """Rank of the LoRA weights of the attention projections; the scale of the update is 1."""
    learning_rate: float = 2e-3
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("batch_size", "minibatch_size", "num_epochs", "num_inference_steps", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size < 2 or self.batch_size % self.minibatch_size:
            raise ValueError(
                f"batch_size must be at least 2 and a multiple of minibatch_size {self.minibatch_size}, "
                f"got {self.batch_size}"
            )
        if not 0 <= self.eta <= 1 or self.min_std < 0 or self.eta + self.min_std == 0:
            raise ValueError(
                f"eta must be in [0, 1] and min_std not negative, one of them above 0, got {self.eta}, {self.min_std}"
            )


@dataclass(frozen=True)
class Trajectories:
    """The samples of an iteration."""

    prompt_row: torch.Tensor
    """Indices into the training prompts, int64 `(batch,)`."""
    latents: torch.Tensor
    """Latents from the noise to the decoder's input, float32 `(steps + 1, batch, *latent_shape)`."""
    old_log_prob: torch.Tensor
    """Log-density of each step under its own weights, float32 `(steps, batch)`; 0 for a step without noise."""
    reward: torch.Tensor
    """Rewards, float32 `(batch,)`."""


class Ddpo:
    """Tunes a copy of a pipeline's UNet; the pipeline's own stays as it is.

    Args:
        model: A `StableDiffusionPipeline` with a `DDIMScheduler`, or the folder of one.
        reward: Reward of images and prompts.
        train_prompts: Prompts that iterations draw from.
        seed: Seed of the LoRA weights, prompts and noise.

    Raises:
        ValueError: if the pipeline or its scheduler is of another class, or there are no prompts.
    """

    def __init__(
        self,
        model: StableDiffusionPipeline | str | Path,
        reward: Reward,
        train_prompts: Sequence[str],
        *,
        seed: int,
        config: DdpoConfig | None = None,
    ) -> None:
        pipeline = load_pipeline(model) if isinstance(model, str | Path) else model
        for part, kind in ((pipeline, StableDiffusionPipeline), (pipeline.scheduler, DDIMScheduler)):
            if type(part) is not kind:
                raise ValueError(f"DDPO here is for a {kind.__name__}, got a {type(part).__name__}")
        if len(train_prompts) == 0:
            raise ValueError("there are no training prompts")
        self.config = config or DdpoConfig()
        self.iteration = 0
        self._pipeline, self._reward, self._prompts, self._seed = pipeline, reward, list(train_prompts), seed
        base = FrozenDiffusersPipeline(pipeline)
        self._latent_shape = base.latent_shape
        self._embeds = base.encode(self._prompts).prompt_embeds
        self._device = self._embeds.device
        self._negative_embeds = base.negative_embeds["negative_prompt_embeds"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, "lora weights"))
            rank = self.config.lora_rank
            lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(_ATTENTION))
            unet = get_peft_model(copy.deepcopy(pipeline.unet), lora)
        self.unet = unet.to(memory_format=torch.channels_last).eval()
        """The base UNet, frozen, and its LoRA weights: the parameters that require gradients."""
        self._optimizer = torch.optim.AdamW(self.lora_weights().values(), lr=self.config.learning_rate, fused=True)
        self._scheduler = copy.deepcopy(pipeline.scheduler)
        self._scheduler.set_timesteps(self.config.num_inference_steps)
        zeros = torch.zeros(1, *self._latent_shape, device=self._device)
        self.stds = tuple(
            max(self._step(zeros, zeros, index, noise=1.0).max().item(), self.config.min_std)
            for index in range(self.config.num_inference_steps)
        )
        """Standard deviations of the noise that each step adds."""

    @property
    def images(self) -> int:
        """Number of images made so far."""
        return self.iteration * self.config.batch_size

    def iterate(self) -> dict[str, float]:
        """Samples a batch and trains on it. Returns `images` so far and of this batch `reward` (mean), `reward_std`,
        `clip_fraction` and `approx_kl` (nats a step, between old and new weights, averaged over the updates)."""
        trajectories = self.roll_out()
        metrics = self._update(trajectories)
        self.iteration += 1
        reward = trajectories.reward
        return {"images": self.images, "reward": reward.mean().item(), "reward_std": reward.std().item(), **metrics}

    @torch.no_grad()
    def roll_out(self) -> Trajectories:
        """Sample the trajectories of the next iteration with the present weights."""
        config, shape = self.config, (self.config.batch_size, *self._latent_shape)
        generator = stream_generator(self._seed, "rollout", self.iteration)
        prompt_row = torch.randint(len(self._prompts), (config.batch_size,), generator=generator)
        noise = torch.randn(config.num_inference_steps + 1, *shape, generator=generator)
        latents = noise.to(self._device)  # a step's noise, until the step is made
        log_prob = torch.zeros(config.num_inference_steps, config.batch_size, device=self._device)
        images = []
        for rows in torch.arange(config.batch_size).split(config.minibatch_size):
            for index, std in enumerate(self.stds):
                mean = self.step_mean(latents[index, rows], index, prompt_row[rows])
                latents[index + 1, rows] = mean + std * latents[index + 1, rows]
                if std > 0:
                    log_prob[index, rows] = gaussian_log_prob(latents[index + 1, rows], mean, self._log_std(index))
            images.append(self._decode(latents[-1, rows]))
        reward = self._reward(torch.cat(images), [self._prompts[row] for row in prompt_row.tolist()])
        return Trajectories(prompt_row, latents, log_prob, reward.float().to(self._device))

    def step_mean(self, latents: torch.Tensor, index: int, prompt_row: torch.Tensor) -> torch.Tensor:
        """Return the mean of step `index` from `latents`, float32 `(batch, *latent_shape)`, differentiable.

        Both halves of the guidance go through the UNet in one call.
        """
        embeds = self._embeds[prompt_row]
        both = torch.cat([self._negative_embeds.expand_as(embeds), embeds])
        timestep = self._scheduler.timesteps[index]
        output = self.unet(torch.cat([latents, latents]), timestep, encoder_hidden_states=both, return_dict=False)[0]
        away, toward = output.chunk(2)
        return self._step(torch.lerp(away, toward, self.config.guidance_scale), latents, index, noise=0.0)

    def lora_weights(self) -> dict[str, torch.nn.Parameter]:
        """Return the trained weights, by their names in `unet`."""
        return {name: weight for name, weight in self.unet.named_parameters() if weight.requires_grad}

    def frozen(self) -> FrozenDiffusersPipeline:
        """Return a copy of the tuned model with merged LoRA weights; it generates like the base model, with eta 0."""
        pipeline = copy.copy(self._pipeline)
        pipeline.unet = copy.deepcopy(self.unet).merge_and_unload()
        return FrozenDiffusersPipeline(pipeline)

    def save(self, path: Path) -> None:
        """Write LoRA weights, optimizer and iteration; nothing else is needed to go on bit for bit."""
        tensors = with_prefix("lora", self.lora_weights()) | optimizer_tensors(self._optimizer, "optimizer")
        write_tensors(path, {**tensors, "iteration": torch.tensor(self.iteration)}, {"settings": self._settings()})

    def load(self, path: Path) -> None:
        """Restore what `save` wrote.

        Raises:
            ValueError: if the file was written under another seed or other settings.
        """
        with safe_open(path, "pt") as file:
            written = file.metadata()["settings"]
        if written != self._settings():
            raise ValueError(f"{path} was written with {written}, and this is {self._settings()}")
        tensors = read_tensors(path)
        saved = without_prefix("lora", tensors)
        with torch.no_grad():
            for name, weight in self.lora_weights().items():
                weight.copy_(saved[name])
        load_optimizer_tensors(self._optimizer, tensors, "optimizer")
        self.iteration = int(tensors["iteration"])

    def _update(self, trajectories: Trajectories) -> dict[str, float]:
        config, weights = self.config, list(self.lora_weights().values())
        generator = stream_generator(self._seed, "update", self.iteration)
        reward = trajectories.reward
        advantages = (reward - reward.mean()) / (reward.std() + 1e-6)
        advantages = advantages.clamp(-config.max_advantage, config.max_advantage)
        steps = [index for index, std in enumerate(self.stds) if std > 0]
        totals = torch.zeros(2, device=self._device)
        for _ in range(config.num_epochs):
            for rows in torch.randperm(config.batch_size, generator=generator).split(config.minibatch_size):
                self._optimizer.zero_grad()
                for index in steps:
                    mean = self.step_mean(trajectories.latents[index, rows], index, trajectories.prompt_row[rows])
                    loss, stats = ppo_clip_loss(
                        trajectories.latents[index + 1, rows],
                        mean,
                        self._log_std(index),
                        trajectories.old_log_prob[index, rows],
                        advantages[rows],
                        clip_range=config.clip_range,
                    )
                    (loss / len(steps)).backward()
                    totals += torch.stack([stats.clip_fraction, stats.approx_kl])
                torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
                self._optimizer.step()
        num_losses = config.num_epochs * (config.batch_size // config.minibatch_size) * len(steps)
        return dict(zip(("clip_fraction", "approx_kl"), (totals / num_losses).tolist(), strict=True))

    def _step(self, prediction: torch.Tensor, latents: torch.Tensor, index: int, *, noise: float) -> torch.Tensor:
        return self._scheduler.step(
            prediction,
            self._scheduler.timesteps[index],
            latents,
            eta=self.config.eta,
            variance_noise=torch.full_like(latents, noise),
            return_dict=False,
        )[0]

    def _log_std(self, index: int) -> torch.Tensor:
        return torch.tensor(self.stds[index], device=self._device).log()

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self._pipeline.vae
        return (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)

    def _settings(self) -> str:
        return json.dumps({"seed": self._seed, **asdict(self.config)})
