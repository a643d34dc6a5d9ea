"""`noisepolicy demo`: a page to try a policy: a prompt, a seed, steps; base model and policy side by side."""

import argparse
import base64
import html
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noisepolicy.cli.engine import add_engine_arguments, with_engine
from noisepolicy.cli.failures import prepare, quiet_loading, run_command

if TYPE_CHECKING:
    import gradio
    import torch
    from diffusers import DiffusionPipeline

    from noisepolicy.frozen import FrozenModel
    from noisepolicy.policies import NoisePolicy
    from noisepolicy.training.config import TrainConfig

_NUM_CANDIDATES = 8
_NUM_EXAMPLES = 8
PAIR = "repeat(2, minmax(0, 24rem))"
_STRIP = "repeat(auto-fill, minmax(100px, 1fr))"
"""Columns of the pictures, in CSS."""


def main(argv: list[str] | None = None) -> int:
    """Run the command. Exit codes: see `run_command`."""
    parser = argparse.ArgumentParser(prog="noisepolicy demo", description=__doc__)
    add_page_arguments(parser)
    arguments = parser.parse_args(argv)
    prepare("noisepolicy demo")
    return run_command("noisepolicy demo", lambda: _serve(arguments), is_debug=arguments.debug)


def add_page_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a page: a run or a policy with its model, and where it is served."""
    parser.add_argument("source", help="run folder of noisepolicy-train, or a policy: a folder or a hub id")
    parser.add_argument("--model", help="model of the policy; the run's, to be repeated where it is module:object")
    parser.add_argument("--steps", type=int, help="denoising steps at first (default: the run's first, or 4)")
    parser.add_argument("--guidance-scale", type=float, help="classifier-free guidance (default: the run's, or 1)")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: the run's, or auto)")
    add_engine_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port (default: the first free one from 7860)")
    parser.add_argument("--share", action="store_true", help="also serve at a public address, through Gradio's servers")
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")


def _serve(arguments: argparse.Namespace) -> None:
    quiet_loading()
    serve(make_page(load_demo(arguments)), arguments)


def serve(page: "gradio.Blocks", arguments: argparse.Namespace) -> None:
    """Serve a page until it is interrupted."""
    page.queue()
    page.launch(server_name=arguments.host, server_port=arguments.port, share=arguments.share, footer_links=[])


@dataclass
class Demo:
    """The contents of the page: a policy, its model, and the settings that the page begins with."""

    name: str
    model: "FrozenModel | DiffusionPipeline"
    policy: "NoisePolicy | str"
    """The policy, its folder or hub id."""
    num_inference_steps: int = 4
    guidance_scale: float = 1.0
    examples: Sequence[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        import noisepolicy
        from noisepolicy.frozen import as_frozen_model

        self.model = as_frozen_model(self.model)
        if isinstance(self.policy, str):
            self.policy = noisepolicy.load(self.policy)
        self.policy.to(self.model.encode([""]).prompt_embeds.device)

    def pictures(self, prompt: str, seed: int, num_inference_steps: int) -> dict[str, "torch.Tensor"]:
        """Make the base model's and the policy's image of a prompt from the same seed."""
        from noisepolicy.prior import noise

        embeds = self.model.encode([prompt])
        rows, shape = embeds.prompt_embeds, self.model.latent_shape
        starts = {
            "base model": noise(seed=seed, shape=shape, device=rows.device),
            "policy": self.policy.choose(
                rows, seed=seed, num_inference_steps=num_inference_steps, latent_shape=tuple(shape)
            ),
        }
        return {side: self._generate(latents, embeds, num_inference_steps)[0] for side, latents in starts.items()}

    def candidates(self, prompt: str, seed: int, num_inference_steps: int) -> list[tuple[str, "torch.Tensor"]]:
        """Make the images of several starts of a prompt, with what the critic foresees; the best first."""
        embeds = self.model.encode([prompt])
        latents, foreseen = self.policy.candidates(
            embeds.prompt_embeds,
            _NUM_CANDIDATES,
            seed=seed,
            num_inference_steps=num_inference_steps,
            latent_shape=tuple(self.model.latent_shape),
        )
        images = self._generate(latents, embeds[[0] * _NUM_CANDIDATES], num_inference_steps)
        if foreseen is None:
            return [(f"start {number}", image) for number, image in enumerate(images)]
        order = foreseen.argsort(descending=True, stable=True).tolist()
        return [(f"the critic foresees {foreseen[number]:.3f}", images[number]) for number in order]

    def _generate(self, latents: Any, embeds: Any, num_inference_steps: int) -> "torch.Tensor":
        return self.model.generate(
            latents, embeds, num_inference_steps=num_inference_steps, guidance_scale=self.guidance_scale
        )


def import_gradio() -> Any:
    """Import Gradio, or raise ValueError that says how to install it."""
    try:
        import gradio
    except ImportError as error:
        raise ValueError("the page needs Gradio: pip install 'noisepolicy[demo]'") from error
    return gradio


def make_page(demo: Demo) -> "gradio.Blocks":
    """Make the page, which a Space may launch too.

    The address may hold `?prompt=...&seed=...&steps=...`, with which the page begins.

    Raises:
        ValueError: if Gradio is not installed.
    """
    gradio = import_gradio()
    is_free = threading.Lock()  # the model makes the pictures of one event at a time

    def pair(prompt: str, seed: float, steps: float) -> str:
        return figures_html(list(_asked(demo.pictures, prompt, seed, steps).items()), PAIR)

    def strip(prompt: str, seed: float, steps: float) -> str:
        return figures_html(_asked(demo.candidates, prompt, seed, steps), _STRIP)

    def gallery(seed: float, steps: float) -> Iterator[dict[Any, str]]:
        for shown, text in zip(pairs, demo.examples, strict=True):
            yield {shown: html.escape(text) + pair(text, seed, steps)}

    def begin(request: gradio.Request) -> tuple[str, int, int, str]:
        asked = dict(request.query_params)
        prompt = asked.get("prompt") or (demo.examples[0] if demo.examples else "")
        seed = int(asked["seed"]) if asked.get("seed", "").isdecimal() else 0
        steps = int(asked["steps"]) if asked.get("steps", "").isdecimal() else demo.num_inference_steps
        return prompt, seed, steps, pair(prompt, seed, steps) if prompt else ""

    def _asked(make: Any, prompt: str, seed: float, steps: float) -> Any:
        try:
            if not prompt.strip():
                raise ValueError("the prompt is empty")
            with is_free:
                return make(prompt, int(seed), int(steps))
        except (ValueError, RuntimeError) as error:
            raise gradio.Error(" ".join(str(error).split()), print_exception=False) from error

    with gradio.Blocks(title=f"noisepolicy: {demo.name}", analytics_enabled=False) as page:
        gradio.Markdown(f"## {html.escape(demo.name)}\nThe same seed, without and with the policy.")
        prompt = gradio.Textbox(label="Prompt", lines=1, max_lines=4, submit_btn=True)
        with gradio.Row():
            seed = gradio.Number(label="Seed", value=0, precision=0, minimum=0, min_width=120)
            last = max(16, demo.num_inference_steps)
            steps = gradio.Slider(1, last, value=demo.num_inference_steps, step=1, label="Steps", min_width=200)
        pictures = gradio.HTML()
        button = gradio.Button("Show candidates")
        candidates = gradio.HTML()
        asked = [prompt, seed, steps]
        gradio.on([prompt.submit, seed.submit, steps.release], pair, asked, pictures, api_name="pictures")
        button.click(strip, asked, candidates, api_name="candidates")
        if demo.examples:
            examples = gradio.Examples([[text] for text in demo.examples], prompt, label="Held-out prompts")
            examples.load_input_event.then(pair, asked, pictures, api_name=False)
            pairs = []
            with gradio.Accordion("Gallery of the held-out prompts", open=False) as accordion, gradio.Row():
                for _ in demo.examples:
                    with gradio.Column(min_width=280):
                        pairs.append(gradio.HTML(elem_classes="gallery"))
            # Its pictures are made while it is open.
            opened = accordion.expand(gallery, [seed, steps], pairs, api_name="gallery")
            accordion.collapse(lambda: [""] * len(pairs), None, pairs, cancels=[opened], api_name=False)
        page.load(begin, None, [*asked, pictures], api_name=False)
    return page


def figures_html(entries: Sequence[tuple[str, "torch.Tensor"]], columns: str) -> str:
    """Return pictures with captions as HTML."""
    from noisepolicy.evaluation.figures import picture_bytes

    figures = []
    for caption, image in entries:
        data, suffix = picture_bytes(image)
        source = f"data:image/{suffix};base64,{base64.b64encode(data).decode()}"
        text = html.escape(caption)
        picture = f'<img alt="{text}" src="{source}" style="width: 100%; border-radius: 6px">'
        figures.append(f'<figure style="margin: 0">{picture}<figcaption>{text}</figcaption></figure>')
    style = f"display: grid; gap: 12px; grid-template-columns: {columns}"
    return f'<div class="pictures" style="{style}">{"".join(figures)}</div>'


def load_demo(arguments: argparse.Namespace) -> Demo:
    """Load the run or policy that the command line names, and its model."""
    run = Path(arguments.source)
    demo = _of_run(run, arguments) if (run / "config.yaml").is_file() else _of_policy(arguments)
    if arguments.steps is not None:
        if arguments.steps < 1:
            raise ValueError(f"--steps must be 1 or more, got {arguments.steps}")
        demo.num_inference_steps = arguments.steps
    if arguments.guidance_scale is not None:
        demo.guidance_scale = arguments.guidance_scale
    return demo


def _of_run(path: Path, arguments: argparse.Namespace) -> Demo:
    from noisepolicy.training.run import Run
    from noisepolicy.training.run_folder import RunFolder
    from noisepolicy.training.trust import refuse_outside_code

    folder, config = RunFolder.open(path)
    refuse_outside_code(folder.path, model=None if arguments.model else config.model.name)
    if arguments.model:
        config = config.replace(model=arguments.model)
    config.check()
    folder.check_model_is_there(config)
    run = Run.open(folder, with_engine(config, arguments), device=arguments.device)
    try:
        _refuse_outside_prompts(config)
        examples = run.held_out_prompts[:_NUM_EXAMPLES]
    except ValueError as error:
        warnings.warn(f"the page has no held-out prompts: {error}", stacklevel=2)
        examples = []
    return Demo(
        folder.path.name,
        run.model,
        run.policy,
        config.num_inference_steps[0],
        config.guidance_scale,
        examples,
    )


def _refuse_outside_prompts(config: "TrainConfig") -> None:
    """Raise ValueError if the held-out prompts are elsewhere: the run may be anybody's, and the page seen by all."""
    from noisepolicy.training.prompt_list import is_hub_dataset, is_prompt_file

    for source in config.evaluation.prompts or config.prompts:
        if is_prompt_file(source) or is_hub_dataset(source):
            raise ValueError(f"{source} is not in the run folder")


def _of_policy(arguments: argparse.Namespace) -> Demo:
    from noisepolicy.training.config import TrainConfig
    from noisepolicy.training.devices import make_accelerator
    from noisepolicy.training.task import load_model

    if arguments.model is None:
        raise ValueError(f"{arguments.source} is no run folder; a policy alone needs its model, --model")
    config = with_engine(TrainConfig.of(model=arguments.model, device=arguments.device or "auto"), arguments)
    device = make_accelerator(config.model.device).device
    model = load_model(config.model, device, settings=config)
    return Demo(arguments.source, model, arguments.source)


if __name__ == "__main__":
    sys.exit(main())
