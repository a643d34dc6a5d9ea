"""`noisepolicy-export`: a model's denoiser and VAE decoder, and a run's policy, as ONNX files and TensorRT engines."""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from noisepolicy.cli.failures import prepare, quiet_loading, run_command

if TYPE_CHECKING:
    import torch

    from noisepolicy.export.spec import Part
    from noisepolicy.frozen import FrozenDiffusersPipeline
    from noisepolicy.policies import NoisePolicy

_NO_MATTER = {
    "engine": "eager",
    "engine_dtype": None,
    "cuda_graph": False,
    "vae_slicing": False,
    "vae_tiling": False,
    "cpu_offload": False,
}
"""Settings that describe how a run was carried out on its machine. They do not affect the model and the policy."""

_DESCRIPTION = """Export a frozen model: denoiser.onnx, vae_decoder.onnx, with a run policy.onnx, and loop.json, which
holds what is left to do between them; --engine adds TensorRT engines, which can be built for GPUs that are not here."""


def main(argv: list[str] | None = None) -> int:
    """Run the command. Exit codes: see `run_command`."""
    parser = argparse.ArgumentParser(prog="noisepolicy-export", description=_DESCRIPTION)
    parser.add_argument("source", help="a run folder of noisepolicy-train, a model folder or hub id, or 'shapes'")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="data type of the exported files (default: the model's)",
    )
    parser.add_argument("--dynamic-size", action="store_true", help="let height and width change (UNets)")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8], help="step counts of loop.json")
    parser.add_argument("--guidance-scale", type=float, help="guidance scale of loop.json (default: the run's, or 1)")
    parser.add_argument("--engine", choices=("tensorrt", "tensorrt-rtx"), help="also build engines")
    parser.add_argument(
        "--target",
        nargs="+",
        default=[],
        metavar="sm_NN",
        help="GPUs to build for, e.g. sm_89 sm_120 (TensorRT-RTX; default: this machine)",
    )
    parser.add_argument("--max-batch", type=int, default=32, help="images an engine takes at a time (default: 32)")
    parser.add_argument("--refit", action="store_true", help="build engines whose weights can be changed later")
    parser.add_argument("--no-verify", action="store_true", help="do not compare with PyTorch in ONNX Runtime")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    arguments = parser.parse_args(argv)
    prepare("noisepolicy-export")
    return run_command("noisepolicy-export", lambda: _export(arguments), is_debug=arguments.debug)


def _export(arguments: argparse.Namespace) -> None:
    if arguments.max_batch < 1 or min(arguments.steps) < 1:
        raise ValueError("--max-batch and --steps must be positive")
    if arguments.target and arguments.engine is None:
        raise ValueError("--target needs --engine tensorrt-rtx")
    quiet_loading()
    import torch

    from noisepolicy.export.spec import decodes_video, denoiser_part, policy_part, vae_decoder_part
    from noisepolicy.policies import NoisePolicy
    from noisepolicy.training.config import TrainConfig
    from noisepolicy.training.devices import make_accelerator, with_mixed_precision
    from noisepolicy.training.run_folder import RunFolder
    from noisepolicy.training.task import load_model

    if arguments.engine is not None:  # before minutes of work
        from noisepolicy.export.to_tensorrt import capabilities_of

        capabilities_of(arguments.target, arguments.engine)
    policy, config = None, TrainConfig.of(model=arguments.source)
    if (Path(arguments.source) / "config.yaml").exists():
        run, config = RunFolder.open(Path(arguments.source))
        policy = NoisePolicy.from_pretrained(run.checked_policy())
        if policy.kind == "table":
            raise ValueError(f"{arguments.source} is a run of FIND: its policy is a table, in policy/, not a network")
    config = config.replace(dtype=arguments.dtype or config.model.dtype, **_NO_MATTER)
    accelerator = make_accelerator(arguments.device)
    config = with_mixed_precision(config, accelerator)
    frozen = load_model(config.model, accelerator.device, settings=config)
    guidance = arguments.guidance_scale
    if guidance is None:
        guidance = config.guidance_scale if policy is not None else 1.0
    dtype = getattr(torch, config.model.dtype or "float32")
    rows = 2 * arguments.max_batch if guidance > 1 else arguments.max_batch
    # All parts before any is built: what cannot be exported is told at once.
    denoiser = denoiser_part(frozen, guidance_scale=guidance, dynamic_size=arguments.dynamic_size)
    has_decoder = not decodes_video(frozen)
    decoder = vae_decoder_part(frozen, dynamic_size=arguments.dynamic_size) if has_decoder else None
    if arguments.engine is not None:
        denoiser.profile((1, rows, rows), (1.0, 1.0, 1.0))
    _export_part(denoiser, "denoiser", dtype, rows, arguments)
    if decoder is not None:
        # A decoder that the model's own pipeline runs in float32 gives NaN in float16.
        decoder_dtype = torch.float32 if dtype == torch.float16 and frozen.upcasts_vae else dtype
        _export_part(decoder, "vae_decoder", decoder_dtype, arguments.max_batch, arguments)
    else:
        kind = type(frozen.vae).__name__
        print(f"no vae_decoder.onnx: {kind} decodes videos, or pictures as videos, and stays in PyTorch", flush=True)
    if policy is not None:
        _export_part(policy_part(policy), "policy", torch.float32, arguments.max_batch, arguments)
    _write_loop(frozen, policy, arguments, guidance)


def _export_part(part: "Part", name: str, dtype: "torch.dtype", rows: int, arguments: argparse.Namespace) -> None:
    import torch

    from noisepolicy.engines.onnx_engine import OnnxEngine
    from noisepolicy.export.to_onnx import export_onnx
    from noisepolicy.export.to_tensorrt import build_engine
    from noisepolicy.export.verify import verify

    path, start = arguments.output_dir / f"{name}.onnx", time.perf_counter()
    num_bytes = export_onnx(part, path, dtype=dtype)
    precision = str(dtype).removeprefix("torch.")
    said = f"{path}  {precision}, {_size(num_bytes)}, {time.perf_counter() - start:.0f} s"
    device = next(iter(part.inputs.values())).device
    if not arguments.no_verify:
        if dtype == torch.bfloat16 and device.type == "cpu":
            said += "; not verified: ONNX Runtime has no bfloat16 on a CPU"
        else:
            engine = OnnxEngine(path, device=device, output_shape=part.output_shape())
            said += f"; differs from PyTorch by {verify(part, engine.run, dtype=dtype):.0e}"
    print(said, flush=True)
    if arguments.engine is None or name == "policy":
        return
    engine_path, start = path.with_suffix(".engine"), time.perf_counter()
    scale = (0.5, 1.0, 2.0) if arguments.dynamic_size else (1.0, 1.0, 1.0)
    build_engine(
        path,
        engine_path,
        flavor=arguments.engine,
        shapes=part.profile((1, rows, rows), scale),
        targets=arguments.target,
        refit=arguments.refit,
        device=device if device.type == "cuda" else None,
        timings_folder=arguments.output_dir,
    )
    size, seconds = _size(engine_path.stat().st_size), time.perf_counter() - start
    gpus = f", for {', '.join(arguments.target)}" if arguments.target else ""
    print(f"{engine_path}  {size}, {seconds:.0f} s{gpus}", flush=True)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _write_loop(
    frozen: "FrozenDiffusersPipeline",
    policy: "NoisePolicy | None",
    arguments: argparse.Namespace,
    guidance_scale: float,
) -> None:
    """Write the work that is left around the ONNX files, which `examples/without_torch.py` does."""
    from noisepolicy.storage import write_json, write_tensors

    loops = {steps: frozen.loop(steps, guidance_scale) for steps in arguments.steps}
    if None in loops.values():
        print("no loop.json: not a model, a scheduler or a precision whose steps it could hold")
        return
    steps = {
        str(steps): {
            "timesteps": loop.schedule.timesteps.tolist(),
            "input_scales": loop.schedule.input_scales,
            "first": loop.schedule.first,
            "weights": loop.schedule.weights,
            "step_index": policy.critic.shape.nearest_step_index(steps) if policy and policy.critic else None,
        }
        for steps, loop in loops.items()
    }
    write_tensors(
        arguments.output_dir / "constants.safetensors",
        {**frozen.negative_embeds, **next(iter(loops.values())).constants},
    )
    config = frozen.vae.config
    settings = {
        "latent_shape": frozen.latent_shape,
        "guidance_scale": guidance_scale,
        "scaling_factor": config.scaling_factor,
        "policy": None if policy is None else policy.kind,
        "action_shape": None if policy is None else policy.action_shape,
        "num_candidates": None if policy is None else policy.num_candidates,
        "steps": steps,
    }
    write_json(arguments.output_dir / "loop.json", settings)
    print(arguments.output_dir / "loop.json")


if __name__ == "__main__":
    sys.exit(main())
