"""Prompts are encoded when they are first met, and once."""

import torch

from noisepolicy.frozen import PromptEmbeds
from noisepolicy.training.prompt_store import PromptStore


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
    assert embeds.pooled_prompt_embeds[:, 0].tolist() == [4, 1, 4] and embeds.prompt_attention_mask is None


def test_a_long_list_costs_nothing_at_the_start():
    frozen = CountingModel()
    store = PromptStore(frozen, [f"prompt {number}" for number in range(100_000)], torch.device("cpu"))
    store.add([99_999])
    assert frozen.asked == [["prompt 99999"]]
