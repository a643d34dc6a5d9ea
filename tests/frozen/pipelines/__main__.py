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

Any diffusers pipeline may be given; there is no list of allowed classes. This page lists what has been tried: the
{len(classes)} text-conditioned classes of diffusers {diffusers.__version__}. `python -m tests.frozen.pipelines` prints
it.

A class *works* if a tiny pipeline with random weights passes three checks (`tests/frozen/test_pipelines.py`):

- it makes the same pictures as a frozen model as by its own call, to 1e-5;
- a policy is trained for it for two iterations;
- its weights are the same afterwards.

No published weights were used.

## {len(proved)} work

{_listed(proved)}

## {len(REFUSED)} are refused

| class | reason |
|---|---|
{_rows(REFUSED)}

{not_tried}## Modular Diffusers

Pipelines made of blocks work too, also with blocks of your own. Their guiders get the guidance scale, and the inputs
of their blocks are arguments of the call. Of the {len(modular())} classes of modular pipelines, these {len(MODULAR)}
pass the same checks (`tests/frozen/test_modular.py`):

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
