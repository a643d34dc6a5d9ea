"""What every noise policy has: a Gaussian over its action, sampling through the ops, and save/load.

latents ~ pi(. | prompt) = N(mean(prompt), std(prompt)^2) over the action; N(0, I) exactly at initialisation
"""

import shutil
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch

from noisepolicy.ops import gaussian_kl
from noisepolicy.policies.critic import RewardCritic
from noisepolicy.policies.loading import MAX_CANDIDATES, checked, fill, read_config
from noisepolicy.policies.precision import Float32Module, float32_by_default, without_autocast
from noisepolicy.storage import file_within, read_tensors, write_json, write_tensors

Std = Literal["power", "one", "learned"]
"""How a policy's standard deviation follows: see `power_preserving`; always 1; or from the network."""

_CANDIDATE_STRIDE = 2**48  # of the counter; no run draws as many
_CRITIC_ROWS = 64
_CONFIG, _WEIGHTS = "config.json", "policy.safetensors"
_CARD_FILES = ("README.md", "before_after.png")


class PolicySample(NamedTuple):
    latents: torch.Tensor
    """Ready for the frozen model, float32 `(batch, *latent_shape)`."""
    action: torch.Tensor
    """What the policy chose: coefficients, or the latents themselves; float32 `(batch, *action_shape)`."""
    log_prob: torch.Tensor
    """Of the action, float32 `(batch,)`."""


class NoisePolicy(Float32Module):
    """Base of the policies. A subclass sets `kind`, `action_shape`, `forward` and `sample`.

    A policy computes in float32, also under `torch.autocast`: its latents depend on the seed and the prompt alone.

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
        self.critic: RewardCritic | None = None
        self.num_candidates = 1
        self._source: Path | None = None

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

    def sample(
        self, prompt_embeds: torch.Tensor, *, seed: int, offset: int = 0, latent_shape: tuple[int, ...] | None = None
    ) -> PolicySample:
        """Draws one action a row; noise by counter, see `noisepolicy.ops`. Without gradient.

        Args:
            latent_shape: of latents of another size than those trained on.

        Raises:
            ValueError: if this kind of policy cannot make latents of that shape.
        """
        raise NotImplementedError

    def attach_critic(self, critic: RewardCritic, num_candidates: int) -> None:
        """Makes `choose` draw `num_candidates` noises a row and keep the one that `critic` thinks best."""
        self.critic, self.num_candidates = critic.eval().requires_grad_(False), num_candidates

    @torch.no_grad()
    @without_autocast
    def choose(
        self,
        prompt_embeds: torch.Tensor,
        *,
        seed: int,
        offset: int = 0,
        num_inference_steps: int = 1,
        latent_shape: tuple[int, ...] | None = None,
    ) -> torch.Tensor:
        """Latents to start from, float32 `(batch, *latent_shape)`: a sample, or the best of several by the critic.

        The first candidate is `sample`'s own draw; the others lie far beyond it on the same seed's counter.

        Args:
            num_inference_steps: that the model will take; the critic takes the nearest of those it was trained at.
        """
        if self.critic is None:
            return self.sample(prompt_embeds, seed=seed, offset=offset, latent_shape=latent_shape).latents
        step_index = torch.full(
            (len(prompt_embeds),),
            self.critic.shape.nearest_step_index(num_inference_steps),
            device=prompt_embeds.device,
        )
        latents = best = None
        # The critic reads several candidates at once, where a batch is too small to be worth a call.
        for numbers in torch.arange(self.num_candidates).split(max(1, _CRITIC_ROWS // max(1, len(prompt_embeds)))):
            samples = [
                self.sample(
                    prompt_embeds,
                    seed=seed,
                    offset=(offset + number * _CANDIDATE_STRIDE) % 2**64,
                    latent_shape=latent_shape,
                )
                for number in numbers.tolist()
            ]
            values, _ = self.critic.lower_bound(
                prompt_embeds.float().repeat(len(samples), 1, 1),
                torch.cat([sample.action for sample in samples]),
                step_index.repeat(len(samples)),
            )
            for sample, value in zip(samples, values.chunk(len(samples)), strict=True):
                if best is None:
                    latents, best = sample.latents, value
                    continue
                is_better = (value > best).reshape(-1, *[1] * (sample.latents.ndim - 1))
                latents, best = torch.where(is_better, sample.latents, latents), torch.maximum(best, value)
        return latents

    @without_autocast
    def sample_latents(
        self,
        pipeline: Any,
        prompt: str | list[str],
        *,
        generator: torch.Generator | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        max_sequence_length: int | None = None,
    ) -> torch.Tensor:
        """What a diffusers pipeline takes as `latents=`, for any family in `frozen/families.py`.

        The same under `torch.autocast`, which neither the policy nor the pipeline's text encoder is run in here.

        Args:
            pipeline: whose `__call__` is to be given the same prompt, sizes and step count.
            generator: of the noise.
            num_inference_steps: see `choose`.
            height, width, num_frames, max_sequence_length: the pipeline's own where None.

        Raises:
            ValueError: if the pipeline's latents or embeddings are not of the kind the policy was trained on.
        """
        from noisepolicy.frozen.families import encode_prompts, latent_shape, pack_latents

        shape = latent_shape(pipeline, height, width, num_frames)
        if shape[0] != self.latent_shape[0] or len(shape) != len(self.latent_shape):
            raise ValueError(
                f"the policy was trained on latents of shape {self.latent_shape}, but {type(pipeline).__name__} here "
                f"has {shape}: it must be a model of as many latent channels"
            )
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        with float32_by_default():  # text encoders of transformers 4 fail under another default dtype
            embeds = encode_prompts(pipeline, prompts, max_sequence_length=max_sequence_length).prompt_embeds
        if tuple(embeds.shape[1:]) != self.prompt_shape:
            raise ValueError(
                f"the policy was trained on prompt embeddings of shape {self.prompt_shape}, but this pipeline's text "
                f"encoder gives {tuple(embeds.shape[1:])}"
            )
        generator_device = generator.device if generator is not None else "cpu"
        seed = int(torch.randint(2**62, (1,), generator=generator, device=generator_device))
        with torch.inference_mode(False):  # or the weights could not be trained any more once they have moved
            self.to(embeds.device)
        latents = self.choose(
            embeds.repeat_interleave(num_images_per_prompt, 0),
            seed=seed,
            num_inference_steps=num_inference_steps,
            latent_shape=shape,
        )
        return pack_latents(pipeline, latents)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and `policy.safetensors`, each atomically."""
        folder = Path(folder)
        write_tensors(folder / _WEIGHTS, self.state_dict())
        config: dict[str, Any] = {"kind": self.kind, **self.config}
        if self.critic is not None:
            config |= {"critic": self.critic.config, "num_candidates": self.num_candidates}
        write_json(folder / _CONFIG, config)

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

            folder = Path(snapshot_download(str(source), allow_patterns=[_CONFIG, _WEIGHTS, *_CARD_FILES]))
        try:
            with torch.inference_mode(False):
                policy = _read(folder)
        except (ValueError, TypeError, AttributeError, RuntimeError, LookupError, ArithmeticError) as error:
            raise ValueError(f"{source} does not hold a noise policy: {' '.join(str(error).split())}") from error
        policy._source = folder
        return policy.eval()

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Uploads the policy, with the model card and picture of the folder it was loaded from. Returns the URL.

        Keyword arguments go to `huggingface_hub.HfApi.create_repo`.
        """
        from tempfile import TemporaryDirectory

        from huggingface_hub import HfApi

        api = HfApi()
        url = str(api.create_repo(repo_id, exist_ok=True, **kwargs))
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            for name in _CARD_FILES:
                if self._source is not None and (self._source / name).is_file():
                    shutil.copy(file_within(self._source, name), Path(folder) / name)
            api.upload_folder(repo_id=repo_id, folder_path=folder)
        return url


def power_preserving(shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`mean` and `log_std` of `(shift + e) / sqrt(1 + mean(shift^2))`, e ~ N(0, 1): every row keeps the prior's power.

    A mean added to noise of std 1 makes it louder than any noise the model was trained on; few steps forgive that,
    many do not. KL to the prior is `elements * log(1 + mean(shift^2)) / 2`.

    Args:
        shift: `(batch, ...)`

    Returns:
        mean of the same shape, and log_std with one value a row.
    """
    log_std = -0.5 * torch.log1p((shift**2).mean(tuple(range(1, shift.ndim)), keepdim=True))
    return shift * log_std.exp(), log_std


def _read(folder: Path) -> NoisePolicy:
    """The policy of a folder; nothing larger than its files is made before it is known to be one."""
    config = read_config(folder, _CONFIG)
    kind, critic, num_candidates = config.pop("kind", None), config.pop("critic", None), config.pop("num_candidates", 1)
    if not isinstance(kind, str) or kind not in NoisePolicy._kinds:
        raise ValueError(f"unknown policy {kind!r:.80}; choose from {sorted(NoisePolicy._kinds)}")
    if type(num_candidates) is not int or not 1 <= num_candidates <= MAX_CANDIDATES:
        raise ValueError(f"num_candidates must be from 1 to {MAX_CANDIDATES}, got {num_candidates!r:.80}")
    tensors = read_tensors(file_within(folder, _WEIGHTS))
    with torch.device("meta"):
        policy = make_policy(kind, **checked(NoisePolicy._kinds[kind], config, _CONFIG))
        if critic is not None:
            options = checked(RewardCritic, critic, "critic")
            shape = options["shape"]
            if (shape.prompt_shape, shape.action_shape) != (policy.prompt_shape, policy.action_shape):
                raise ValueError("its critic looks at another shape of prompts or actions than the policy's")
            if options["size"] > len(tensors):
                raise ValueError(f"its critic has {options['size']} readers, its weights {len(tensors)} tensors")
            policy.attach_critic(RewardCritic(**options), num_candidates)
    fill(policy, tensors)
    return policy


def make_policy(kind: str, **config: Any) -> NoisePolicy:
    """A policy of a registered kind.

    Raises:
        ValueError: if there is no such kind.
    """
    if kind not in NoisePolicy._kinds:
        raise ValueError(f"unknown policy {kind!r}; choose from {sorted(NoisePolicy._kinds)}")
    return NoisePolicy._kinds[kind](**config)
