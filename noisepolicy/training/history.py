"""Every image made so far, as the critic sees it: prompt, step count, action, a small picture and the reward.

RUN/history is a `RowFile`: neither memory nor the cost of a checkpoint grows with its rows. A prompt is its row in the
run's `PromptStore`.
"""

from pathlib import Path

import numpy as np
import torch

from noisepolicy.training.row_file import RowFile


class History:
    """The rows that a critic is trained on.

    Args:
        folder: RUN/history; None for a process that is not the main one.
        action_shape: Shape of one action, float32.
        picture_shape: Shape of one small picture, kept as float16.
        num_parts: Number of parts of the reward. They are kept as float64 before they are weighted, since the scale
            that brings them to one unit changes during a run.
        device: Device of drawn rows, except for the prompts' row numbers, which stay on the CPU.
    """

    def __init__(
        self,
        folder: Path | None,
        action_shape: tuple[int, ...],
        picture_shape: tuple[int, ...],
        num_parts: int,
        device: torch.device,
    ) -> None:
        self._device = device
        self._rows = RowFile(
            folder,
            [
                ("prompt_row", "<i8", ()),
                ("step_index", "<i8", ()),
                ("parts", "<f8", (num_parts,)),
                ("action", "<f4", action_shape),
                ("picture", "<f2", picture_shape),
            ],
        )

    @property
    def size(self) -> int:
        return self._rows.size

    def append(self, **rows: torch.Tensor) -> None:
        """Add a batch, given as one tensor for each column.

        Raises:
            OSError: if the disk is full; earlier rows are unharmed.
        """
        self._rows.append(len(rows["parts"]), {name: values.cpu().numpy() for name, values in rows.items()})

    def draw(self, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Draw `count` rows, uniformly and with replacement.

        Raises:
            DamagedFileError: if a row is not as it was written.
        """
        table = self._rows.read(torch.randint(self.size, (count,), generator=generator).tolist())
        rows = {name: torch.from_numpy(np.ascontiguousarray(table[name])) for name, _, _ in self._rows.columns}
        return {name: rows[name] if name == "prompt_row" else rows[name].to(self._device) for name in rows}

    def state(self) -> dict[str, int]:
        """Flush the rows to disk and return the state for a checkpoint."""
        return self._rows.state()

    def load_state(self, state: dict[str, int], folder: Path) -> None:
        """Go back to a checkpoint's rows in RUN/history, and forget later ones.

        Raises:
            DamagedFileError: if a row is missing or not as it was written.
        """
        self._rows.load_state(state, folder)
