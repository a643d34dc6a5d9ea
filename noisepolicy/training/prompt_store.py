"""Embeddings of the prompts a run has met: each computed once, when a batch first asks for it, and kept on disk.

A list of a hundred thousand prompts costs no more at the start than one of a hundred, and memory does not grow with the
embeddings of those met. A resumed run reads them in RUN/prompts: rounding depends on the batch in which prompts are
encoded.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from noisepolicy.frozen import FrozenModel, PromptEmbeds
from noisepolicy.policies.precision import plain_arithmetic
from noisepolicy.training.row_file import RowFile


class PromptStore:
    """Rows of embeddings, in the order in which their prompts were met.

    Args:
        frozen: The frozen model, which encodes prompts.
        prompts: All prompts of the run.
        device: Device of selected rows.
    """

    def __init__(self, frozen: FrozenModel, prompts: Sequence[str], device: torch.device) -> None:
        self._frozen, self._prompts, self._device = frozen, prompts, device
        self._row_of: dict[int, int] = {}
        self._no_rows: PromptEmbeds | None = None
        """Empty tensors with the types and shapes of rows, once there is a row."""
        self._rows: RowFile | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape `(tokens, width)` of a prompt's embeddings, known once a prompt was met."""
        return tuple(self._no_rows.prompt_embeds.shape[1:])

    def __len__(self) -> int:
        """Return the number of prompts met so far."""
        return len(self._row_of)

    def add(self, prompt_index: Iterable[int]) -> torch.Tensor:
        """Encode the prompts that were not met yet, together; return each index's row, int64."""
        index = list(prompt_index)
        if new := [i for i in dict.fromkeys(index) if i not in self._row_of]:
            with plain_arithmetic():
                embeds = self._frozen.encode([str(self._prompts[i]) for i in new]).to(torch.device("cpu"))
            if self._rows is None:
                self._no_rows = embeds[:0]
                self._rows = self._file(None)
            columns = {name: _as_bytes(tensor) for name, tensor in embeds.tensors().items()}
            self._rows.append(len(new), {"prompt": np.array(new), **columns})
            self._row_of |= {i: len(self) + number for number, i in enumerate(new)}
        return torch.tensor([self._row_of[i] for i in index])

    def __getitem__(self, rows: torch.Tensor) -> PromptEmbeds:
        """Return embeddings of some rows, `(len(rows), ...)`, on the store's device."""
        table = self._rows.read(rows.tolist())
        return PromptEmbeds(
            **{
                name: torch.from_numpy(table[name].copy()).view(like.dtype).view(len(rows), *like.shape[1:])
                for name, like in self._no_rows.tensors().items()
            }
        ).to(self._device)

    def keep(self, folder: Path) -> None:
        """Keep the rows in `folder`, RUN/prompts, from now on; in the main process only."""
        if self._rows.folder is None:
            kept = self._file(folder)
            kept.copy_from(self._rows)
            self._rows = kept

    def state(self) -> dict[str, int]:
        """Flush the rows to disk and return the state for a checkpoint."""
        return self._rows.state()

    def load_state(self, state: Mapping[str, int], folder: Path, *, is_main: bool) -> None:
        """Go back to a checkpoint's rows in `folder`, and forget later ones.

        Raises:
            DamagedFileError: if a row is missing or not as it was written; the store is unchanged then.
        """
        rows = self._file(folder if is_main else None)
        rows.load_state(state, folder)
        self._rows = rows
        self._row_of = {int(i): row for row, i in enumerate(rows.column("prompt"))}

    def _file(self, folder: Path | None) -> RowFile:
        columns = [(name, "u1", (_width(tensor),)) for name, tensor in self._no_rows.tensors().items()]
        return RowFile(folder, [("prompt", "<i8", ()), *columns])


def _width(tensor: torch.Tensor) -> int:
    """Return the bytes of a row."""
    return tensor[:1].new_empty(1, *tensor.shape[1:]).nbytes


def _as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """View rows as `(rows, bytes)`."""
    return tensor.detach().contiguous().flatten(1).view(torch.uint8).numpy()
