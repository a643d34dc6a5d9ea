"""Coverage-guided fuzzing of what reads others' files and messages: `python fuzz_parsers.py SECONDS [TARGET...]`.

Each target is a function of bytes; only ValueError, or what a docstring promises, may come out. Needs atheris.
"""

import base64
import contextlib
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["noisepolicy", "yaml"]):
    import noisepolicy.rewards.registry
    import noisepolicy.rewards.wire
    import noisepolicy.training.run
    import noisepolicy.worlds.moving_shapes.captions
    import noisepolicy.worlds.shapes.captions
    import noisepolicy.worlds.turbo.captions
    from noisepolicy.policies import NoisePolicy, SpectralPolicy
    from noisepolicy.storage import read_tensors, write_tensors
    from noisepolicy.training.checkpoint import whole_checkpoints
    from noisepolicy.training.config import load_config
    from noisepolicy.training.prompt_list import PromptList

STOPPED: dict[str, Any] = {}
FOLDER = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
PNG = b"iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"


def policy_config(data: bytes) -> None:
    (FOLDER / "policy" / "config.json").write_bytes(data)
    NoisePolicy.from_pretrained(FOLDER / "policy")


def policy_weights(data: bytes) -> None:
    (FOLDER / "weights" / "policy.safetensors").write_bytes(data)
    NoisePolicy.from_pretrained(FOLDER / "weights")


def safetensors(data: bytes) -> None:
    """The bytes are the header's; the file tells its length."""
    path = FOLDER / "a.safetensors"
    path.write_bytes(len(data).to_bytes(8, "little") + data + bytes(64))
    read_tensors(path)


def make_stopped_run() -> None:
    """A run with one checkpoint."""
    from test_in_one_process import make_trainer

    trainer = make_trainer(FOLDER / "run", num_iterations=2)
    list(trainer)
    STOPPED.update(trainer=trainer, checkpoint=next(whole_checkpoints(trainer._folder.checkpoints)))


def checkpoint_progress(data: bytes) -> None:
    """The bytes are the JSON in a checkpoint whose digest is right."""
    checkpoint = STOPPED["checkpoint"]
    write_tensors(checkpoint.path, checkpoint.tensors, {"progress": data.decode("utf-8", "replace")})
    STOPPED["trainer"].go_back()


def config_yaml(data: bytes) -> None:
    path = FOLDER / "config.yaml"
    path.write_bytes(data)
    load_config(path).check()


def prompt_file(data: bytes) -> None:
    """The first byte chooses the suffix."""
    suffixes = ("txt", "jsonl", "json", "csv", "tsv")
    path = FOLDER / f"prompts.{suffixes[data[0] % len(suffixes) if data else 0]}"
    path.write_bytes(data[1:])
    prompts = PromptList([str(path)])
    assert prompts and all(prompt.strip() for prompt in prompts)
    assert path.suffix != ".txt" or not any(prompt.startswith('{"') for prompt in prompts)


def captions(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    worlds = noisepolicy.worlds
    for world in (worlds.shapes.captions, worlds.moving_shapes.captions, worlds.turbo.captions):
        with contextlib.suppress(ValueError):
            assert world.parse_caption(text).caption == text.strip().lower()


def reward_spec(data: bytes) -> None:
    """Parsed, not loaded: loading imports what `module:function` names."""
    parts = noisepolicy.rewards.registry.outside_parts(data.decode("utf-8", "surrogateescape"))
    assert all(":" in part or "://" not in part for part in parts)


def request_body(data: bytes) -> None:
    request = noisepolicy.rewards.wire.decode_request(data)
    assert len(request.images) == len(request.prompts)


def request_png(data: bytes) -> None:
    """The bytes are a picture's."""
    picture = base64.b64encode(data).decode()
    request = noisepolicy.rewards.wire.decode_request(json.dumps({"prompts": ["a"], "images": [picture]}).encode())
    assert request.images.shape[:2] == (1, 3)


def answer_body(data: bytes) -> None:
    noisepolicy.rewards.wire.decode_answer(data, 1)


TARGETS: dict[str, tuple[Callable[[bytes], None], list[bytes]]] = {
    "policy_config": (policy_config, []),  # their seeds are a real policy's files
    "policy_weights": (policy_weights, []),
    "safetensors": (
        safetensors,
        [
            b'{"a":{"dtype":"F32","shape":[4,4],"data_offsets":[0,64]},"__metadata__":{"progress":"{}"}}',
            b'{"a":{"dtype":"I64","shape":[1152921504606846976],"data_offsets":[0,64]}}',
            b'{"a":{"dtype":"F8_E4M3","shape":[64],"data_offsets":[0,64]}}',
        ],
    ),
    "checkpoint_progress": (checkpoint_progress, []),  # its seed is a real checkpoint's
    "config_yaml": (
        config_yaml,
        [
            b"model: shapes\nbands: 4\nnum_inference_steps: [1, 2]\nkl_budget: .inf\nprompts: [a, 'b']\n",
            b"seed: &a 1\nbands: *a\n<<: {}\nx: !!python/object:os.system {}\nd: 2001-01-01\n",
            b"? [a]\n: !!binary aaaa\n--- {a: 0x1, b: 1:30, c: !!set {}, d: !!timestamp 1}\n",
        ],
    ),
    "prompt_file": (
        prompt_file,
        [
            b"\x00a red cube\n\n  a dog\r\n",
            b"\x00" + "überall\x85 \u2028".encode(),
            b"\x00\xff\xfea\0",
            b'\x01{"prompt": "a cat", "n": [1]}\n"a dog"\n',
            b'\x02[{"prompt": "a cat"}, "a dog"]',
            b'\x02{"data": ["a cat"], "n": {}}',
            b'\x03n,Prompts\r\n1,"a ""cat"",\nred"\n2,a dog\n',
            b"\x04n\tcaption\n1\ta cat\n",
        ],
    ),
    "captions": (
        captions,
        [
            b"a red circle, a blue square and a green triangle from left to right",
            b"a red circle moving left and a blue square moving up",
        ],
    ),
    "reward_spec": (
        reward_spec,
        [
            b"0.7*red + 0.3*frames(cached(pickscore(a/b,c)))",
            b"raw(http://127.0.0.1:80/%2B) + 1e3*mod.ule:f",
            b"http://[",
        ],
    ),
    "request_body": (
        request_body,
        [
            b'{"prompts": ["a"], "images": ["' + PNG + b'"]}',
            b'{"prompts": ["a"], "images": [["' + PNG + b'"]]}',
            b'{"prompts": ["a"], "encoding": "float32", "shape": [1, 3, 1, 1], "images": "AACAPwAAAAAAAAAA"}',
        ],
    ),
    "request_png": (request_png, [base64.b64decode(PNG)]),
    "answer_body": (answer_body, [b'{"rewards": [1.5], "metrics": {"strict": [1]}}', b'{"rewards": [1e400]}']),
}


def fuzz(name: str, seconds: int) -> None:
    """Ends the process: with 0, or with what libFuzzer says of an input that it prints."""
    function, seeds = TARGETS[name]
    if name.startswith("policy"):
        policy = SpectralPolicy(latent_shape=(2, 4, 4), prompt_shape=(2, 3), bands=2, token_width=2, hidden_width=4)
        for folder in ("policy", "weights"):
            policy.save_pretrained(FOLDER / folder)
        seeds = [(FOLDER / "policy" / file).read_bytes() for file in ("config.json", "policy.safetensors")]
    if name == "checkpoint_progress":
        warnings.simplefilter("ignore")  # each damaged checkpoint is warned of
        make_stopped_run()
        seeds = [json.dumps(STOPPED["checkpoint"].progress).encode()]
    corpus = FOLDER / f"corpus_{name}"
    corpus.mkdir()
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)

    def run(data: bytes) -> None:
        with contextlib.suppress(ValueError):
            function(data)

    options = [f"-max_total_time={seconds}", "-timeout=60", "-rss_limit_mb=3000", "-max_len=4096"]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={name}_", str(corpus)], run)
    atheris.Fuzz()


def main() -> int:
    """Each target in a process of its own; importing torch once."""
    seconds, *names = sys.argv[1:]
    status = 0
    for name in names or TARGETS:
        print(f"{name}:", file=sys.stderr, flush=True)
        child = os.fork()
        if child == 0:
            fuzz(name, int(seconds))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(f"{name} ended with {code}", flush=True)
        status = status or abs(code)
    shutil.rmtree(FOLDER)
    return status


if __name__ == "__main__":
    sys.exit(main())
