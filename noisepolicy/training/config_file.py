"""Settings from YAML that may be anybody's: a mapping of plain values, and nothing else."""

from pathlib import Path
from typing import Any

import yaml

_MAX_BYTES = 4 * 1024 * 1024


class _Loader(yaml.SafeLoader):
    """A loader without aliases: nested in one another, a few lines of aliases exceed any memory."""

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not taken here")
        return super().compose_node(parent, index)


def read_settings(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        ValueError: if the file is missing, too large, not YAML, or holds something else.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES} bytes")
        values = yaml.load(path.read_text("utf-8"), _Loader)
    except RecursionError:
        raise ValueError(f"cannot read settings from {path}: it is nested too deeply") from None
    except OSError as error:
        raise ValueError(f"cannot read settings from {path}: {error.strerror or error}") from error
    # What PyYAML's constructors of numbers, dates and the like raise of texts that are none.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        raise ValueError(f"cannot read settings from {path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a YAML mapping of settings, got {type(values).__name__}")
    return values
