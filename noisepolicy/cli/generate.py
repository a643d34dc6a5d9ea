"""`noisepolicy-generate`: images of a trained policy, beside the base model's from the same seed if asked."""

import argparse
import sys
from pathlib import Path

from noisepolicy.cli.denoiser import add_denoiser_arguments, with_denoiser
from noisepolicy.cli.failures import prepare, quiet_loading, run_command


def main(argv: list[str] | None = None) -> int:
    """Exit codes: see `run_command`."""
    parser = argparse.ArgumentParser(prog="noisepolicy-generate", description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder of noisepolicy-train")
    parser.add_argument("prompts", nargs="+", metavar="prompt")
    parser.add_argument("--num-images", type=int, default=1, help="of each prompt (default: 1)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the first the run was trained at)")
    parser.add_argument("--guidance-scale", type=float, help="default: the run's")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--compare", action="store_true", help="also the base model's, and a grid of both")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: the run's)")
    add_denoiser_arguments(parser)
    parser.add_argument("--output-dir", type=Path, help="default: RUN/generated")
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    arguments = parser.parse_args(argv)
    prepare("noisepolicy-generate")
    return run_command("noisepolicy-generate", lambda: _generate(arguments), is_debug=arguments.debug)


def _generate(arguments: argparse.Namespace) -> None:
    for name, least in (("num_images", 1), ("steps", 1), ("seed", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be {least} or more, got {value}")
    quiet_loading()
    import torch

    from noisepolicy.cli.devices import for_device, make_run_accelerator, with_mixed_precision
    from noisepolicy.evaluation.figures import base_above_policy, picture_bytes
    from noisepolicy.ops import gaussian_sample
    from noisepolicy.policies import NoisePolicy
    from noisepolicy.storage import write_bytes
    from noisepolicy.training.run_folder import RunFolder
    from noisepolicy.training.task import load_frozen

    run, config = RunFolder.open(arguments.run)
    run.check_model_is_there(config)
    policy = NoisePolicy.from_pretrained(run.checked_policy())
    accelerator = make_run_accelerator(config, arguments.device)
    config, device = with_mixed_precision(config, accelerator), accelerator.device
    frozen = load_frozen(for_device(with_denoiser(config, arguments, device), device), device)
    run.warn_of_another_model(frozen.weights_sha256())
    steps = arguments.steps or config.num_inference_steps[0]
    guidance = config.guidance_scale if arguments.guidance_scale is None else arguments.guidance_scale
    prompts = [prompt for prompt in arguments.prompts for _ in range(arguments.num_images)]
    embeds = frozen.encode(prompts)
    policy.to(device)
    starts = {"": policy.choose(embeds.prompt_embeds, seed=arguments.seed, num_inference_steps=steps)}
    if arguments.compare:
        prior = torch.zeros(len(prompts), *policy.latent_shape, device=device)
        starts["_base"] = gaussian_sample(prior, prior.new_zeros(()), seed=arguments.seed)[0]
    images = {
        side: frozen.generate(latents, embeds, num_inference_steps=steps, guidance_scale=guidance)
        for side, latents in starts.items()
    }
    folder = arguments.output_dir or run.within("generated")
    for side, batch in images.items():
        for number, image in enumerate(batch):
            data, suffix = picture_bytes(image)
            write_bytes(folder / f"{number:04d}{side}.{suffix}", data)
    print(f"{len(prompts)} image{'s' if len(prompts) > 1 else ''} in {folder}")
    if arguments.compare:
        write_bytes(folder / "grid.png", base_above_policy(images["_base"], images[""]))
        print(f"base model above, policy below: {folder / 'grid.png'}")


if __name__ == "__main__":
    sys.exit(main())
