"""The README's example, commands and links, and CONTRIBUTING's layout, against the files."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from noisepolicy.cli import bench_arguments
from noisepolicy.cli.arguments import parse_arguments

ROOT = Path(__file__).parent.parent
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md"))


def layout() -> list[str]:
    """The paths named in the tree of CONTRIBUTING.md."""
    block = re.search(r"## Layout\n```\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.DOTALL).group(1)
    paths, folder = [], ""
    for line in block.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name
        paths.append(name if not line.startswith(" ") else folder + name)
    return paths


@pytest.mark.parametrize("path", layout())
def test_what_the_tree_names_is_there(path):
    assert (ROOT / path).exists()


def test_the_tree_names_every_part():
    parts = {
        f"{path.parent.name}/{path.name}" + ("/" if path.is_dir() else "")
        for folder in ("csrc", "noisepolicy")
        for path in (ROOT / folder).iterdir()
        if not path.name.startswith(("_", ".")) and path.suffix != ".so"
    }
    assert parts <= set(layout())


def test_commands_of_the_readme_are_in_the_makefile():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for command in re.findall(r"^make (\w+)", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE):
        assert re.search(rf"^{command}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *PAGES])
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", (ROOT / page).read_text("utf-8"))
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def commands(page: str) -> list[tuple[str, str]]:
    """Names and arguments of the page's noisepolicy-train and noisepolicy-bench, but for those that need a run."""
    blocks = re.findall(r"```\w*\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    lines = re.sub(r"\\\n\s*", " ", "\n".join(blocks)).splitlines()
    found = [re.match(r"(?:[A-Z_]+=\S+ )*noisepolicy-(train|bench)\b([^#]*)", line) for line in lines]
    return [match.groups() for match in found if match and not re.search(r"--(resume|config|list)|MODE", match[2])]


@pytest.mark.parametrize("page", [page for page in ["README.md", "CONTRIBUTING.md", *PAGES] if commands(page)])
def test_commands_of_the_page_are_understood(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, arguments in commands(page):
        argv = [argument for argument in shlex.split(arguments) if argument != "..."]
        if name == "train":
            parse_arguments(argv).config.check()
        else:
            bench_arguments.parse_arguments(argv)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "made"),
    [
        ("README.md", ["picture.png", "runs/first/report.html", "runs/first/policy/README.md"]),
        ("docs/start/python.md", ["picture.png", "runs/first/report.html"]),
        ("docs/python.md", ["third.png", "runs/red/report.html", "runs/throws/report.html"]),
        ("docs/integrations.md", ["attached.png", "found.png"]),
    ],
)
def test_the_examples_run(page, made, tmp_path, monkeypatch):
    """All Python on the page, in order, as it stands but for the size of its runs."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    size = "num_iterations=2, batch_size=8, eval_num_prompts=2, eval_group_size=2, eval_steps=(2,), "
    example = re.sub(r"(?<=[ (])output_dir=", f"{size}output_dir=", "\n".join(blocks))
    assert size in example
    exec(compile(example, page, "exec"), {"__name__": "__main__"})
    assert [name for name in made if not (tmp_path / name).is_file()] == []
    assert Image.open(tmp_path / made[0]).size == (64, 64)
