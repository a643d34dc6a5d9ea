"""The curves of a run in a notebook, which renew themselves below the cell while it trains."""

import base64
import sys
import time
from collections.abc import Sequence
from typing import Any

from noisepolicy.evaluation.figures import training_curves

_LEAST_SECONDS = 2.0
_PAUSE = 20  # times as long as drawing takes: 5% of the time at most


def in_notebook() -> bool:
    """Tell whether this is a notebook's kernel, which shows more than text."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


class LivePlot:
    """Reward and KL of every iteration so far. It needs a notebook."""

    def __init__(self) -> None:
        self._display: Any = None
        self._next = 0.0

    def update(self, metrics: Sequence[dict[str, Any]], *, is_last: bool) -> None:
        """Draw the metrics anew, unless the last drawing is recent and there are more to come."""
        start = time.monotonic()
        if start < self._next and not is_last:
            return
        from IPython.display import HTML, display

        data = base64.b64encode(training_curves(metrics).encode()).decode()
        style = "max-width: 100%; background: white"  # the curves are drawn on nothing, and cells may be dark
        figure = HTML(f'<img alt="reward and KL" style="{style}" src="data:image/svg+xml;base64,{data}">')
        if self._display is None:
            self._display = display(figure, display_id=True)
        else:
            self._display.update(figure)
        end = time.monotonic()
        self._next = end + max(_LEAST_SECONDS, _PAUSE * (end - start))
