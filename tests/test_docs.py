"""The documentation site builds without a warning and loads nothing from elsewhere."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_PACKAGES = ("mkdocs", "material", "mkdocstrings_handlers.python", "mkdocs_jupyter", "latex2mathml")


def _is_here(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


@pytest.mark.slow
def test_the_site_builds_and_stands_alone(tmp_path):
    if missing := [name for name in _PACKAGES if not _is_here(name)]:
        pytest.skip(f"no {missing[0]} here; the extra docs brings it")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", site]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.relative_to(site).as_posix(): path.read_text("utf-8") for path in site.rglob("*.html")}
    loaded = re.compile(r"""<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//""")
    assert [name for name, html in pages.items() if loaded.search(html)] == []
    assert (site / "search" / "search_index.js").is_file()
    assert "num_inference_steps" in pages["reference/settings.html"]
    assert "noisepolicy-train --resume RUN" in pages["reference/commands.html"]
    assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in pages["method.html"]
    assert "arithmatex" not in pages["method.html"]
    assert 'id="noisepolicy.Run.evaluate"' in pages["reference/api.html"]
