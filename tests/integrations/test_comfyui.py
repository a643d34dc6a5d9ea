"""The ComfyUI nodes: the noise on its own, and workflows in the real ComfyUI on the CPU, driven by its HTTP API.

ComfyUI is no package of an index. The tests that need it are skipped unless COMFYUI names its folder, and
COMFYUI_PYTHON a Python that can run it and has noisepolicy.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from noisepolicy.policies import SpectralPolicy
from noisepolicy.policies.critic import CriticShape, RewardCritic
from noisepolicy.prior import noise
from noisepolicy.worlds.shapes import held_out_scenes, model_folder

ROOT = Path(__file__).parents[2]
NODES = ROOT / "integrations" / "comfyui"
PROMPT = held_out_scenes()[0].caption


@pytest.fixture(scope="module")
def learned_noise():
    spec = importlib.util.spec_from_file_location("comfyui_noise", NODES / "noise.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LearnedNoise


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(1)
    policy = SpectralPolicy(latent_shape=(8, 8, 8), prompt_shape=(20, 128))
    torch.nn.init.normal_(policy.mean.weight, std=0.1)
    critic = RewardCritic(CriticShape((20, 128), policy.action_shape, True, (2,)), size=3)
    policy.attach_critic(critic, num_candidates=8)
    return policy


@pytest.fixture(scope="module")
def pipeline():
    pipeline = StableDiffusionPipeline.from_pretrained(model_folder())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def embeds(pipeline):
    return pipeline.encode_prompt(PROMPT, torch.device("cpu"), 1, False)[0]


def test_it_is_the_policys_noise(learned_noise, policy, pipeline, embeds):
    expected = policy.latents(pipeline, [PROMPT] * 4, seed=7, num_inference_steps=2)
    made = learned_noise(policy, [[embeds, {}]], 7, num_inference_steps=2)
    latent = {"samples": torch.zeros(4, 8, 8, 8)}
    assert made.seed == 7 and torch.equal(made.generate_noise(latent), expected)
    some = {"samples": torch.zeros(2, 8, 8, 8), "batch_index": [3, 1]}
    assert torch.equal(made.generate_noise(some), expected[[3, 1]])
    other = {"samples": torch.zeros(1, 8, 12, 16, dtype=torch.float16)}
    assert made.generate_noise(other).shape == (1, 8, 12, 16) and made.generate_noise(other).dtype == torch.float16
    one = learned_noise(policy, [[embeds, {}]], 7, num_candidates=1).generate_noise(latent)
    assert not torch.equal(one, expected)
    varied = policy.latents(pipeline, [PROMPT] * 4, seed=7, variety=0.5)
    assert torch.equal(learned_noise(policy, [[embeds, {}]], 7, variety=0.5).generate_noise(latent), varied)


def test_shapes_of_prompts_and_latents(learned_noise, embeds):
    plain = SpectralPolicy(latent_shape=(8, 8, 8), prompt_shape=(20, 128))
    # Longer prompts are cut and shorter ones padded, and a video of one frame is an image.
    for tokens in (12, 20, 35):
        made = learned_noise(plain, [[torch.ones(1, tokens, 128), {}]], 3)
        frame = made.generate_noise({"samples": torch.zeros(2, 8, 1, 8, 8)})
        torch.testing.assert_close(frame[:, :, 0], noise(seed=3, index=range(2), shape=(8, 8, 8)), rtol=0, atol=1e-6)
    video = SpectralPolicy(latent_shape=(4, 3, 8, 8), prompt_shape=(20, 128), bands=4)
    clip = learned_noise(video, [[embeds, {}]], 3).generate_noise({"samples": torch.zeros(1, 4, 5, 8, 8)})
    assert clip.shape == (1, 4, 5, 8, 8)
    several = learned_noise(plain, [[torch.rand(2, 20, 128), {}]], 3)
    assert several.generate_noise({"samples": torch.zeros(3, 8, 8, 8)}).shape == (3, 8, 8, 8)
    with pytest.raises(ValueError, match="prompt embeddings 128 wide, and these are 768"):
        learned_noise(plain, [[torch.zeros(1, 77, 768), {}]], 3)
    with pytest.raises(ValueError, match="latents of 8 channels, and these have 4: it is of another model"):
        several.generate_noise({"samples": torch.zeros(1, 4, 8, 8)})


class ComfyUI:
    """A server of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        custom = folder / "custom_nodes"
        custom.mkdir()
        (custom / "noisepolicy").symlink_to(NODES)
        (custom / "world").symlink_to(ROOT / "tests" / "integrations" / "comfyui_world")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self._log = open(folder / "log", "w")  # noqa: SIM115  # until the process ends
        self._process = subprocess.Popen(
            [
                os.environ.get("COMFYUI_PYTHON", sys.executable),
                Path(os.environ["COMFYUI"]) / "main.py",
                *("--cpu", "--port", str(port), "--base-directory", folder, "--database-url", "sqlite:///:memory:"),
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        for _ in range(240):
            try:
                self.object_info = self.get("/object_info")
                return
            except OSError:
                if self._process.poll() is not None:
                    break
                time.sleep(0.5)
        self.close()
        raise RuntimeError((folder / "log").read_text()[-4000:])

    def get(self, path: str, data: dict | None = None):
        request = urllib.request.Request(self.address + path, json.dumps(data).encode() if data else None)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    def run(self, workflow: dict) -> list[np.ndarray]:
        """The pictures of a workflow, or ValueError with the error of the node that fails."""
        prompt_id = self.get("/prompt", {"prompt": workflow})["prompt_id"]
        for _ in range(240):
            if history := self.get(f"/history/{prompt_id}").get(prompt_id):
                break
            time.sleep(0.25)
        for name, message in history["status"]["messages"]:
            if name == "execution_error":
                raise ValueError(f"{message['node_type']}: {message['exception_message']}")
        images = [image for output in history["outputs"].values() for image in output.get("images", ())]
        return [np.asarray(Image.open(self.folder / "output" / image["filename"])) / 255 for image in images]

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._log.close()


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory, policy):
    if "COMFYUI" not in os.environ:
        pytest.skip("COMFYUI names no folder of ComfyUI")
    folder = tmp_path_factory.mktemp("comfyui")
    policy.save_pretrained(folder / "models" / "noise_policies" / "mine")
    server = ComfyUI(folder)
    yield server
    server.close()


def workflow(count=2, height=8, width=8, seed=7, policy="mine", noise_node=None) -> dict:
    learned = {"policy": ["1", 0], "conditioning": ["2", 0], "noise_seed": seed, "steps": 2, "candidates": 0}
    nodes = {
        "1": ("NoisePolicyLoad", {"policy": policy}),
        "2": ("EmbeddedEncode", {"text": PROMPT}),
        "3": noise_node or ("NoisePolicyLearnedNoise", learned),
        "4": ("EmbeddedModel", {}),
        "5": ("BasicGuider", {"model": ["4", 0], "conditioning": ["2", 0]}),
        "6": ("KSamplerSelect", {"sampler_name": "euler"}),
        "7": ("BasicScheduler", {"model": ["4", 0], "scheduler": "sgm_uniform", "steps": 2, "denoise": 1.0}),
        "8": ("EmbeddedLatents", {"count": count, "height": height, "width": width}),
        "9": (
            "SamplerCustomAdvanced",
            {
                "noise": ["3", 0],
                "guider": ["5", 0],
                "sampler": ["6", 0],
                "sigmas": ["7", 0],
                "latent_image": ["8", 0],
            },
        ),
        "10": ("EmbeddedDecode", {"samples": ["9", 0]}),
        "11": ("SaveImage", {"images": ["10", 0], "filename_prefix": "picture"}),
    }
    return {number: {"class_type": kind, "inputs": inputs} for number, (kind, inputs) in nodes.items()}


@pytest.mark.slow
def test_comfyui_makes_the_pictures_of_the_pipeline(comfyui, policy, pipeline):
    made = comfyui.run(workflow())
    latents = policy.latents(pipeline, [PROMPT] * 2, seed=7, num_inference_steps=2)
    settings = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "np"}
    expected = pipeline([PROMPT] * 2, latents=latents, **settings).images
    # Its second step is at another time by half of one of a thousand.
    np.testing.assert_allclose(np.stack(made), expected, rtol=0, atol=0.03)
    random = comfyui.run(workflow(noise_node=("RandomNoise", {"noise_seed": 7})))
    assert np.abs(np.stack(random) - expected).max() > 0.2


@pytest.mark.slow
def test_batches_seeds_and_sizes_in_comfyui(comfyui):
    nodes = workflow(count=3)
    nodes["12"] = {"class_type": "LatentFromBatch", "inputs": {"samples": ["8", 0], "batch_index": 2, "length": 1}}
    whole = comfyui.run(nodes)
    nodes["9"]["inputs"]["latent_image"] = ["12", 0]
    [alone] = comfyui.run(nodes)
    np.testing.assert_allclose(alone, whole[2], rtol=0, atol=2 / 255)
    [wide] = comfyui.run(workflow(count=1, height=12, width=16, seed=8))
    assert wide.shape == (96, 128, 3)


@pytest.mark.slow
def test_errors_name_what_to_change_in_comfyui(comfyui):
    with pytest.raises(ValueError, match="NoisePolicyLoad: policy is empty"):
        comfyui.run(workflow(policy=""))


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((NODES / "example_workflows").glob("*.json")), ids=lambda path: path.stem)
def test_example_workflows_fit_comfyui(comfyui, path):
    """Every node is there, and every link and widget is what the node of the real ComfyUI declares."""
    graph = json.loads(path.read_text("utf-8"))
    nodes = {node["id"]: node for node in graph["nodes"]}
    links = {number: link for number, *link in graph["links"]}
    kinds = {node["type"] for node in graph["nodes"]}
    assert {"NoisePolicyLoad", "NoisePolicyLearnedNoise", "SamplerCustomAdvanced"} <= kinds
    for source, slot, target, place, kind in links.values():
        assert nodes[source]["outputs"][slot]["type"] == kind == nodes[target]["inputs"][place]["type"]
    for node in graph["nodes"]:
        info = comfyui.object_info[node["type"]]
        declared = info["input"].get("required", {}) | info["input"].get("optional", {})
        assert [output["type"] for output in node["outputs"]] == info["output"]
        for entry in node["inputs"]:
            assert declared[entry["name"]][0] == entry["type"] and links[entry["link"]][2] == node["id"]
        linked = {entry["name"] for entry in node["inputs"]}
        widgets = [name for name in info["input"].get("required", {}) if name not in linked]
        extra = sum(
            "control_after_generate" in (declared[name][1] if len(declared[name]) > 1 else {}) for name in widgets
        )
        assert len(node["widgets_values"]) == len(widgets) + extra, node["type"]
