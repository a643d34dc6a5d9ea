"""Embeddings of the prompts a run has met: each computed once, when a batch first asks for it.

A list of a hundred thousand prompts costs no more at the start than one of a hundred.
"""

from collections.abc import Iterable, Sequence

import torch

from noisepolicy.frozen import FrozenModel, PromptEmbeds


class PromptStore:
    """Rows of embeddings, in the order in which their prompts were met.

    They lie in the host's memory: thousands of prompts of a large text encoder would fill an accelerator.

    Args:
        frozen: encodes.
        prompts: all of them.
        device: where a selection goes.
    """

    def __init__(self, frozen: FrozenModel, prompts: Sequence[str], device: torch.device) -> None:
        self._frozen, self._prompts, self._device = frozen, prompts, device
        self._row_of: dict[int, int] = {}
        self._rows: list[PromptEmbeds] = []

    def __len__(self) -> int:
        """Prompts met so far."""
        return len(self._rows)

    def add(self, prompt_index: Iterable[int]) -> torch.Tensor:
        """Encodes those not met yet, together; returns each index's row, int64."""
        index = list(prompt_index)
        if new := [i for i in dict.fromkeys(index) if i not in self._row_of]:
            embeds = self._frozen.encode([self._prompts[i] for i in new]).to(torch.device("cpu"))
            for number, i in enumerate(new):
                self._row_of[i] = len(self._rows)
                self._rows.append(embeds[number : number + 1])
        return torch.tensor([self._row_of[i] for i in index])

    def __getitem__(self, rows: torch.Tensor) -> PromptEmbeds:
        """`(len(rows), ...)` embeddings on the store's device."""
        return PromptEmbeds.cat([self._rows[row] for row in rows.tolist()]).to(self._device)
