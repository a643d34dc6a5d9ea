"""Tiny checkpoints of the real classes, saved to disk, and a reward server in a process of its own."""

import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, CLIPConfig, CLIPModel

from noisepolicy.worlds.shapes.tokenizer import MAX_TOKENS, build_tokenizer

from ..commands import Forked

PROCESSOR_JSON = """{
  "image_processor_type": "CLIPImageProcessor", "do_resize": true, "size": {"shortest_edge": 32}, "resample": 3,
  "do_center_crop": true, "crop_size": {"height": 32, "width": 32}, "do_rescale": true, "do_normalize": true,
  "rescale_factor": 0.00392156862745098, "do_convert_rgb": true,
  "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]
}"""


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIPModel with its tokenizer and image processor, as `save_pretrained` writes them."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = build_tokenizer(folder)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        projection_dim=16,
        text_config={
            **sizes,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": MAX_TOKENS,
            "projection_dim": 16,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**sizes, "image_size": 32, "patch_size": 16, "projection_dim": 16},
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(PROCESSOR_JSON)
    AutoImageProcessor.from_pretrained(folder)  # the oracle must be able to read it too
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A command that listens at a port, in a process of its own; started again at the same port by `start`."""

    def __init__(self, start: Callable[[], Forked | subprocess.Popen], port: int, folder: Path) -> None:
        """`start` makes the process, which writes to `folder`/stderr."""
        self.port = port
        self.address = f"http://127.0.0.1:{port}"
        self.log = folder / "stderr"
        self._start = start

    def start(self) -> None:
        self._process = self._start()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(self.log.read_text())
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise RuntimeError("the server did not start")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def serve(commands, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory):
    """`serve(reward, *flags, token=None)` starts noisepolicy-reward-server; `serve(command=...)` another command."""
    servers = []

    def start(reward: str = "brightness", *flags: str, token: str | None = None, command=None) -> Server:
        port, output = free_port(), tmp_path_factory.mktemp("server")
        environment = {name: value for name, value in os.environ.items() if name != "NOISEPOLICY_REWARD_TOKEN"}
        if token is not None:
            environment["NOISEPOLICY_REWARD_TOKEN"] = token

        def start_ours() -> Forked:
            arguments = ["--reward", reward, "--port", port, *flags]
            return commands.start("reward_server", arguments, tmp_path, output, environment=environment)

        def start_other() -> subprocess.Popen:
            with (output / "stderr").open("ab") as log:
                return subprocess.Popen([*command, str(port)], stdout=log, stderr=log, cwd=tmp_path, env=environment)

        server = Server(start_other if command else start_ours, port, output)
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.kill()
