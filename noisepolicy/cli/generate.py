"""`noisepolicy-generate`: images of a trained policy, beside the base model's from the same seed if asked."""

import argparse
import sys
from pathlib import Path
from typing import Any

from noisepolicy.cli.copy import parse_with_copy, with_copy
from noisepolicy.cli.engine import add_engine_arguments, with_engine
from noisepolicy.cli.failures import prepare, quiet_loading, run_command


def main(argv: list[str] | None = None) -> int:
    """Run the command. Exit codes: see `run_command`."""
    parser = argparse.ArgumentParser(prog="noisepolicy-generate", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder of noisepolicy-train")
    parser.add_argument("prompts", nargs="+", metavar="prompt")
    parser.add_argument("--model", help="the run's model, to be repeated where it is module:object")
    parser.add_argument("--num-images", type=int, default=1, help="images of each prompt (default: 1)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the first the run was trained at)")
    parser.add_argument("--guidance-scale", type=float, help="classifier-free guidance (default: the run's)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    parser.add_argument("--best-of", type=int, default=1, help="images of which the best is kept (default: 1)")
    parser.add_argument("--reward", help="reward that --best-of chooses by (default: the run's)")
    parser.add_argument(
        "--variety",
        type=float,
        default=0.0,
        help="how much the images of a prompt are to differ, from 0 to 1, as the critic foresees them; no further "
        "image is made (default: 0; 0.2 is a good first try)",
    )
    parser.add_argument("--compare", action="store_true", help="also write the base model's images, and a grid of both")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: the run's)")
    add_engine_arguments(parser)
    parser.add_argument("--output-dir", type=Path, help="folder for the images (default: RUN/generated)")
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    arguments, copy = parse_with_copy(parser, argv)
    prepare("noisepolicy-generate")
    return run_command("noisepolicy-generate", lambda: _generate(arguments, copy), is_debug=arguments.debug)


def _generate(arguments: argparse.Namespace, copy: dict[str, Any]) -> None:
    quiet_loading()
    from noisepolicy.evaluation.figures import image_grid, picture_bytes
    from noisepolicy.storage import write_bytes
    from noisepolicy.training.run import Run
    from noisepolicy.training.run_folder import RunFolder
    from noisepolicy.training.trust import refuse_outside_code

    folder, config = RunFolder.open(arguments.run)
    config = with_copy(config, copy)
    refuse_outside_code(folder.path, model=None if arguments.model else config.model.name)
    if arguments.model:
        config = config.replace(model=arguments.model)
    config.check()
    if arguments.reward is not None and arguments.best_of == 1:
        raise ValueError("--reward chooses among several images; say how many with --best-of")
    folder.check_model_is_there(config)
    run = Run.open(folder, with_engine(config, arguments), device=arguments.device)
    images = run.generate_tensors(
        arguments.prompts,
        seed=arguments.seed,
        num_images_per_prompt=arguments.num_images,
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        best_of=arguments.best_of,
        reward=arguments.reward,
        compare=arguments.compare,
        variety=arguments.variety,
    )
    output = arguments.output_dir or folder.within("generated")
    for side, batch in images.items():
        for number, image in enumerate(batch):
            data, suffix = picture_bytes(image)
            write_bytes(output / f"{number:04d}{'_base' if side == 'base' else ''}.{suffix}", data)
    count = len(images["policy"])
    print(f"{count} image{'s' if count > 1 else ''} in {output}")
    if arguments.compare:
        write_bytes(output / "grid.png", image_grid([*images["base"], *images["policy"]], count))
        print(f"base model above, policy below: {output / 'grid.png'}")


if __name__ == "__main__":
    sys.exit(main())
