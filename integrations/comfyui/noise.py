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
    ) -> None:
        self.seed = seed
        self._policy, self._rows = policy, self._fit(conditioning[0][0], policy)
        self._options = {"num_inference_steps": num_inference_steps, "num_candidates": num_candidates}

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
        model = _Prompt(self._rows, (self._policy.latent_shape[0], *extent))
        texts = [str(number % len(self._rows)) for number in range(count)]
        latents = self._policy.latents(model, texts, seed=self.seed, index=list(index), **self._options)
        return latents[:, :channels].reshape(samples.shape).to("cpu", samples.dtype)

    @staticmethod
    def _fit(embeds: torch.Tensor, policy: NoisePolicy) -> torch.Tensor:
        """Bring embeddings to the number of tokens that the policy knows: zeros follow a short prompt, as in training.

        A prompt that is longer is cut, which the policy's own text encoder would have done too.
        """
        tokens, width = policy.prompt_shape
        if embeds.shape[2] != width:
            raise ValueError(
                f"the policy was trained on prompt embeddings {width} wide, and this CONDITIONING has "
                f"{embeds.shape[2]}: connect the text encoder of the policy's model"
            )
        rows = torch.nn.functional.pad(embeds[:, :tokens], (0, 0, 0, max(0, tokens - embeds.shape[1])))
        return rows.to(next(policy.parameters()).device)


class _Prompt:
    """What a policy asks of a model: embeddings by name, here the number of their row, and the latents' shape."""

    def __init__(self, rows: torch.Tensor, latent_shape: tuple[int, ...]) -> None:
        self._rows, self.latent_shape = rows, latent_shape

    def encode(self, names: list[str]) -> torch.Tensor:
        return self._rows[[int(name) for name in names]]
