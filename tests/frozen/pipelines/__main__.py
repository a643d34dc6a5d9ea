"""Print the page of pipeline classes: `python -m tests.frozen.pipelines > docs/pipelines.md`."""

import inspect
from collections.abc import Iterable

import diffusers

from . import TABLE
from .refused import REFUSED


def text_conditioned() -> list[str]:
    """Return the names of the installed diffusers' pipeline classes whose call takes a prompt."""
    names = [name for name in dir(diffusers) if name.endswith("Pipeline") and "Onnx" not in name]
    return [name for name in names if "prompt" in inspect.signature(getattr(diffusers, name).__call__).parameters]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name.removesuffix('Pipeline')}`" for name in names)


def main() -> None:
    classes = text_conditioned()
    tried = {name.split(":")[0] for name in TABLE}
    proved = [name for name in classes if name in tried and name not in REFUSED]
    rest = [name for name in classes if name not in tried]
    print(f"""# Pipelines

Any diffusers pipeline can be tried. These are the {len(classes)} text-conditioned classes of diffusers
{diffusers.__version__}. Of a class that works, a tiny pipeline with random weights makes the same pictures as a frozen
model as by its own call, to 1e-5, is trained for two iterations, and has the same weights afterwards
(`tests/frozen/test_pipelines.py`). `python -m tests.frozen.pipelines` prints this page.

## {len(proved)} work

{_listed(proved)}

## {len(REFUSED)} are refused

| class | reason |
|---|---|""")
    for name in sorted(REFUSED):
        print(f"| `{name}` | {REFUSED[name][1]} |")
    print(f"""
## {len(rest)} were not tried

{_listed(rest)}""")


if __name__ == "__main__":
    main()
