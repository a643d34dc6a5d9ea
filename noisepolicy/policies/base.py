"""The base class of noise policies: a Gaussian over the action, sampling through the ops, saving and loading.

latents ~ pi(. | prompt) = N(mean(prompt), std(prompt)^2) over the action; N(0, I) exactly at initialisation
"""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import nn

from noisepolicy.ops import gaussian_kl, num_counters
from noisepolicy.policies.critic import RewardCritic
from noisepolicy.policies.loading import MAX_CANDIDATES, checked, fill, read_config
from noisepolicy.policies.networks import Float32Module, float32_by_default, without_autocast
from noisepolicy.prior import as_indices, first_counter
from noisepolicy.storage import file_within, read_tensors, write_json, write_tensors

Std = Literal["power", "one", "learned"]
"""Kind of a policy's standard deviation: as in `power_preserving`, always 1, or an output of the network."""

_OWN_COUNTERS = 2**47  # a row's own draw is made of counters below; no run draws as many
_FIRST_CANDIDATE = 2**63  # counter; a row's further candidates follow one another, MAX_CANDIDATES times its own later
_SET_SIZE = 16  # pictures of a prompt that are chosen to differ: making one alone means choosing up to 15 before it
_CRITIC_ROWS = 64
_DRAWN_AT_ONCE = 2**24  # numbers
_CONFIG, _WEIGHTS = "config.json", "policy.safetensors"
_CARD_FILES = ("README.md", "before_after.png")


class PolicySample(NamedTuple):
    """Latents drawn from a policy, with the action they were made of and its log-density."""

    latents: torch.Tensor
    """Latents for the frozen model, float32 `(batch, *latent_shape)`."""
    action: torch.Tensor
    """The policy's choice: coefficients, or the latents themselves; float32 `(batch, *action_shape)`."""
    log_prob: torch.Tensor
    """Log-density of the action, float32 `(batch,)`."""


class NoisePolicy(Float32Module):
    """Base class of the policies.

    A subclass sets `kind`, `action_shape`, `forward` and `draw`, and `output_layers` if it is a network.

    A policy computes in float32, also under `torch.autocast`: its latents depend on the seed and the prompt alone.

    Args (keyword arguments of every subclass; they make up `config.json`):
        latent_shape: Shape of one row of the frozen model's latents.
        prompt_shape: `(tokens, width)` of the frozen model's prompt embeddings.
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
        self.num_draws = 1
        """Number of draws that latents hold, as many channels each: the initial one, and a sampler's if learned."""
        self._source: Path | None = None

    @torch.no_grad()
    def shrink_to(self, kl_budget: float, prompt_embeds: torch.Tensor) -> None:
        """Scale the policy towards the prior until its KL to the prior, averaged over prompts, is within the budget.

        The first nats buy the most: a policy trained further and scaled back beats one that was held back in training.

        Args:
            kl_budget: Largest KL, in nats.
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

    @torch.no_grad()
    def contract_to(self, kl_budget: float, prompt_embeds: torch.Tensor) -> None:
        """Do what `shrink_to` does by the weights of the output layers, so that training can go on from there."""
        self.shrink_to(kl_budget, prompt_embeds)
        for layer in self.output_layers():
            layer.weight.mul_(self.scale)
            layer.bias.mul_(self.scale)
        self.scale.fill_(1.0)

    def output_layers(self) -> list[nn.Module]:
        """Return the layers whose outputs are what `scale` multiplies."""
        raise NotImplementedError

    def forward(self, prompt_embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map `(batch, tokens, width)` to the action's `mean (batch, *action_shape)` and a broadcastable `log_std`."""
        raise NotImplementedError

    @torch.no_grad()
    @without_autocast
    def sample(
        self, prompt_embeds: torch.Tensor, *, seed: int, offset: int = 0, latent_shape: tuple[int, ...] | None = None
    ) -> PolicySample:
        """Draw one action for each row, without gradient. The noise is addressed by counter, see `noisepolicy.ops`.

        Args:
            prompt_embeds: `(batch, tokens, width)`.
            seed, offset: Key and first counter of the noise.
            latent_shape: Shape of one row, where it is not the shape that the policy was trained on.

        Raises:
            ValueError: if this kind of policy cannot make latents of that shape.
        """
        return self.draw(*self(prompt_embeds), seed=seed, offset=offset, latent_shape=latent_shape or self.latent_shape)

    def draw(
        self, mean: torch.Tensor, log_std: torch.Tensor, *, seed: int, offset: int, latent_shape: tuple[int, ...]
    ) -> PolicySample:
        """Draw as `sample` does, from the mean and log-std that `forward` has returned."""
        raise NotImplementedError

    def attach_critic(self, critic: RewardCritic, num_candidates: int) -> None:
        """Make `choose` draw `num_candidates` starts for each row and keep the one that `critic` thinks best."""
        self.critic, self.num_candidates = critic.eval().requires_grad_(False), num_candidates
        self.critic.sketch.in_bfloat16 = False  # or the choice would depend on the machine more often than it must

    @torch.no_grad()
    @without_autocast
    def choose(
        self,
        prompt_embeds: torch.Tensor,
        *,
        seed: int,
        offset: int = 0,
        num_inference_steps: int = 1,
        num_candidates: int | None = None,
        latent_shape: tuple[int, ...] | None = None,
        variety: float = 0.0,
    ) -> torch.Tensor:
        """Return latents to start from, float32 `(batch, *latent_shape)`: a sample, or the critic's choice of several.

        The first candidate is `sample`'s own draw; the others lie far beyond it on the same seed's counter. Each row is
        chosen on its own, so it does not depend on the batch. With `variety`, all rows must be of one prompt, and each
        depends on those before it in its sixteen.

        Args:
            num_inference_steps: Number of denoising steps that the model will take. The critic uses the nearest number
                that it was trained at.
            num_candidates: Number of starts to choose among. Default: the policy's own.
            variety: Weight of a candidate's distance from the rows before it, see `latents`.

        Raises:
            ValueError: if `variety` is out of range, or there is nothing to choose among.
        """
        latent_shape = latent_shape or self.latent_shape
        if not 0 <= variety <= 1:
            raise ValueError(f"variety must be from 0 to 1, got {variety}")
        if self.critic is None or (num_candidates or self.num_candidates) == 1:
            if variety:
                raise ValueError("variety needs a critic that chooses among two or more candidates")
            return self.sample(prompt_embeds, seed=seed, offset=offset, latent_shape=latent_shape).latents
        steps = self.critic.shape.nearest_step_index(num_inference_steps)
        rows, sketches = [], []
        for number, embeds in enumerate(prompt_embeds.split(1)):
            place: dict[str, Any] = {
                "step_index": torch.full((1,), steps, device=embeds.device),
                "num_candidates": num_candidates or self.num_candidates,
                "seed": seed,
                "offset": offset + number * num_counters(latent_shape),
                "latent_shape": latent_shape,
            }
            if number % _SET_SIZE == 0:
                sketches = []
            if sketches:
                chosen = self._choose_apart(embeds, torch.cat(sketches), variety, **place)
            else:
                chosen = self._choose_one(embeds, **place)
            rows.append(chosen.latents)
            if variety:
                sketches.append(self.critic.sketch(embeds, chosen.action, place["step_index"]))
        return torch.cat(rows) if rows else prompt_embeds.new_empty(0, *latent_shape, dtype=torch.float32)

    def _choose_one(
        self,
        prompt_embeds: torch.Tensor,
        *,
        step_index: torch.Tensor,
        num_candidates: int,
        seed: int,
        offset: int,
        latent_shape: tuple[int, ...],
    ) -> PolicySample:
        """Choose among the candidates of one row. Many are drawn and read at once; the best goes on to the next lot."""
        mean, log_std = self(prompt_embeds)
        best = self.draw(mean, log_std, seed=seed, offset=offset, latent_shape=latent_shape)
        for numbers in torch.arange(1, num_candidates).split(_rows_at_once(latent_shape)):
            further = self._draw_further(
                mean, log_std, int(numbers[0]), len(numbers), seed=seed, offset=offset, latent_shape=latent_shape
            )
            drawn = PolicySample(*map(torch.cat, zip(best, further, strict=True)))
            values, _ = self.critic.lower_bound(prompt_embeds, drawn.action, step_index)
            index = values.argmax(0, keepdim=True)
            best = PolicySample(*(tensor.index_select(0, index) for tensor in drawn))
        return best

    def _choose_apart(
        self,
        prompt_embeds: torch.Tensor,
        others: torch.Tensor,
        variety: float,
        *,
        step_index: torch.Tensor,
        num_candidates: int,
        **place: Any,
    ) -> PolicySample:
        """Choose among one row's candidates by predicted reward and by distance from the sketches `others`.

        A distance is the root-mean-square difference of two sketches, averaged over the others. Distances and rewards
        are each in units of their spread between the candidates, so that `variety` means the same for every reward and
        every model. As the spreads are known only at the end, the chosen candidate is drawn a second time.
        """
        mean, log_std = self(prompt_embeds)
        values, distances = [], []
        # The row's own draw, number 0, is left out: it lies elsewhere and is worth no more than any other.
        last = min(num_candidates, MAX_CANDIDATES - 1)  # there are counters for no more
        for numbers in torch.arange(1, last + 1).split(_rows_at_once(place["latent_shape"])):
            drawn = self._draw_further(mean, log_std, int(numbers[0]), len(numbers), **place)
            value, sketch = self.critic.lower_bound(prompt_embeds, drawn.action, step_index)
            values.append(value)
            distances.append(torch.cdist(sketch.flatten(1), others.flatten(1)).mean(1))
        score = (1 - variety) * _standardised(torch.cat(values)) + variety * _standardised(torch.cat(distances))
        return self._draw_further(mean, log_std, 1 + int(score.argmax()), 1, **place)

    def _draw_further(
        self,
        mean: torch.Tensor,
        log_std: torch.Tensor,
        number: int,
        count: int,
        *,
        seed: int,
        offset: int,
        latent_shape: tuple[int, ...],
    ) -> PolicySample:
        """Draw `count` candidates of one row from candidate `number` on, at least 1; the row's own draw is number 0."""
        return self.draw(
            mean.expand(count, *mean.shape[1:]),
            log_std.expand(count, *log_std.shape[1:]) if log_std.ndim else log_std,
            seed=seed,
            offset=_FIRST_CANDIDATE + offset % _OWN_COUNTERS * MAX_CANDIDATES + number * num_counters(latent_shape),
            latent_shape=latent_shape,
        )

    @torch.no_grad()
    @without_autocast
    def candidates(
        self,
        prompt_embeds: torch.Tensor,
        count: int,
        *,
        seed: int,
        num_inference_steps: int = 1,
        latent_shape: tuple[int, ...] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the first starts that `choose` chooses among for one prompt, and the rewards that the critic foresees.

        Args:
            prompt_embeds: `(1, tokens, width)`.
            count: Number of starts.

        Returns:
            Latents, float32 `(count, *latent_shape)`, and lower bounds of their rewards in the reward's own units,
            `(count,)`; None if the policy has no critic.
        """
        mean, log_std = self(prompt_embeds)
        shape = latent_shape or self.latent_shape
        first = self.draw(mean, log_std, seed=seed, offset=0, latent_shape=shape)
        further = self._draw_further(mean, log_std, 1, count - 1, seed=seed, offset=0, latent_shape=shape)
        drawn = PolicySample(*map(torch.cat, zip(first, further, strict=True)))
        if self.critic is None:
            return drawn.latents, None
        step_index = torch.tensor(
            [self.critic.shape.nearest_step_index(num_inference_steps)], device=prompt_embeds.device
        )
        values, _ = self.critic.lower_bound(prompt_embeds, drawn.action, step_index)
        return drawn.latents, self.critic.in_reward_units(values)

    def latents(
        self,
        pipeline_or_embeds: Any,
        prompts: str | Sequence[str] | None = None,
        *,
        seed: int,
        index: int | Sequence[int] | None = None,
        num_inference_steps: int = 1,
        num_candidates: int | None = None,
        variety: float = 0.0,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        max_sequence_length: int | None = None,
        latent_shape: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Draw latents for the pipeline's `latents=`, from the noise of `(seed, index)`: see `noisepolicy.noise`.

        A policy that learned the noise that a sampler draws between steps (`--sampler-noise learned`) hands a plain
        pipeline the initial part only: its `latents=` takes no more, and its sampler draws the rest by the generator
        it is given. A `FrozenModel` gets all of it.

        A row depends on its seed, index, prompt and these settings alone, so picture k of a batch can be made again on
        its own. It is the same to the bit on one machine and to rounding on another device, where the critic may,
        rarely, choose another of two starts that it thinks equally good. `torch.autocast` has no effect here.

        Args:
            pipeline_or_embeds: A diffusers pipeline, a `FrozenModel`, or, without
                `prompts`, prompt embeddings: a `PromptEmbeds` or a tensor `(batch, tokens, width)`.
            prompts: One text or several.
            seed: Seed of the noise, in [0, 2**64).
            index: Index of each prompt's noise: an int for one prompt, else one for each. Default: 0, 1, 2, ..., which
                with `variety` is counted for each prompt on its own.
            num_inference_steps: Number of denoising steps that the model will take; see `choose`.
            num_candidates: Number of starts that the critic chooses among: more follow the prompt better and differ
                less. 1 takes every draw as it comes. Default: as in training.
            variety: How much the pictures of a prompt are to differ: from 0, where the critic looks at the reward it
                foresees, to 1, where it looks at how far the foreseen picture is from those before it in its set:
                indices 0 to 15 are one set, 16 to 31 the next. To make picture 5 alone, the starts of pictures 0 to 4
                are chosen too, so that picture 5 can differ from them; pictures 0 to 4 are not made.
            height, width, num_frames, max_sequence_length: As given to the pipeline. Default: the pipeline's own.
            latent_shape: Shape of a row of latents, where embeddings are given. Default: that of training.

        Returns:
            `(batch, *latent_shape)`; as a pipeline takes them, or float32.

        Raises:
            ValueError: if an argument is out of range, or the model's latents or embeddings are not of the kind the
                policy was trained on.
        """
        latents, _ = self.latents_and_indices(
            pipeline_or_embeds,
            prompts,
            seed=seed,
            index=index,
            num_inference_steps=num_inference_steps,
            num_candidates=num_candidates,
            variety=variety,
            height=height,
            width=width,
            num_frames=num_frames,
            max_sequence_length=max_sequence_length,
            latent_shape=latent_shape,
        )
        return latents

    @without_autocast
    def latents_and_indices(
        self,
        pipeline_or_embeds: Any,
        prompts: str | Sequence[str] | None = None,
        *,
        seed: int,
        index: int | Sequence[int] | None = None,
        num_inference_steps: int = 1,
        num_candidates: int | None = None,
        variety: float = 0.0,
        **sizes: Any,
    ) -> tuple[torch.Tensor, list[int]]:
        """Do what `latents` does, and return the index of each row too: what a sampler draws is to follow it."""
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be 1 or more, got {num_inference_steps}")
        if num_candidates is not None and not 1 <= num_candidates <= MAX_CANDIDATES:
            raise ValueError(f"num_candidates must be from 1 to {MAX_CANDIDATES}, got {num_candidates}")
        if num_candidates is not None and num_candidates > 1 and self.critic is None:
            raise ValueError(f"this policy has no critic to choose among {num_candidates} candidates")
        rows, shape, pack = self._encode(pipeline_or_embeds, prompts, **sizes)
        size = _SET_SIZE if variety else 1
        prompt_numbers = _number_prompts(rows) if variety else list(range(len(rows)))
        if index is not None:
            indices = as_indices(index)
        elif variety:
            indices = [prompt_numbers[:row].count(number) for row, number in enumerate(prompt_numbers)]
        else:
            indices = list(range(len(rows)))
        if len(indices) != len(rows):
            raise ValueError(f"index must have one number for each of the {len(rows)} prompts, got {len(indices)}")
        offsets = [first_counter(number, shape, _OWN_COUNTERS) for number in indices]
        with torch.inference_mode(False):  # or the weights could not be trained any more once they have moved
            self.to(rows[0].device)
        # One row at a time: in a batch the networks round differently. With variety, those before it are chosen too:
        # the largest index of a set comes first, so that each set is chosen once.
        sets: dict[tuple[int, int], torch.Tensor] = {}
        keys = [(prompt, number // size) for prompt, number in zip(prompt_numbers, indices, strict=True)]
        for row in sorted(range(len(rows)), key=indices.__getitem__, reverse=True):
            before = indices[row] % size
            if keys[row] not in sets:
                sets[keys[row]] = self.choose(
                    rows[row].expand(before + 1, -1, -1),
                    seed=seed,
                    offset=offsets[row] - before * num_counters(shape),
                    num_inference_steps=num_inference_steps,
                    num_candidates=num_candidates,
                    latent_shape=shape,
                    variety=variety,
                )
        latents = torch.stack([sets[key][number % size] for key, number in zip(keys, indices, strict=True)])
        return pack(latents), indices

    def _encode(
        self,
        model: Any,
        prompts: str | Sequence[str] | None,
        *,
        latent_shape: Sequence[int] | None = None,
        max_sequence_length: int | None = None,
        **sizes: int | None,
    ) -> tuple[list[torch.Tensor], tuple[int, ...], Callable[[torch.Tensor], torch.Tensor]]:
        """Return the prompts' embeddings, each `(1, tokens, width)`, the shape of latents, and what packs latents."""
        texts = [prompts] if isinstance(prompts, str) else None if prompts is None else list(map(str, prompts))
        is_pipeline = texts is not None and not (hasattr(model, "encode") and hasattr(model, "latent_shape"))
        for name, value in {**sizes, "max_sequence_length": max_sequence_length}.items():
            if value is not None and not is_pipeline:
                raise ValueError(f"{name} can be given with a diffusers pipeline only, got {type(model).__name__}")
        if latent_shape is not None and texts is not None:
            raise ValueError("latent_shape can be given with embeddings only; a model has its own")
        if texts is not None and not texts:
            raise ValueError("prompts must hold at least one prompt")
        pack: Callable[[torch.Tensor], torch.Tensor] = lambda latents: latents  # noqa: E731
        if texts is None:
            embeds = getattr(model, "prompt_embeds", model)
            if not isinstance(embeds, torch.Tensor):
                raise ValueError(f"prompts are missing; only embeddings go without, got {type(model).__name__}")
            rows, shape = list(embeds.split(1)), tuple(latent_shape or self.latent_shape)
            if not rows:
                raise ValueError("prompts must hold at least one prompt")
        else:
            # Each prompt on its own, as in `latents`: a text encoder rounds differently in a batch. A repeated
            # prompt is encoded once.
            with float32_by_default():  # text encoders of transformers 4 fail under another default dtype
                if is_pipeline:
                    from noisepolicy.frozen.calling import PipelinePrompts

                    encoded = PipelinePrompts(model, max_sequence_length=max_sequence_length, **sizes)
                    rows = encoded.embeds(texts, self.prompt_shape[0])
                    channels, *extent = encoded.latent_shape
                    shape = (channels * self.num_draws, *extent)
                    pack = lambda latents: encoded.pack(texts, latents[:, :channels])  # noqa: E731
                else:
                    embeds = {text: model.encode([text]) for text in dict.fromkeys(texts)}
                    rows = [getattr(embeds[text], "prompt_embeds", embeds[text]) for text in texts]  # or plain tensors
                    shape = tuple(model.latent_shape)
        if shape[0] != self.latent_shape[0] or len(shape) != len(self.latent_shape):
            given = f"{type(model).__name__} here has {shape}" if texts is not None else f"latent_shape is {shape}"
            raise ValueError(
                f"the policy was trained on latents of shape {self.latent_shape}, but {given}: it must be a model of "
                "as many latent channels"
            )
        if tuple(rows[0].shape[1:]) != self.prompt_shape:
            raise ValueError(
                f"the policy was trained on prompt embeddings of shape {self.prompt_shape}, but "
                f"{'these have' if texts is None else 'this model gives'} {tuple(rows[0].shape[1:])}"
            )
        return rows, shape, pack

    def fit_tokens(self, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """Bring embeddings `(batch, tokens, width)` of another program to the tokens that the policy knows.

        Zeros follow those of a short prompt, as in training; a long one is cut, as the text encoder would have done.

        Raises:
            ValueError: if they are of another width, and so of another text encoder.
        """
        tokens, width = self.prompt_shape
        if prompt_embeds.shape[2] != width:
            raise ValueError(
                f"the policy was trained on prompt embeddings {width} wide, and these are {prompt_embeds.shape[2]}: "
                "they must come from the text encoder of the policy's model"
            )
        missing = max(0, tokens - prompt_embeds.shape[1])
        return nn.functional.pad(prompt_embeds[:, :tokens], (0, 0, 0, missing))

    def sample_latents(
        self,
        pipeline: Any,
        prompt: str | Sequence[str],
        *,
        generator: torch.Generator | None = None,
        num_images_per_prompt: int = 1,
        **options: Any,
    ) -> torch.Tensor:
        """Do what `latents` does, with a seed drawn from `generator`, as diffusers pipelines draw their noise.

        Args:
            pipeline, prompt: A model and one prompt or several, as in `latents`.
            generator: Generator of the seed. Default: torch's own.
            num_images_per_prompt: Number of rows for each prompt, next to each other.
            options: `num_inference_steps`, `num_candidates` and sizes, as in `latents`.

        Raises:
            ValueError: as `latents`.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        device = generator.device if generator is not None else "cpu"
        seed = int(torch.randint(2**62, (1,), generator=generator, device=device))
        return self.latents(
            pipeline, [text for text in prompts for _ in range(num_images_per_prompt)], seed=seed, **options
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `policy.safetensors` to a folder, each atomically."""
        folder = Path(folder)
        write_tensors(folder / _WEIGHTS, self.state_dict())
        config: dict[str, Any] = {"kind": self.kind, **self.config}
        if self.critic is not None:
            config |= {"critic": self.critic.config, "num_candidates": self.num_candidates}
        if self.num_draws > 1:
            config["num_draws"] = self.num_draws
        write_json(folder / _CONFIG, config)

    @staticmethod
    def from_pretrained(source: str | Path) -> "NoisePolicy":
        """Load a policy of any kind from a folder or a hub id, in evaluation mode. Nothing that is read is executed.

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
        """Upload the policy with the model card and the picture of the folder it was loaded from. Returns the URL.

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


def _rows_at_once(latent_shape: tuple[int, ...]) -> int:
    """Return how many candidates are drawn and read at once."""
    return max(1, min(_CRITIC_ROWS, _DRAWN_AT_ONCE // math.prod(latent_shape)))


def _standardised(values: torch.Tensor) -> torch.Tensor:
    return (values - values.mean()) / values.std().clamp(min=1e-12)


def _number_prompts(rows: Sequence[torch.Tensor]) -> list[int]:
    """Number the prompts of rows in the order in which they come; equal embeddings are one prompt."""
    numbers: dict[bytes, int] = {}
    bits = (row.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes() for row in rows)
    return [numbers.setdefault(each, len(numbers)) for each in bits]


def _read(folder: Path) -> NoisePolicy:
    """Read a folder's policy. Until the files are known to fit, no more memory is used than they have bytes."""
    config = read_config(folder, _CONFIG)
    kind, critic, num_candidates = config.pop("kind", None), config.pop("critic", None), config.pop("num_candidates", 1)
    num_draws = config.pop("num_draws", 1)
    if not isinstance(kind, str) or kind not in NoisePolicy._kinds:
        raise ValueError(f"unknown policy {kind!r:.80}; choose from {sorted(NoisePolicy._kinds)}")
    if type(num_candidates) is not int or not 1 <= num_candidates <= MAX_CANDIDATES:
        raise ValueError(f"num_candidates must be from 1 to {MAX_CANDIDATES}, got {num_candidates!r:.80}")
    tensors = read_tensors(file_within(folder, _WEIGHTS))
    with torch.device("meta"):
        policy = make_policy(kind, **checked(NoisePolicy._kinds[kind], config, _CONFIG))
        if type(num_draws) is not int or num_draws < 1 or policy.latent_shape[0] % num_draws:
            raise ValueError(f"num_draws must divide {policy.latent_shape[0]} channels, got {num_draws!r:.80}")
        policy.num_draws = num_draws
        if critic is not None:
            options = checked(RewardCritic, critic, "critic")
            shape = options["shape"]
            if (shape.prompt_shape, shape.action_shape) != (policy.prompt_shape, policy.action_shape):
                raise ValueError("its critic looks at another shape of prompts or actions than the policy's")
            most = max((tensor.numel() for tensor in tensors.values()), default=0)
            if options["size"] > most:
                raise ValueError(f"its critic has {options['size']} readers, its largest tensor {most} numbers")
            policy.attach_critic(RewardCritic(**options), num_candidates)
    fill(policy, tensors)
    return policy


def make_policy(kind: str, **config: Any) -> NoisePolicy:
    """Make a policy of a registered kind.

    Raises:
        ValueError: if there is no such kind.
    """
    if kind not in NoisePolicy._kinds:
        raise ValueError(f"unknown policy {kind!r}; choose from {sorted(NoisePolicy._kinds)}")
    return NoisePolicy._kinds[kind](**config)
