"""A NOISE of ComfyUI from a policy; nothing of ComfyUI is needed here."""

from typing import Any

import torch

from noisepolicy import NoisePolicy


class LearnedNoise:
    """The noise that a policy learned for a prompt: what `SamplerCustomAdvanced` asks for its noise.

    Args:
        policy: The policy.
        conditioning: ComfyUI's CONDITIONING of the prompt, made by the text encoder that the policy was trained with.
        seed: Seed of the noise.
        num_inference_steps: Number of denoising steps that the sampler will take.
        num_candidates: Number of starts that the policy's critic chooses among. Default: as in training.
        variety: How much the pictures of a batch are to differ, from 0 to 1.

    Raises:
        ValueError: if the conditioning is of another text encoder than the policy's.
    """

    def __init__(
        self,
        policy: NoisePolicy,
        conditioning: list[Any],
        seed: int,
        *,
        num_inference_steps: int = 1,
        num_candidates: int | None = None,
        variety: float = 0.0,
    ) -> None:
        self.seed = seed
        embeds = policy.fit_tokens(conditioning[0][0])
        self._policy, self._embeds = policy, embeds.to(next(policy.parameters()).device)
        self._options = {
            "num_inference_steps": num_inference_steps,
            "num_candidates": num_candidates,
            "variety": variety,
        }

    def generate_noise(self, input_latent: dict[str, Any]) -> torch.Tensor:
        """Make noise of the shape of a LATENT, whose `batch_index` names each row's noise of the seed.

        Raises:
            ValueError: if the policy was trained on other latents.
        """
        samples = input_latent["samples"]
        if getattr(samples, "is_nested", False):
            raise ValueError("learned noise is for one latent tensor, and this LATENT holds several (video with sound)")
        count, channels, *extent = samples.shape
        # Some image models see a video of one frame, which a policy knows as an image.
        if len(extent) == 3 and extent[0] == 1 and len(self._policy.latent_shape) == 3:
            del extent[0]
        if channels * self._policy.num_draws != self._policy.latent_shape[0]:
            raise ValueError(
                f"the policy was trained on latents of {self._policy.latent_shape[0] // self._policy.num_draws} "
                f"channels, and these have {channels}: it is of another model"
            )
        index = input_latent.get("batch_index") or range(count)
        embeds = self._embeds[torch.arange(count) % len(self._embeds)]
        shape = (self._policy.latent_shape[0], *extent)
        latents = self._policy.latents(embeds, seed=self.seed, index=list(index), latent_shape=shape, **self._options)
        return latents[:, :channels].reshape(samples.shape).to("cpu", samples.dtype)
