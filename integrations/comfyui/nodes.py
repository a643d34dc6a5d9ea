"""The nodes *Load Noise Policy* and *Learned Noise*, by ComfyUI's V3 interface."""

from pathlib import Path

import comfy.model_management
import folder_paths
from comfy_api.latest import ComfyExtension, io

import noisepolicy

from .noise import LearnedNoise

_FOLDER = "noise_policies"
_Policy = io.Custom("NOISE_POLICY")

folder_paths.add_model_folder_path(_FOLDER, str(Path(folder_paths.models_dir) / _FOLDER))


class LoadNoisePolicy(io.ComfyNode):
    """The node that loads a policy."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NoisePolicyLoad",
            display_name="Load Noise Policy",
            category="sampling/custom_sampling/noise",
            description="Load a policy that noisepolicy trained. A policy is data; no code of it is run.",
            inputs=[
                io.String.Input(
                    "policy",
                    default="",
                    tooltip="A folder in models/noise_policies, any folder, or a hub id: name/policy",
                )
            ],
            outputs=[_Policy.Output()],
        )

    @classmethod
    def execute(cls, policy: str) -> io.NodeOutput:
        if not policy.strip():
            raise ValueError("policy is empty; name a folder in models/noise_policies, any folder or a hub id")
        folders = [Path(folder) / policy.strip() for folder in folder_paths.get_folder_paths(_FOLDER)]
        place = next((folder for folder in folders if folder.is_dir()), policy.strip())
        return io.NodeOutput(noisepolicy.load(place).to(comfy.model_management.get_torch_device()))


class LearnedNoiseNode(io.ComfyNode):
    """The node that makes a policy's noise for a sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NoisePolicyLearnedNoise",
            display_name="Learned Noise",
            category="sampling/custom_sampling/noise",
            description="Noise that a policy learned for the prompt, in the place of RandomNoise. Any resolution.",
            inputs=[
                _Policy.Input("policy"),
                io.Conditioning.Input("conditioning", tooltip="The prompt, straight from the text encoder"),
                io.Int.Input("noise_seed", default=0, min=0, max=2**64 - 1, control_after_generate=True),
                io.Int.Input("steps", default=4, min=1, max=10000, tooltip="Steps that the sampler takes"),
                io.Int.Input(
                    "candidates",
                    default=0,
                    min=0,
                    max=65536,
                    tooltip="Starts that the critic chooses among; 0: the policy's own",
                ),
                io.Float.Input(
                    "variety",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,  # workflows that were saved before have no such value
                    tooltip="How much the pictures of a batch are to differ; 0: as the policy was trained",
                ),
            ],
            outputs=[io.Noise.Output()],
        )

    @classmethod
    def execute(
        cls,
        policy: noisepolicy.NoisePolicy,
        conditioning: list,
        noise_seed: int,
        steps: int,
        candidates: int,
        variety: float = 0.0,
    ) -> io.NodeOutput:
        return io.NodeOutput(
            LearnedNoise(
                policy,
                conditioning,
                noise_seed,
                num_inference_steps=steps,
                num_candidates=candidates or None,
                variety=variety,
            )
        )


class NoisePolicyExtension(ComfyExtension):
    """The nodes of this package, as ComfyUI's V3 interface lists them."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadNoisePolicy, LearnedNoiseNode]


async def comfy_entrypoint() -> NoisePolicyExtension:
    """Return the extension; ComfyUI calls this when it loads the folder."""
    return NoisePolicyExtension()
