"""Print the page of pipeline classes: `python -m tests.frozen.pipelines > docs/pipelines.md`."""

import inspect
from collections.abc import Iterable

import diffusers

from . import TABLE
from .modular import MODULAR
from .refused import MODULAR_REFUSED, REFUSED


def text_conditioned() -> list[str]:
    """Return the names of the installed diffusers' pipeline classes whose call takes a prompt."""
    names = [name for name in dir(diffusers) if name.endswith("Pipeline") and "Onnx" not in name]
    return [name for name in names if "prompt" in inspect.signature(getattr(diffusers, name).__call__).parameters]


def modular() -> list[str]:
    """Return the names of the installed diffusers' classes of modular pipelines."""
    return [name for name in dir(diffusers) if name.endswith("ModularPipeline") and name != "ModularPipeline"]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name.removesuffix('Pipeline').removesuffix('Modular')}`" for name in names)


def _rows(refused: dict[str, tuple[str, str]]) -> str:
    return "\n".join(f"| `{name}` | {refused[name][1]} |" for name in sorted(refused))


def main() -> None:
    classes = text_conditioned()
    tried = {name.split(":")[0] for name in TABLE} | REFUSED.keys()
    proved = [name for name in classes if name in tried and name not in REFUSED]
    rest = [name for name in classes if name not in tried]
    not_tried = f"## {len(rest)} were not tried\n\n{_listed(rest)}\n\n" if rest else ""
    print(f"""# Pipelines

Any diffusers pipeline can be tried. These are the {len(classes)} text-conditioned classes of diffusers
{diffusers.__version__}. Of a class that works, a tiny pipeline with random weights makes the same pictures as a frozen
model as by its own call, to 1e-5, is trained for two iterations, and has the same weights afterwards
(`tests/frozen/test_pipelines.py`). `python -m tests.frozen.pipelines` prints this page.

## {len(proved)} work

{_listed(proved)}

## {len(REFUSED)} are refused

| class | reason |
|---|---|
{_rows(REFUSED)}

{not_tried}## Modular Diffusers

Pipelines of blocks are frozen models too, with blocks of one's own. Their guiders get the guidance scale, and arguments
of the blocks are arguments of the call. Of the {len(modular())} classes of modular pipelines, these {len(MODULAR)} are
proved by tiny pipelines as above (`tests/frozen/test_modular.py`):

{_listed(MODULAR)}

These are refused:

| class | reason |
|---|---|
{_rows(MODULAR_REFUSED)}
| `QwenImageLayeredModularPipeline` | writes a caption of each picture for its prompt |

The others were not tried:

{_listed(name for name in modular() if name not in (*MODULAR, *MODULAR_REFUSED, "QwenImageLayeredModularPipeline"))}""")


if __name__ == "__main__":
    main()
