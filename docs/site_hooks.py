"""Hooks of mkdocs: what the site takes from the repository when it is built.

A link out of docs/ leads to a copy of the file in the site, so that the site can be read on its own. In the pages of
the reference, `<!-- settings -->`, `<!-- recipes -->` and `<!-- help: COMMAND -->` are replaced by the settings of
`TrainConfig`, the algorithms' own values and the output of `COMMAND --help`. Formulas become MathML, which browsers
render without a script.
"""

import html
import math
import os
import re
import subprocess
import sys
from pathlib import Path, PurePosixPath
from typing import Any

import latex2mathml.converter
from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(!?)\[([^]]*)]\((\.\./[^)#]+)\)")
_COPIES = "files"
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL)
_BLOCK = re.compile(r"\||- |\d+\. ")
_BLOCK_GOES_ON = re.compile(r"\||- |\d+\. |\s")


def on_files(files: Files, config: Any) -> Files:
    """Add the files outside docs/ that pages link to."""
    outside = set()
    for file in files.documentation_pages():
        if file.src_uri.endswith(".md"):
            outside |= {_outside(file.src_uri, link[2]) for link in _LINK.findall(file.content_string)}
    for name in sorted(name for name in outside if name is not None and (_ROOT / name).is_file()):
        files.append(File.generated(config, f"{_COPIES}/{name}", abs_src_path=str(_ROOT / name)))
    return files


def _outside(page: str, link: str) -> str | None:
    """Return the path of a link's target from the repository's root, or None if it is inside docs/."""
    target = os.path.relpath(Path("docs", page).parent / link)
    return None if target.startswith("docs/") else PurePosixPath(target).as_posix()


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links at the copies and fill in the pages of the reference."""
    up = "../" * page.file.src_uri.count("/")

    def to_copy(match: re.Match[str]) -> str:
        mark, label, link = match.groups()
        name = _outside(page.file.src_uri, link)
        if name is None:
            return match[0]
        return f"{mark}[{label}]({up}{_COPIES}/{name})" if (_ROOT / name).is_file() else f"`{name}`"

    markdown = _with_blank_lines(_LINK.sub(to_copy, markdown))
    if page.file.src_uri.startswith("reference/"):
        markdown = re.sub("<!-- settings -->", lambda _: _settings(), markdown)
        markdown = re.sub("<!-- recipes -->", lambda _: _recipes(), markdown)
        markdown = re.sub("<!-- help: (.+) -->", lambda match: _help(match[1]), markdown)
    return markdown


def on_page_content(page_html: str, page: Any, config: Any, files: Files) -> str:
    """Replace the formulas, as pymdownx.arithmatex leaves them, by MathML."""

    def to_mathml(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return latex2mathml.converter.convert(html.unescape(match[2]).strip(), display=display)

    return _FORMULA.sub(to_mathml, page_html)


def _with_blank_lines(markdown: str) -> str:
    """Put the blank line before tables and lists that this Markdown wants and GitHub's does not."""
    lines, before, is_code = [], "", False
    for line in markdown.splitlines():
        if not is_code and _BLOCK.match(line) and before.strip() and not _BLOCK_GOES_ON.match(before):
            lines.append("")
        is_code ^= line.startswith("```")
        lines.append(line)
        before = line
    return "\n".join(lines)


def _settings() -> str:
    from noisepolicy.settings import settings_of
    from noisepolicy.training.config import TrainConfig

    lines, group = [], None
    for setting in settings_of(TrainConfig).values():
        if setting.group != group:
            group = setting.group
            lines += [f"## {group}", ""]
        kind = " or ".join(f"`{choice}`" for choice in setting.choices) or setting.kind.__name__
        kind = f"one or more of {kind}" if setting.is_list and setting.choices else kind
        kind = f"list of {kind}" if setting.is_list and not setting.choices else kind
        help_text = re.sub(r"([*<|])", r"\\\1", setting.help)
        default = "" if setting.default in (None, "", (), {}) else f" Default: `{_shown(setting.default)}`."
        lines += [f"`{setting.name}`, `{setting.flag}`", f":   {help_text}{default} *({kind})*", ""]
    return "\n".join(lines)


def _recipes() -> str:
    from noisepolicy.training.config import RECIPES

    names = list(dict.fromkeys(name for recipe in RECIPES.values() for name in recipe))
    lines = ["| setting | " + " | ".join(f"`{name}`" for name in RECIPES) + " |", "|---" * (len(RECIPES) + 1) + "|"]
    for name in names:
        lines.append(f"| `{name}` | " + " | ".join(_shown(recipe.get(name)) for recipe in RECIPES.values()) + " |")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "no limit" if value == math.inf else str(value)


def _help(command: str) -> str:
    program, *rest = command.split()
    module = "noisepolicy.cli." + program.removeprefix("noisepolicy-").replace("-", "_")
    done = subprocess.run(
        [sys.executable, "-m", module, *rest, "--help"],
        env={**os.environ, "COLUMNS": "78", "NO_COLOR": "1"},
        cwd=_ROOT / "docs",  # not where noisepolicy/ is: the installed package is meant
        capture_output=True,
        text=True,
        check=True,
    )
    return f"```text\n{done.stdout.rstrip()}\n```"
