"""FIND's historical samples: the last images of every prompt, with their noise's log-prob as it was drawn."""

import torch


class Replay:
    """For each prompt a ring of the last `capacity` samples, on one device.

    Args:
        num_prompts: rings.
        capacity: samples in each.
        action_shape: of one action, float32.
        num_parts: of the reward, float64, before they are weighted.
        device: where they lie.
    """

    def __init__(
        self, num_prompts: int, capacity: int, action_shape: tuple[int, ...], num_parts: int, device: torch.device
    ) -> None:
        self._capacity = capacity
        self._count = torch.zeros(num_prompts, dtype=torch.int64, device=device)
        self._columns = {
            "action": torch.zeros(num_prompts, capacity, *action_shape, device=device),
            "log_prob": torch.zeros(num_prompts, capacity, device=device),
            "parts": torch.zeros(num_prompts, capacity, num_parts, dtype=torch.float64, device=device),
            "step_index": torch.zeros(num_prompts, capacity, dtype=torch.int64, device=device),
        }

    def append(self, prompt: torch.Tensor, **samples: torch.Tensor) -> None:
        """Adds `group` samples of each of some prompts: `(prompts,)`, and `(prompts, group, ...)` for each column."""
        group = samples["parts"].shape[1]
        place = (self._count[prompt][:, None] + torch.arange(group, device=prompt.device)) % self._capacity
        for name, column in self._columns.items():
            column[prompt[:, None], place] = samples[name]
        self._count[prompt] += group

    def of(self, prompt: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The rings of some prompts, `(prompts, capacity, ...)`, and which places are filled, `(prompts, capacity)`."""
        is_filled = torch.arange(self._capacity, device=prompt.device) < self._count[prompt][:, None]
        return {name: column[prompt] for name, column in self._columns.items()}, is_filled

    def state(self) -> dict[str, torch.Tensor]:
        return {"count": self._count, **self._columns}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self._count.copy_(state["count"])
        for name, column in self._columns.items():
            column.copy_(state[name])
