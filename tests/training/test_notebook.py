"""A run in a notebook: its curves renew themselves below the cell, its progress is a widget, Ctrl-C keeps the run."""

import base64
import re

import pytest

MODEL = """
import os
import signal

import torch

import noisepolicy
from noisepolicy.training import notebook

notebook._LEAST_SECONDS, notebook._PAUSE = 0, 0


class Throws:
    latent_shape = (2, 4, 4)

    def encode(self, prompts):
        return torch.tensor([[[float("left" in prompt), len(prompt) / 20]] for prompt in prompts])

    def generate(self, latents, prompt_embeds, *, num_inference_steps, guidance_scale):
        x = latents.mean((1, 2, 3)) + prompt_embeds.prompt_embeds[:, 0, 0]
        return torch.sigmoid(torch.linspace(-2, 2, 16) - x[:, None]).expand(16, 3, -1, -1).permute(2, 1, 0, 3)


calls, interrupt_at = 0, None


def dark(images, prompts):
    global calls
    calls += 1
    if calls == interrupt_at:
        os.kill(os.getpid(), signal.SIGINT)  # as the notebook's button does
    return 1 - images.mean((1, 2, 3))


settings = {"num_iterations": 4, "batch_size": 16, "critic_warmup": 16, "critic_updates": 2, "eval_num_prompts": 0}
run = noisepolicy.Run(Throws(), reward=dark, prompts=["left", "calm"], output_dir="run", **settings)
"""
STOPPED = """
interrupt_at = calls + 2
try:
    run.train()
except KeyboardInterrupt as error:
    print(error)
"""
RESUMED = """
for metrics in noisepolicy.resume("run", model=Throws(), reward=dark):
    print("iteration", metrics["iteration"])
"""


def test_a_run_in_a_notebook(tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="the extra docs brings it")
    nbformat = pytest.importorskip("nbformat", reason="the extra docs brings it")
    pytest.importorskip("ipykernel", reason="the extra docs brings it")
    updates = []

    class Client(nbclient.NotebookClient):
        def process_message(self, message, cell, index):
            if message["msg_type"] == "update_display_data" and "svg+xml" in str(message["content"]["data"]):
                updates.append(index)
            return super().process_message(message, cell, index)

    cells = [nbformat.v4.new_code_cell(source) for source in (MODEL, STOPPED, RESUMED, "run")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    where = {"metadata": {"path": str(tmp_path)}}
    Client(notebook, kernel_name="python3", timeout=300, resources=where).execute()
    stopped, resumed = (
        "".join(str(output.get("text", "")) for output in cell.outputs if output.output_type == "stream")
        for cell in notebook.cells[1:3]
    )
    stopped_after = int(re.search(r"stopped after iteration (\d); go on with noisepolicy.resume", stopped)[1])
    assert re.findall(r"iteration (\d)\n", resumed) == [str(number) for number in range(stopped_after + 1, 5)]
    for cell in notebook.cells[1:3]:
        [curves] = [output.data["text/html"] for output in cell.outputs if "svg+xml" in str(output.get("data", ""))]
        assert b"reward in training" in base64.b64decode(curves.split("base64,")[1].split('"')[0])
    assert updates.count(1) == stopped_after - 1 and updates.count(2) == 3 - stopped_after
    assert "of 4 iterations" in notebook.cells[3].outputs[0].data["text/html"]
