"""Every image made so far, as the critic sees it: prompt, step count, action, a small picture and the reward.

RUN/history is a `RowFile`: neither memory nor the cost of a checkpoint grows with its rows. A prompt is its row in the
run's `PromptStore`.
"""

from pathlib import Path

import numpy as np
import torch

from noisepolicy.training.row_file import RowFile


class History:
    """What a critic is trained on.

    Args:
        folder: RUN/history; None for a process that is not the main.
        action_shape: of one action, float32.
        picture_shape: of one small picture, kept as float16.
        num_parts: of the reward, kept as float64 before they are weighted; their units are a matter of the present.
        device: where drawn rows go, but for the prompts' rows, which stay on the CPU.
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
        """Adds a batch; one tensor for each column.

        Raises:
            OSError: if the disk is full; the rows before are as they were.
        """
        self._rows.append(len(rows["parts"]), {name: values.cpu().numpy() for name, values in rows.items()})

    def draw(self, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """`count` rows, uniformly and with replacement.

        Raises:
            DamagedFileError: if a row is not what was written.
        """
        table = self._rows.read(torch.randint(self.size, (count,), generator=generator).tolist())
        rows = {name: torch.from_numpy(np.ascontiguousarray(table[name])) for name, _, _ in self._rows.columns}
        return {name: rows[name] if name == "prompt_row" else rows[name].to(self._device) for name in rows}

    def state(self) -> dict[str, int]:
        """What a checkpoint holds of it. The rows are on the disk when this returns."""
        return self._rows.state()

    def load_state(self, state: dict[str, int], folder: Path) -> None:
        """Goes back to the rows of a checkpoint in RUN/history, and forgets those beyond them.

        Raises:
            DamagedFileError: if they are not all there, as they were written.
        """
        self._rows.load_state(state, folder)
