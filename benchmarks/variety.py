"""`noisepolicy-bench variety`: reward against variety, for what makes the pictures of one prompt differ.

The policy of the embedded model chooses the pictures of a caption to differ, by the critic's foresight. Beside it stand
the ways that need no training, each on the base model: louder low frequencies, noise on the prompt's embeddings, and
group inference, which makes several pictures for each that it keeps and chooses by the finished pictures and the true
reward. All pictures are of held-out captions, from the same seed.
"""

import dataclasses
import hashlib
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from noisepolicy.evaluation.figures import PLOT_STYLE, png, to_pil
from noisepolicy.evaluation.statistics import bootstrap_mean_ci95, mean_pairwise_distance
from noisepolicy.frozen.base import row_seeds
from noisepolicy.ops import dct_basis, num_counters
from noisepolicy.policies.critic import RewardCritic
from noisepolicy.prior import noise
from noisepolicy.rewards import load_reward
from noisepolicy.storage import write_bytes
from noisepolicy.training.run import Run
from noisepolicy.training.run_folder import RunFolder
from noisepolicy.worlds.shapes import held_out_scenes, parse_caption
from noisepolicy.worlds.shapes.regions import largest_regions

NUM_IMAGES = 8
"""Pictures of a caption."""
_SEED = 0
_VARIETIES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
_SHOWN_VARIETY = 0.2
_LOUDER = (1.25, 1.5, 2.0)
_LOW = 2  # frequencies of an axis that are louder
_PERTURBATIONS = (0.5, 1.0, 2.0)
_MADE = (2, 4)  # pictures that group inference makes for each that it keeps
_SPREAD_WEIGHTS = (0.2, 0.5, 1.0)
_COLORS = {"policy": "#2563eb", "louder": "#d97706", "prompt": "#16a34a", "group": "#9333ea", "base": "#6b7280"}
_MIN_AREA = 30  # pixels of an object whose place is counted


def run(folders: Sequence[Path], num_prompts: int, output: Path | None = None) -> dict[str, Any]:
    """Print a table and return its rows.

    Args:
        folders: Run folders of the embedded image model.
        num_prompts: Held-out captions, with eight pictures each.
        output: Folder for `variety.png`, a figure of the rows, and `variety_pictures.png`, one caption's pictures.

    Raises:
        ValueError: if a folder is no run of the embedded image model, or `num_prompts` is not positive.
    """
    if num_prompts < 1:
        raise ValueError("--num-prompts must be positive")
    opened = [RunFolder.open(folder) for folder in folders]
    for folder, (_, config) in zip(folders, opened, strict=True):
        if config.model.name != "shapes":
            raise ValueError(f"{folder} is a run of {config.model.name}, not of shapes")
    runs = [Run.open(folder, config) for folder, config in opened]
    world = _World(runs[0], [scene.caption for scene in held_out_scenes()[:num_prompts]])

    print("starts                                         made  reward  strict  variety  nearest  places")
    rows = [world.measure("base", "plain noise", 1, [world.made(world.prior())])]
    for gain in _LOUDER:
        rows.append(world.measure("louder", f"low frequencies x {gain}", 1, [world.made(world.louder(gain))]))
    for strength in _PERTURBATIONS:
        pictures = world.made(world.prior(), strength)
        rows.append(world.measure("prompt", f"noise on the prompt x {strength}", 1, [pictures]))
    for count in _MADE:
        pool = world.made(world.prior(count * NUM_IMAGES))
        for weight in _SPREAD_WEIGHTS:
            name = f"group inference of {count}, spread x {weight}"
            rows.append(world.measure("group", name, count, [world.grouped(pool, weight)]))
    shown = {"base model": world.made(world.prior())[0]}
    starts = {variety: [] for variety in _VARIETIES}
    for each in runs:
        forget = _remember(each.policy.critic)
        for variety in _VARIETIES:
            starts[variety].append(world.chosen(each, variety))
        forget()
    for variety, chosen in starts.items():
        pictures = [world.made(latents) for latents in chosen]
        rows.append(world.measure("policy", f"policy, variety {variety}", 1, pictures))
        if variety in (0.0, _SHOWN_VARIETY):
            shown[f"policy, variety {variety}"] = pictures[0][0]
    samples = [world.made(world.chosen(each, 0.0, num_candidates=1)) for each in runs]
    rows.append(world.measure("samples", "policy, 1 candidate", 1, samples))
    if output is not None:
        write_bytes(output / "variety.png", frontier(rows))
        write_bytes(output / "variety_pictures.png", picture_sheet(shown))
    return {
        "num_inference_steps": world.steps,
        "num_prompts": num_prompts,
        "images_per_prompt": NUM_IMAGES,
        "num_policies": len(runs),
        "shown_prompt": world.prompts[0],
        "variety": rows,
    }


def _remember(critic: RewardCritic) -> Callable[[], None]:
    """Let a critic remember what it has read: most candidates are the same at every variety. Returns how to end it."""
    read, known = critic.lower_bound, {}

    def lower_bound(*arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key = hashlib.sha256(b"".join(each.cpu().numpy().tobytes() for each in arguments)).digest()
        if key not in known:
            known[key] = read(*arguments)
        return known[key]

    critic.lower_bound = lower_bound
    return lambda: delattr(critic, "lower_bound")


class _World:
    """The embedded model, its captions, and what is measured on sets of pictures, `(prompts, images, 3, h, w)`."""

    def __init__(self, run: Run, prompts: list[str]) -> None:
        self.prompts = prompts
        self.steps = run.config.num_inference_steps[0]
        self._guidance = run.config.guidance_scale
        self._frozen = run.model
        self._embeds = self._frozen.encode(prompts)
        self._reward = load_reward("shapes", device="cpu")
        self._base: dict[str, torch.Tensor] = {}

    def prior(self, count: int = NUM_IMAGES) -> torch.Tensor:
        """Return plain noise, `(prompts, count, *latent_shape)`; more of it begins with the same."""
        first = range(0, len(self.prompts) * 2**16, 2**16)
        rows = [noise(seed=_SEED, index=range(at, at + count), shape=self._frozen.latent_shape) for at in first]
        return torch.stack(rows)

    def louder(self, gain: float) -> torch.Tensor:
        """Return the same noise with its lowest frequencies `gain` times as loud."""
        latents = self.prior()
        rows, columns = (dct_basis(_LOW, size, latents.device) for size in latents.shape[-2:])
        return latents + (gain - 1) * (rows.T @ (rows @ latents @ columns.T) @ columns)

    def chosen(self, run: Run, variety: float, num_candidates: int | None = None) -> torch.Tensor:
        """Return a policy's starts."""
        sets = [
            run.policy.choose(
                embeds.expand(NUM_IMAGES, -1, -1),
                seed=_SEED,
                offset=(number * 2**16) * num_counters(self._frozen.latent_shape),
                num_inference_steps=self.steps,
                num_candidates=num_candidates,
                variety=variety,
            )
            for number, embeds in enumerate(self._embeds.prompt_embeds.split(1))
        ]
        return torch.stack(sets)

    @torch.no_grad()
    def made(self, latents: torch.Tensor, perturbation: float = 0.0) -> torch.Tensor:
        """Make the pictures, with noise on the prompt's embeddings, in units of their own spread, if asked."""
        pictures = []
        for number, starts in enumerate(latents):
            embeds = self._embeds[torch.full((len(starts),), number)]
            if perturbation:
                plain = embeds.prompt_embeds
                jitter = noise(seed=_SEED + 1, index=range(len(starts)), shape=plain.shape[1:])
                embeds = dataclasses.replace(embeds, prompt_embeds=plain + perturbation * plain.std() * jitter)
            options = {"num_inference_steps": self.steps, "guidance_scale": self._guidance}
            seeds = row_seeds(_SEED, range(len(starts)))
            pictures.append(self._frozen.generate(starts, embeds, seeds=seeds, **options))
        return torch.stack(pictures)

    def grouped(self, pictures: torch.Tensor, weight: float) -> torch.Tensor:
        """Keep eight pictures of each caption: one after another, by true reward and distance from those kept."""
        kept = []
        for pool, prompt in zip(pictures, self.prompts, strict=True):
            rewards = _standardised(self._reward(pool, [prompt] * len(pool)))
            distances, taken = _distances(pool), []
            for _ in range(NUM_IMAGES):
                score = (1 - weight) * rewards
                if taken:
                    score = score + weight * _standardised(distances[:, taken].mean(1))
                score[taken] = -math.inf
                taken.append(int(score.argmax()))
            kept.append(pool[taken])
        return torch.stack(kept)

    def measure(self, kind: str, name: str, made: int, policies: list[torch.Tensor]) -> dict[str, Any]:
        """Measure the pictures of some policies and print a line; the first that is measured is the base model."""
        metrics = [self._metrics(pictures) for pictures in policies]
        self._base = self._base or metrics[0]
        means = [{key: values.mean().item() for key, values in each.items()} for each in metrics]
        base = {key: values.mean().item() for key, values in self._base.items()}
        row: dict[str, Any] = {"kind": kind, "name": name, "images_made_per_image": made}
        row |= {key: [each[key] for each in means] for key in ("reward", "strict")}
        row |= {key: [each[key] / base[key] for each in means] for key in ("variety", "nearest", "places")}
        gain = torch.stack([each["reward"] - self._base["reward"] for each in metrics]).mean(0)
        row["gain_ci95"] = list(bootstrap_mean_ci95(gain))
        mean = {key: sum(row[key]) / len(metrics) for key in means[0]}
        print(
            f"{name:45s} {made:5d}  {mean['reward']:.3f}   {mean['strict']:.3f}   {mean['variety']:6.1%}   "
            f"{mean['nearest']:6.1%}  {mean['places']:6.1%}",
            flush=True,
        )
        return row

    def _metrics(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        """Reward and strictness of each picture, `(prompts, images)`, and measures of variety, one a caption."""
        scores = [
            self._reward.metrics(images, [prompt] * len(images))
            for images, prompt in zip(pictures, self.prompts, strict=True)
        ]
        nearest = [_distances(images).fill_diagonal_(math.inf).amin(1) for images in pictures]
        return {
            **{name: torch.stack([score[name] for score in scores]) for name in ("reward", "strict")},
            "variety": torch.tensor([mean_pairwise_distance(images[None]) for images in pictures]),
            "nearest": torch.stack(nearest).mean(1),
            "places": torch.tensor(
                [_spread_of_places(images, prompt) for images, prompt in zip(pictures, self.prompts, strict=True)]
            ),
        }


def _distances(images: torch.Tensor) -> torch.Tensor:
    """Return the root-mean-square differences of pictures, `(images, images)`."""
    flat = images.flatten(1)
    return torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(flat.shape[1])


def _standardised(values: torch.Tensor) -> torch.Tensor:
    return (values - values.mean()) / values.std().clamp(min=1e-12)


def _spread_of_places(images: torch.Tensor, prompt: str) -> float:
    """Return the standard deviation, in pixels, of the objects' places along the axis that the caption leaves free.

    No way of choosing looks at this, and the reward does not depend on it.
    """
    regions, scene = largest_regions(images), parse_caption(prompt)
    centers = regions.center_y if scene.direction == 0 else regions.center_x
    spreads = []
    for color in scene.colors:
        is_there = regions.area[:, color] > _MIN_AREA
        if is_there.sum() > 1:
            spreads.append(float(centers[is_there, color].std(ddof=1)))
    return sum(spreads) / max(len(spreads), 1)


def frontier(rows: Sequence[dict[str, Any]]) -> bytes:
    """Draw reward against variety, by kind."""
    titles = {
        "base": "plain noise",
        "louder": "louder low frequencies",
        "prompt": "noise on the prompt",
        "group 2": "group inference, 2 made for 1 kept, true reward",
        "group 4": "group inference, 4 made for 1 kept, true reward",
        "policy": "policy: variety 0 to 1",
    }
    with matplotlib.rc_context(PLOT_STYLE):
        figure = Figure(figsize=(7.5, 4.2), layout="constrained")
        axes = figure.subplots()
        for title, label in titles.items():
            kind, _, made = title.partition(" ")
            points = [
                (100 * sum(row["variety"]) / len(row["variety"]), sum(row["reward"]) / len(row["reward"]))
                for row in rows
                if row["kind"] == kind and made in ("", str(row["images_made_per_image"]))
            ]
            style = {"color": _COLORS[kind], "marker": "s" if made == "4" else "o", "linewidth": 1.5}
            axes.plot(*zip(*points, strict=True), label=label, **style)
        axes.axvline(100, color=_COLORS["base"], linewidth=1, linestyle=":")
        axes.set(xlabel="variety of a caption's pictures, % of the base model's", ylabel="reward at 2 steps")
        axes.legend(fontsize=8)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def picture_sheet(rows: dict[str, torch.Tensor], tile: int = 112) -> bytes:
    """Draw the pictures of one caption, a row for each way."""
    gap, label = 6, 120
    count = max(map(len, rows.values()))
    sheet = Image.new("RGB", (label + count * (tile + gap), len(rows) * (tile + gap) + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, (name, images) in enumerate(rows.items()):
        top = gap + number * (tile + gap)
        draw.text((8, top + tile // 2 - 14), name.replace(", ", "\n"), fill="#111827", font=font)
        for column, image in enumerate(images):
            sheet.paste(to_pil(image, tile), (label + column * (tile + gap), top))
    return png(sheet)
