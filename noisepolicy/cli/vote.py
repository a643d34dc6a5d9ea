"""`noisepolicy vote`: two pictures of a prompt, one click or arrow key; new pictures follow what the votes say."""

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from noisepolicy.cli.demo import PAIR, add_page_arguments, figures_html, import_gradio, load_demo, serve
from noisepolicy.cli.failures import prepare, quiet_loading, run_command

if TYPE_CHECKING:
    import gradio

    from noisepolicy.training.voting import Voting

_KEYS = """() => document.addEventListener("keydown", event => {
    const id = {ArrowLeft: "left", ArrowRight: "right", Backspace: "undo"}[event.key];
    if (id && !event.repeat) document.getElementById(id).click();
})"""


def main(argv: list[str] | None = None) -> int:
    """Run the command. Exit codes: see `run_command`."""
    parser = argparse.ArgumentParser(prog="noisepolicy vote", description=__doc__)
    add_page_arguments(parser)
    parser.add_argument("prompt")
    parser.add_argument("--seed", type=int, default=0, help="seed of the pictures (default: 0)")
    parser.add_argument("--output-dir", type=Path, help="folder of the votes (default: votes/ and the prompt)")
    arguments = parser.parse_args(argv)
    prepare("noisepolicy vote")
    return run_command("noisepolicy vote", lambda: _vote(arguments), is_debug=arguments.debug)


def _vote(arguments: argparse.Namespace) -> None:
    quiet_loading()
    from noisepolicy.training.voting import Voting

    import_gradio()  # before pictures are made in vain
    demo = load_demo(arguments)
    name = re.sub(r"\W+", "-", arguments.prompt).strip("-")[:80] or "prompt"
    voting = Voting(
        demo.model,
        arguments.prompt,
        arguments.output_dir or Path("votes") / name,
        num_inference_steps=demo.num_inference_steps,
        guidance_scale=demo.guidance_scale,
        policy=demo.policy,
        seed=arguments.seed,
    )
    serve(make_page(voting), arguments)


def make_page(voting: "Voting") -> "gradio.Blocks":
    """Make the page of a voting.

    Raises:
        ValueError: if Gradio is not installed.
    """
    gradio = import_gradio()

    def show() -> tuple[str, str]:
        pair = [(side, voting.image(number)) for side, number in zip(("left", "right"), voting.pair, strict=True)]
        best = [(f"the best so far, after {len(voting.votes)} votes", voting.image(voting.best))]
        return figures_html(pair, PAIR), figures_html(best, "minmax(0, 14rem)")

    def vote_left() -> tuple[str, str]:
        voting.vote(voting.pair[0])
        return show()

    def vote_right() -> tuple[str, str]:
        voting.vote(voting.pair[1])
        return show()

    def undo() -> tuple[str, str]:
        voting.undo()
        return show()

    with gradio.Blocks(title="noisepolicy vote", analytics_enabled=False) as page:
        gradio.Textbox(voting.prompt, label="Which picture is better?", interactive=False)
        pair = gradio.HTML()
        with gradio.Row():
            left = gradio.Button("Left (\u2190)", elem_id="left", min_width=80)
            right = gradio.Button("Right (\u2192)", elem_id="right", min_width=80)
            back = gradio.Button("Undo (\u232b)", elem_id="undo", min_width=80)
        best = gradio.HTML()
        shown = [pair, best]
        for button, function, name in ((left, vote_left, "left"), (right, vote_right, "right"), (back, undo, "undo")):
            button.click(function, None, shown, api_name=name, concurrency_id="voting")  # one at a time
        page.load(show, None, shown, js=_KEYS, api_name=False)
    return page


if __name__ == "__main__":
    sys.exit(main())
