"""Policy folders that somebody else wrote: one line says what is wrong, and no memory is given to a lie."""

import json
import resource
import shutil
import struct
from pathlib import Path

import pytest
import torch

from noisepolicy.policies import NoisePolicy, SpectralPolicy, TablePolicy
from noisepolicy.policies.critic import CriticShape, RewardCritic
from noisepolicy.storage import read_tensors, write_tensors

CONFIG, WEIGHTS = "config.json", "policy.safetensors"
_ROOM = 4 * 2**30
"""Address space that a refusal may take beyond what the process has; the claims below are larger."""


@pytest.fixture
def little_memory():
    """A limit of the process that a claimed size would break, should it be believed."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + _ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def folder(tmp_path):
    policy = SpectralPolicy(latent_shape=(4, 8, 8), prompt_shape=(2, 3), bands=2, hidden_width=8)
    shape = CriticShape((2, 3), policy.action_shape, True, (1, 2))
    policy.attach_critic(RewardCritic(shape, size=2, channels=8, hidden_width=8), 2)
    policy.save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


def changed(folder, change):
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def refusal(folder) -> str:
    with pytest.raises(ValueError, match="does not hold a noise policy") as raised:
        NoisePolicy.from_pretrained(folder)
    message = str(raised.value)
    assert "\n" not in message and len(message) < 1000
    return message


def in_critic(**values):
    return lambda config: config["critic"].update(values)


def in_shape(**values):
    return lambda config: config["critic"]["shape"].update(values)


CONFIGS = {
    "wide": (lambda c: c.update(hidden_width=10**9), "its config says .* is of shape"),
    "wider": (lambda c: c.update(hidden_width=10**30), "hidden_width must be a size"),
    "overflow": (lambda c: c.update(hidden_width=2**31 - 1, token_width=2**31 - 1), "does not hold"),
    "large latents": (
        lambda c: c.update(latent_shape=[4, 2**20, 2**20]),
        "latent_shape .* more than 268435456",
    ),
    "negative": (lambda c: c.update(latent_shape=[4, -8, 8]), "latent_shape must be a list of sizes"),
    "fraction": (lambda c: c.update(bands=2.5), "bands must be a size, got 2.5"),
    "boolean": (lambda c: c.update(bands=True), "bands must be a size, got True"),
    "text": (lambda c: c.update(prompt_shape="ab"), "prompt_shape must be a list of 2 sizes"),
    "three": (lambda c: c.update(prompt_shape=[1, 2, 3]), "prompt_shape must be a list of 2 sizes"),
    "std": (lambda c: c.update(std="__import__('os')"), "std must be one of power, one, learned"),
    "unknown key": (lambda c: c.update(torch_dtype="float16"), "unknown setting 'torch_dtype'"),
    "self": (lambda c: c.update(self=1), "unknown setting 'self'"),
    "missing key": (lambda c: c.pop("latent_shape"), "latent_shape"),
    "class": (lambda c: c.update(kind="os.system"), "unknown policy 'os.system'"),
    "no class": (lambda c: c.update(kind=["spectral"]), "unknown policy"),
    "dunder": (lambda c: c.update(kind="__class__"), "unknown policy"),
    "candidates": (lambda c: c.update(num_candidates=10**9), "num_candidates must be from 1 to 65536"),
    "no candidates": (lambda c: c.update(num_candidates=0), "num_candidates must be from 1"),
    "critic of text": (lambda c: c.update(critic="x"), "critic must be an object"),
    "many readers": (in_critic(size=10**9), "1000000000 readers"),
    "wide critic": (in_critic(channels=10**6), "its config says .* is of shape"),
    "odd critic": (in_critic(pickle="x"), "critic has an unknown setting 'pickle'"),
    "no shape": (lambda c: c["critic"].pop("shape"), "does not hold"),
    "another action": (in_shape(action_shape=[4, 2, 3]), "another shape of prompts or actions"),
    "huge action": (in_shape(action_shape=[4, 2**20, 2**20]), "action_shape"),
    "no steps": (in_shape(step_counts=[]), "step_counts must be a list of sizes"),
    "zero steps": (in_shape(step_counts=[0]), "step_counts must be a list of sizes"),
    "many steps": (in_shape(step_counts=[1] * 1000), "its config says .* is of shape"),
    "not spectral": (in_shape(is_spectral=1), "is_spectral must be true or false"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_lie(name, folder, little_memory):
    change, reason = CONFIGS[name]
    changed(folder, change)
    with pytest.raises(ValueError, match=reason):
        NoisePolicy.from_pretrained(folder)
    refusal(folder)


TEXTS = {
    "empty": b"",
    "list": b"[1]",
    "binary": b"\xff\xfe\x00",
    "deep": b'{"a":' * 100_000,
    "deep list": b"[" * 100_000,
    "long number": b'{"kind": "spectral", "bands": ' + b"9" * 10_000 + b"}",
    "null": b"null",
}


@pytest.mark.parametrize("name", TEXTS)
def test_configs_that_are_none(name, folder):
    (folder / CONFIG).write_bytes(TEXTS[name])
    refusal(folder)


def test_a_config_of_any_length_is_not_read(folder):
    with open(folder / CONFIG, "wb") as file:
        file.truncate(2**40)  # a hole: a terabyte that takes no room
    assert "more than 16777216 bytes" in refusal(folder)


def safetensors_file(path: Path, header: bytes | dict, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


HEADERS = {
    "2^60 elements": {"a": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]}},
    "overflow": {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}},
    "product of 2^64": {"a": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]}},
    "negative": {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
    "beyond the end": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
    "backwards": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
    "overlap": {
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    },
    "no such type": {"a": {"dtype": "PICKLE", "shape": [1], "data_offsets": [0, 4]}},
    "deep": b'{"a":' * 100_000,
    "not json": b"\x80\x04\x95cos\nsystem\n",
    "list": b"[]",
}


@pytest.mark.parametrize("name", HEADERS)
def test_safetensors_headers_that_lie(name, folder, little_memory):
    safetensors_file(folder / WEIGHTS, HEADERS[name], b"\0" * 4)
    with pytest.raises(ValueError, match="safetensors"):
        read_tensors(folder / WEIGHTS)
    refusal(folder)


def test_a_header_longer_than_the_file(folder, little_memory):
    for length in (2**20, 2**40, 2**64 - 1):
        safetensors_file(folder / WEIGHTS, b"{}", length=length)
        refusal(folder)


def test_weights_of_another_type_or_name(folder):
    tensors = read_tensors(folder / WEIGHTS)
    write_tensors(folder / WEIGHTS, {**tensors, "scale": torch.ones((), dtype=torch.int64)})
    assert "expected floating point" in refusal(folder)
    write_tensors(folder / WEIGHTS, {**tensors, "hook": torch.ones(())})
    assert "unknown 'hook'" in refusal(folder)
    write_tensors(folder / WEIGHTS, {name: value for name, value in tensors.items() if name != "scale"})
    assert "no scale" in refusal(folder)


def test_links_that_lead_out(folder, tmp_path):
    outside = tmp_path / "outside"
    shutil.copytree(folder, outside)
    for name in (CONFIG, WEIGHTS):
        shutil.rmtree(folder)
        shutil.copytree(outside, folder)
        (folder / name).unlink()
        (folder / name).symlink_to(Path("..") / "outside" / name)
        assert "leads out" in refusal(folder)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/dev/zero")  # read whole, it would never end
    assert "leads out" in refusal(folder)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(WEIGHTS)
    with pytest.raises((ValueError, OSError)):
        NoisePolicy.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    assert "is not a file" in refusal(folder)


def test_links_of_the_hubs_cache_are_followed(folder, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "123"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in (CONFIG, WEIGHTS):
        shutil.move(folder / name, blobs / name[:3])
        (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / name[:3])
    assert NoisePolicy.from_pretrained(snapshot).kind == "spectral"


def test_a_policy_in_half_precision_is_read(folder):
    path = folder / "policy.safetensors"
    write_tensors(path, {name: tensor.half() for name, tensor in read_tensors(path).items()})
    assert NoisePolicy.from_pretrained(folder).scale.dtype == torch.float32


def test_a_table_of_many_prompts_is_refused_without_its_rows(tmp_path, little_memory):
    TablePolicy(latent_shape=(4, 64, 64), prompt_shape=(2, 3), prompts=["a"]).save_pretrained(tmp_path)
    changed(tmp_path, lambda config: config.update(prompts=["a"] * 1_000_000))
    assert "is of shape (1000000, " in refusal(tmp_path)
    changed(tmp_path, lambda config: config.update(prompts=["a", 5]))
    assert "prompts must be a list of texts" in refusal(tmp_path)
