"""The figures of a report: SVG for curves, PNG for pictures."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from noisepolicy.evaluation.sweep import Pair

_POLICY, _BASE, _OTHER = "#2563eb", "#6b7280", "#d97706"
PLOT_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "noisepolicy",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "axes.edgecolor": "#9ca3af",
    "legend.frameon": False,
}


def _figure(width: float, num_axes: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, 3.2), layout="constrained")
    return figure, figure.subplots(1, num_axes)


def figure_svg(figure: Figure) -> str:
    """Render a figure as an `<svg>` element. The same figure gives the same bytes."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def training_curves(metrics: Sequence[dict[str, Any]]) -> str:
    """Plot reward and KL to the prior against images generated, as SVG."""
    with matplotlib.rc_context(PLOT_STYLE):
        figure, (reward_axes, kl_axes) = _figure(10, 2)
        images = [row["images"] for row in metrics]
        rewards = torch.tensor([row["reward"] for row in metrics])
        smooth = [rewards[max(0, i - 4) : i + 5].mean().item() for i in range(len(rewards))]
        reward_axes.plot(images, rewards, color=_POLICY, alpha=0.25, linewidth=1)
        reward_axes.plot(images, smooth, color=_POLICY, linewidth=2)
        reward_axes.set(xlabel="images generated", ylabel="reward in training (mean of a batch)")
        kl_axes.plot(images, [row["kl_to_prior"] for row in metrics], color=_OTHER, linewidth=2)
        kl_axes.set(xlabel="images generated", ylabel="KL to N(0, I), nats", ylim=(0, None))
        return figure_svg(figure)


def sweep_plot(rows: Sequence[dict[str, Any]], train_steps: Sequence[int]) -> str:
    """Plot gain against denoising steps, with intervals, beside the rewards, as SVG: Noise PPO's figure."""
    with matplotlib.rc_context(PLOT_STYLE):
        figure, (gain_axes, reward_axes) = _figure(10, 2)
        steps = [row["num_inference_steps"] for row in rows]
        gains = [row["gain"] for row in rows]
        errors = [
            [max(row["gain"] - row["gain_ci95"][0], 0.0) for row in rows],  # differences of rounded numbers
            [max(row["gain_ci95"][1] - row["gain"], 0.0) for row in rows],
        ]
        gain_axes.axhline(0, color=_BASE, linewidth=1)
        gain_axes.errorbar(steps, gains, yerr=errors, color=_POLICY, marker="o", capsize=4, linewidth=2)
        for step in train_steps:
            gain_axes.axvline(step, color=_OTHER, linestyle=":", linewidth=1.5)
        gain_axes.set(ylabel="gain in reward (95% interval)", title="gain (dotted: steps trained at)")

        reward_axes.plot(steps, [row["policy"]["reward"] for row in rows], color=_POLICY, marker="o", label="policy")
        reward_axes.plot(steps, [row["base"]["reward"] for row in rows], color=_BASE, marker="o", label="base model")
        for best, line in zip((2, 4), ("--", ":"), strict=True):
            points = [
                (row["num_inference_steps"], entry["reward"])
                for row in rows
                for entry in row["best_of_n"]
                if entry["n"] == best
            ]
            if points:
                reward_axes.plot(*zip(*points, strict=True), color=_BASE, linestyle=line, label=f"base, best of {best}")
        reward_axes.set(ylabel="reward", title="reward")
        reward_axes.legend()
        for axes in (gain_axes, reward_axes):
            axes.set_xscale("log", base=2)
            axes.set_xticks(steps, [str(step) for step in steps])
            axes.set_xlabel("denoising steps")
        return figure_svg(figure)


def to_pil(image: torch.Tensor, size: int | None = None) -> Image.Image:
    """Convert `(3, height, width)` in [0, 1] to a picture, enlarged to `size`, if given, without smoothing."""
    array = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(array)
    return picture if size is None else picture.resize((size, size), Image.Resampling.NEAREST)


def are_pictures(images: torch.Tensor) -> bool:
    """Tell whether images are `(batch, 3, height, width)`, or clips of such frames."""
    return images.ndim in (4, 5) and images.shape[-3] == 3


def as_pictures(images: torch.Tensor) -> Any:
    """Return PIL images, or lists of frames for clips; anything else stays a tensor."""
    if not are_pictures(images):
        return images
    return [to_pil(image) if image.ndim == 3 else [to_pil(frame) for frame in image] for image in images]


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def picture_bytes(image: torch.Tensor) -> tuple[bytes, str]:
    """Encode `(3, height, width)` as PNG, video `(frames, 3, height, width)` as GIF. Returns bytes and suffix."""
    if image.ndim == 3:
        return png(to_pil(image)), "png"
    frames = [to_pil(frame) for frame in image]
    buffer = io.BytesIO()
    frames[0].save(buffer, format="GIF", save_all=True, append_images=frames[1:], duration=125, loop=0)
    return buffer.getvalue(), "gif"


def still(image: torch.Tensor) -> torch.Tensor:
    """Return an image as it is, or a video's middle frame."""
    return image if image.ndim == 3 else image[len(image) // 2]


def image_grid(images: Sequence[torch.Tensor], columns: int) -> bytes:
    """Draw a PNG of images side by side, row by row."""
    tiles = [to_pil(still(image)) for image in images]
    width, height = tiles[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height), "white")
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % columns * width, index // columns * height))
    return png(sheet)


def before_after(pairs: Sequence[Pair], tile: int = 128) -> bytes:
    """Draw a PNG of same-seed pairs: the base model above, the policy below; wholly right images get a green frame."""
    gap, margin, label = 6, 6, 96
    width, height = label + len(pairs) * (tile + gap) + margin, margin + 2 * (tile + gap)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for row, (name, side) in enumerate((("base model", "base"), ("with policy", "policy"))):
        top = margin + row * (tile + gap)
        draw.text((8, top + tile // 2 - 8), name, fill="#111827", font=font)
        for column, pair in enumerate(pairs):
            left = label + column * (tile + gap)
            sheet.paste(to_pil(still(getattr(pair, f"{side}_image")), tile), (left, top))
            strict = getattr(pair, f"{side}_metrics").get("strict")
            if strict is not None:
                color = "#16a34a" if strict == 1 else "#dc2626"
                draw.rectangle((left - 2, top - 2, left + tile + 1, top + tile + 1), outline=color, width=3)
    return png(sheet)
