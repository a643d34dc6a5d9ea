"""Imports point one way, from the commands down to the ops, so there is no circle among the packages."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = {"noisepolicy": "", "export": "export", "benchmarks": "benchmarks", "integrations": "integrations"}
LAYERS = (
    {"__init__"},
    {"cli"},
    {"integrations"},
    {"benchmarks"},
    {"training"},
    {"evaluation"},
    {"engines"},
    {"export"},
    {"policies"},
    {"frozen"},
    {"rewards"},
    {"worlds"},
    {"prior"},
    {"ops"},
)
"""Packages of noisepolicy; each imports from the layers below its own only. Single modules are below all of them."""


def layer(name: str) -> int:
    return next((number for number, names in enumerate(LAYERS) if name in names), len(LAYERS))


def imports(path: Path) -> list[tuple[str, int]]:
    """Packages of noisepolicy that a file imports, at its top or inside its functions, and where."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found += [(name.split(".")[1], node.lineno) for name in names if name.startswith("noisepolicy.")]
    return found


def test_imports_point_one_way():
    wrong, count = [], 0
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            own = package or path.relative_to(ROOT / folder).with_suffix("").parts[0]
            for name, line in imports(path):
                count += 1
                if name != own and layer(name) <= layer(own):
                    wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert wrong == [] and count > 100
