"""Make pictures of prompt embeddings with ONNX Runtime and numpy alone, from the files of `noisepolicy-export`.

noisepolicy-export runs/first --output-dir exported
python examples/without_torch.py exported prompt_embeds.npy pictures.npy --steps 2
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from safetensors.numpy import load_file
from scipy.fft import dctn, idctn


class Exported:
    """A folder of `noisepolicy-export`, of a Stable Diffusion model."""

    def __init__(self, folder: Path) -> None:
        self.settings = json.loads((folder / "loop.json").read_text("utf-8"))
        self.constants = load_file(folder / "constants.safetensors")
        self._sessions = {
            path.stem: onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            for path in folder.glob("*.onnx")
        }

    def start(self, prompt_embeds: np.ndarray, steps: int, seed: int = 0) -> np.ndarray:
        """Return the policy's latents: the action is the candidate that its critic chooses, the rest the prior's."""
        random, batch = np.random.default_rng(seed), len(prompt_embeds)
        noise = random.standard_normal((batch, *self.settings["latent_shape"]), dtype=np.float32)
        if self.settings["policy"] is None:
            return noise
        shape = (batch, self.settings["num_candidates"], *self.settings["action_shape"])
        inputs = {"prompt_embeds": prompt_embeds, "noise": random.standard_normal(shape, dtype=np.float32)}
        step_index = self.settings["steps"][str(steps)]["step_index"]
        if step_index is not None:
            inputs["step_index"] = np.array(step_index)
        action = self._run("policy", **inputs)
        if self.settings["policy"] != "spectral":
            return action
        spectrum = dctn(noise, axes=(-2, -1), norm="ortho")
        spectrum[..., : action.shape[-2], : action.shape[-1]] = action
        return idctn(spectrum, axes=(-2, -1), norm="ortho").astype(np.float32)

    def generate(self, latents: np.ndarray, prompt_embeds: np.ndarray, steps: int) -> np.ndarray:
        """Make pictures in [0, 1], `(batch, 3, height, width)`."""
        guidance, schedule = self.settings["guidance_scale"], self.settings["steps"][str(steps)]
        is_guided = guidance > 1
        embeds = prompt_embeds
        if is_guided:
            away = self.constants["negative_prompt_embeds"]
            embeds = np.concatenate([np.broadcast_to(away, prompt_embeds.shape), prompt_embeds])
        sample, terms = latents * np.float32(schedule["first"]), [latents]
        for timestep, scale, weights in zip(
            schedule["timesteps"], schedule["input_scales"], schedule["weights"], strict=True
        ):
            scaled = sample * np.float32(scale)
            rows = np.concatenate([scaled, scaled]) if is_guided else scaled
            prediction = self._run("denoiser", sample=rows, timestep=np.array(timestep), encoder_hidden_states=embeds)
            if is_guided:
                away, toward = np.split(prediction, 2)
                prediction = away + np.float32(guidance) * (toward - away)
            terms.append(prediction)
            sample = sum(np.float32(weight) * term for weight, term in zip(weights, terms, strict=True))
        images = self._run("vae_decoder", latents=sample / np.float32(self.settings["scaling_factor"]))
        return np.clip(images / 2 + 0.5, 0, 1)

    def _run(self, name: str, **inputs: np.ndarray) -> np.ndarray:
        return self._sessions[name].run(None, {key: value.astype(np.float32) for key, value in inputs.items()})[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompt_embeds", type=Path, help="(batch, tokens, width), float32, .npy")
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=2)
    arguments = parser.parse_args()
    model, prompts = Exported(arguments.folder), np.load(arguments.prompt_embeds)
    np.save(arguments.output, model.generate(model.start(prompts, arguments.steps), prompts, arguments.steps))
