"""Every image made so far, as the critic sees it: prompt, step count, action, a small picture and the reward.

A prompt is its row in the run's `PromptStore`.
"""

import torch


class History:
    """A growing table of `capacity` rows at most, on one device.

    Args:
        capacity: rows at most.
        action_shape: of one action, float32.
        picture_shape: of one small picture, kept as float16.
        device: where it lies, but for the prompts' rows, which stay on the CPU.
    """

    def __init__(
        self, capacity: int, action_shape: tuple[int, ...], picture_shape: tuple[int, ...], device: torch.device
    ) -> None:
        self.size = 0
        self._columns = {
            "prompt_row": torch.zeros(capacity, dtype=torch.int64),
            "step_index": torch.zeros(capacity, dtype=torch.int64, device=device),
            "reward": torch.zeros(capacity, device=device),
            "action": torch.zeros(capacity, *action_shape, device=device),
            "picture": torch.zeros(capacity, *picture_shape, dtype=torch.float16, device=device),
        }

    def append(self, **rows: torch.Tensor) -> None:
        """Adds a batch; one tensor for each column."""
        end = self.size + len(rows["reward"])
        for name, column in self._columns.items():
            column[self.size : end] = rows[name]
        self.size = end

    def draw(self, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """`count` rows, uniformly and with replacement."""
        index = torch.randint(self.size, (count,), generator=generator)
        return {name: column[index.to(column.device)] for name, column in self._columns.items()}

    def state(self) -> dict[str, torch.Tensor]:
        return {name: column[: self.size].cpu() for name, column in self._columns.items()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self.size = 0
        self.append(**state)
