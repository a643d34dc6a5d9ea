"""`noisepolicy-bench copies`: a policy of the embedded model on other copies of it than the one it was trained on.

The copies are the model with a LoRA at two strengths, quantised, in bfloat16, and at other step counts. The LoRA is
made here, by a short training on paler pictures. Base model and policy start from the same seeds on every copy.
"""

import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch.nn import functional as F

from noisepolicy.training.run import Run
from noisepolicy.training.run_folder import RunFolder
from noisepolicy.worlds.shapes import model_folder, train_scenes
from noisepolicy.worlds.shapes.renderer import render

_QUANTISED = {"torchao": ("torchao:int8_weight_only",), "optimum": ("quanto:int8", "quanto:int4", "quanto:int2")}


def run(folder: Path, step_counts: Sequence[int], num_prompts: int, lora_steps: int) -> dict[str, Any]:
    """Print a table and return its rows.

    Args:
        folder: Run folder of the embedded image model.
        step_counts: Further step counts, on the run's own copy.
        num_prompts: Held-out prompts, with eight images each.
        lora_steps: Gradient steps on the LoRA.

    Raises:
        ValueError: if it is no run of the embedded image model, or a number is not positive.
    """
    if min(*step_counts, num_prompts, lora_steps) < 1:
        raise ValueError("--steps, --num-prompts and --lora-steps must be positive")
    opened, config = RunFolder.open(folder)
    if config.model.name != "shapes":
        raise ValueError(f"{folder} is a run of {config.model.name}, not of shapes")
    trained = config.num_inference_steps[0]
    rows = []
    print("copy                          steps  base   policy  gain (95% interval)       of its own gain")
    with tempfile.TemporaryDirectory() as work:
        lora = make_lora(Path(work) / "paler.safetensors", lora_steps)
        copies: dict[str, dict[str, Any]] = {"its own": {}}
        copies |= {f"LoRA at {scale}": {"lora": [f"{lora}:{scale}"]} for scale in (0.5, 1.0)}
        copies |= {
            kind: {"quantize": kind} for package, kinds in _QUANTISED.items() if find_spec(package) for kind in kinds
        }
        copies["bfloat16"] = {"dtype": "bfloat16"}
        for name, settings in copies.items():
            model = config.replace(engine="eager", engine_dtype=None, **settings)
            steps = [trained, *(each for each in step_counts if each != trained)] if not settings else [trained]
            sweep = Run.open(opened, model).evaluate(steps=steps, num_prompts=num_prompts, group_size=8)
            for row in sweep.rows:
                low, high = row["gain_ci95"]
                entry = {
                    "copy": name,
                    "steps": row["num_inference_steps"],
                    "base": row["base"]["reward"],
                    "policy": row["policy"]["reward"],
                    "gain": row["gain"],
                    "gain_ci95": [low, high],
                }
                rows.append(entry)
                share = entry["gain"] / rows[0]["gain"]
                print(
                    f"{name:28s} {entry['steps']:6d}  {entry['base']:.3f}  {entry['policy']:.3f}   "
                    f"{entry['gain']:+.3f} ({low:+.3f} to {high:+.3f})   {share:6.0%}",
                    flush=True,
                )
    return {"trained_steps": trained, "num_prompts": num_prompts, "lora_steps": lora_steps, "copies": rows}


def make_lora(path: Path, num_steps: int) -> Path:
    """Train a LoRA of the embedded model on pictures that are paler than its own, and save it."""
    from peft import LoraConfig, get_peft_model_state_dict

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    pipeline = DiffusionPipeline.from_pretrained(model_folder(), torch_dtype=torch.float32)
    unet, scheduler, scenes = pipeline.unet, pipeline.scheduler, train_scenes()
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights="gaussian"))
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for _ in range(num_steps):
        batch = [scenes[i] for i in torch.randint(len(scenes), (32,), generator=generator)]
        with torch.no_grad():
            pixels = 0.93 * render(batch, generator) + 0.07
            latents = pipeline.vae.encode(pixels * 2 - 1).latents * pipeline.vae.config.scaling_factor
            text, _ = pipeline.encode_prompt([scene.caption for scene in batch], "cpu", 1, False)
        noise = torch.randn(latents.shape, generator=generator)
        times = torch.randint(scheduler.config.num_train_timesteps, (len(batch),), generator=generator)
        prediction = unet(scheduler.add_noise(latents, noise, times), times, text).sample
        loss = F.mse_loss(prediction, scheduler.get_velocity(latents, noise, times))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pipeline.save_lora_weights(path.parent, unet_lora_layers=get_peft_model_state_dict(unet), weight_name=path.name)
    return path
