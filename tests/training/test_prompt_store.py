"""Prompts are encoded when they are first met, and once."""

import pytest
import torch

from noisepolicy.frozen import PromptEmbeds
from noisepolicy.storage import DamagedFileError
from noisepolicy.training.rows import PromptStore


class CountingModel:
    """Encodes a prompt as its length, and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def encode(self, prompts):
        self.asked.append(list(prompts))
        lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
        return PromptEmbeds(lengths[:, None, None].expand(-1, 2, 3), pooled_prompt_embeds=lengths[:, None])


def test_each_prompt_is_encoded_once_when_it_is_met():
    frozen = CountingModel()
    store = PromptStore(frozen, ["a", "bb", "ccc", "dddd"], torch.device("cpu"))
    assert frozen.asked == [] and len(store) == 0
    assert store.add([2, 0, 2]).tolist() == [0, 1, 0]
    assert store.add([0, 3]).tolist() == [1, 2]
    assert frozen.asked == [["ccc", "a"], ["dddd"]] and len(store) == 3
    embeds = store[torch.tensor([2, 1, 2])]
    assert embeds.prompt_embeds[:, 0, 0].tolist() == [4, 1, 4] and embeds.prompt_embeds.shape == (3, 2, 3)
    assert embeds.pooled_prompt_embeds[:, 0].tolist() == [4, 1, 4] and not embeds.others


def test_a_long_list_costs_nothing_at_the_start():
    frozen = CountingModel()
    store = PromptStore(frozen, [f"prompt {number}" for number in range(100_000)], torch.device("cpu"))
    store.add([99_999])
    assert frozen.asked == [["prompt 99999"]]


class TypedModel:
    """Embeddings of every type that models have."""

    def encode(self, prompts):
        values = torch.tensor([float(len(prompt)) / 3 for prompt in prompts])
        return PromptEmbeds(
            values[:, None, None].expand(-1, 2, 3).bfloat16(),
            values[:, None].half(),
            {"mask": torch.ones(len(prompts), 2).long()},
        )


def test_rows_come_back_to_the_bit_with_nothing_encoded(tmp_path):
    prompts = ["a", "bb", "ccc", "dddd"]
    store = PromptStore(TypedModel(), prompts, torch.device("cpu"))
    store.add([2])
    store.keep(tmp_path)
    store.add([1, 3])
    state, expected = store.state(), store[torch.tensor([2, 0, 1])].tensors()
    store.add([0])  # beyond the checkpoint
    for is_main in (False, True):
        resumed = PromptStore(TypedModel(), prompts, torch.device("cpu"))
        resumed.add([2])
        resumed.load_state(state, tmp_path, is_main=is_main)
        resumed._frozen = None
        assert resumed.add([3, 2, 1]).tolist() == [2, 0, 1] and len(resumed) == 3
        ours = resumed[torch.tensor([2, 0, 1])].tensors()
        assert all(torch.equal(ours[name], expected[name]) for name in expected)
        assert [tensor.dtype for tensor in ours.values()] == [torch.bfloat16, torch.float16, torch.int64]
        assert all(len(tensor) == 1 for tensor in resumed[torch.tensor([1])].tensors().values())
        assert resumed.state() == state


def test_damaged_rows_are_not_taken(tmp_path):
    store = PromptStore(TypedModel(), ["a", "bb"], torch.device("cpu"))
    store.add([0, 1])
    store.keep(tmp_path)
    data = bytearray((tmp_path / "rows.bin").read_bytes())
    data[9] ^= 1
    (tmp_path / "rows.bin").write_bytes(data)
    other = PromptStore(TypedModel(), ["a", "bb"], torch.device("cpu"))
    other.add([1])
    with pytest.raises(DamagedFileError, match=r"row 0 of .*rows.bin is damaged"):
        other.load_state(store.state(), tmp_path, is_main=True)
    assert len(other) == 1 and other.add([1]).tolist() == [0]
    with pytest.raises(DamagedFileError, match=r"row 0 of"):
        store[torch.tensor([0])]
