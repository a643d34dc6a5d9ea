"""What every noise policy has: a Gaussian over its action, sampling through the ops, and save/load.

latents ~ pi(. | prompt) = N(mean(prompt), std(prompt)^2) over the action; N(0, I) exactly at initialisation
"""

import json
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from safetensors import SafetensorError

from noisepolicy.ops import gaussian_kl
from noisepolicy.storage import read_tensors, write_json, write_tensors

Std = Literal["power", "one", "learned"]
"""How a policy's standard deviation follows: see `power_preserving`; always 1; or from the network."""

_CONFIG, _WEIGHTS = "config.json", "policy.safetensors"


class PolicySample(NamedTuple):
    latents: torch.Tensor
    """Ready for the frozen model, float32 `(batch, *latent_shape)`."""
    action: torch.Tensor
    """What the policy chose: coefficients, or the latents themselves; float32 `(batch, *action_shape)`."""
    log_prob: torch.Tensor
    """Of the action, float32 `(batch,)`."""


class NoisePolicy(torch.nn.Module):
    """Base of the policies. A subclass sets `kind`, `action_shape`, `forward` and `sample`.

    Args (as keyword arguments of every subclass; they are the JSON config):
        latent_shape: of one row of the frozen model's latents.
        prompt_shape: `(tokens, width)` of its prompt embeddings.
    """

    kind: ClassVar[str]
    _kinds: ClassVar[dict[str, type["NoisePolicy"]]] = {}

    action_shape: tuple[int, ...]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        NoisePolicy._kinds[cls.kind] = cls

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
        self.latent_shape = tuple(config["latent_shape"])
        self.prompt_shape = tuple(config["prompt_shape"])
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def shrink_to(self, kl_budget: float, prompt_embeds: torch.Tensor) -> None:
        """Scales the policy's distance from the prior down until KL to it, averaged over prompts, is in the budget.

        The first nats buy the most: a policy trained further and scaled back beats one that was held back in training.

        Args:
            kl_budget: nats.
            prompt_embeds: `(prompts, tokens, width)`.
        """
        low, high = 0.0, 1.0
        for _ in range(20):
            if gaussian_kl(*self(prompt_embeds)).mean() <= kl_budget:
                low = self.scale.item()
            else:
                high = self.scale.item()
            if low == 1.0:
                return
            self.scale.fill_((low + high) / 2)
        self.scale.fill_(low)

    def forward(self, prompt_embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`mean (batch, *action_shape)` and a broadcastable `log_std` of the action, from `(batch, tokens, width)`."""
        raise NotImplementedError

    def sample(self, prompt_embeds: torch.Tensor, *, seed: int, offset: int = 0) -> PolicySample:
        """Draws one action a row; noise by counter, see `noisepolicy.ops`. Without gradient."""
        raise NotImplementedError

    def sample_latents(self, pipeline: Any, prompt: str | list[str], generator: torch.Generator | None = None):
        """Latents for `pipeline(prompt, latents=...)`, float32 `(batch, *latent_shape)` on the pipeline's device.

        Raises:
            ValueError: if the pipeline's embeddings are not those the policy was trained on.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        device = pipeline._execution_device
        embeds = pipeline.encode_prompt(prompts, device, 1, False)[0]
        if tuple(embeds.shape[1:]) != self.prompt_shape:
            raise ValueError(
                f"the policy was trained on prompt embeddings of shape {self.prompt_shape}, "
                f"but this pipeline gives {tuple(embeds.shape[1:])}"
            )
        generator_device = generator.device if generator is not None else "cpu"
        seed = int(torch.randint(2**62, (1,), generator=generator, device=generator_device))
        self.to(device)
        return self.sample(embeds, seed=seed).latents

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and `policy.safetensors`, each atomically."""
        folder = Path(folder)
        write_tensors(folder / _WEIGHTS, self.state_dict())
        write_json(folder / _CONFIG, {"kind": self.kind, **self.config})

    @staticmethod
    def from_pretrained(source: str | Path) -> "NoisePolicy":
        """Loads a policy of any kind from a folder or a hub id, in evaluation mode. Executes nothing it reads.

        Raises:
            OSError: if the files are not there.
            ValueError: if they are not a policy's.
        """
        folder = Path(source)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(str(source), allow_patterns=[_CONFIG, _WEIGHTS]))
        try:
            config = json.loads((folder / _CONFIG).read_text("utf-8"))
            policy = make_policy(config.pop("kind"), **config)
            policy.load_state_dict(read_tensors(folder / _WEIGHTS))
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{source} does not hold a noise policy: {error}") from error
        return policy.eval()

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Uploads the saved policy; keyword arguments go to `huggingface_hub.HfApi.create_repo`. Returns the URL."""
        from tempfile import TemporaryDirectory

        from huggingface_hub import HfApi

        api = HfApi()
        url = str(api.create_repo(repo_id, exist_ok=True, **kwargs))
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api.upload_folder(repo_id=repo_id, folder_path=folder)
        return url


def power_preserving(shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`mean` and `log_std` of `(shift + e) / sqrt(1 + shift^2)`, e ~ N(0, 1): every element keeps the prior's power.

    A mean added to noise of std 1 makes it louder than any noise the model was trained on; few steps forgive that,
    many do not. KL to the prior is `sum(log(1 + shift^2)) / 2`.
    """
    log_std = -0.5 * torch.log1p(shift**2)
    return shift * log_std.exp(), log_std


def make_policy(kind: str, **config: Any) -> NoisePolicy:
    """A policy of a registered kind.

    Raises:
        ValueError: if there is no such kind.
    """
    if kind not in NoisePolicy._kinds:
        raise ValueError(f"unknown policy {kind!r}; choose from {sorted(NoisePolicy._kinds)}")
    return NoisePolicy._kinds[kind](**config)
