"""Texts that a user, or whoever wrote a prompt file, put in: in reports and cards they are text and nothing else."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from noisepolicy.benchmarks.report import write_report as write_benchmark_report
from noisepolicy.evaluation import write_model_card, write_report
from noisepolicy.evaluation.sweep import Pair
from noisepolicy.training.config import TrainConfig

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "\"' onload=\"document.title='owned'\" </title></style></pre><svg onload=document.title='owned'>"
)
MARKDOWN = "x`\n\n---\nlicense: mit\n---\n\n# owned\n\n[link](javascript:alert(1)) " + HOSTILE
SIDE = {"reward": 0.5, "strict": 0.5, "diversity": 0.1}
ROW = {
    "num_inference_steps": 2,
    "num_pairs": 4,
    "base": SIDE,
    "policy": SIDE,
    "gain": 0.0,
    "gain_ci95": [0.0, 0.0],
    "best_of_n": [{"n": 2, "reward": 0.6}],
    **{
        kind: [{"name": MARKDOWN, "base": 0.1, "policy": 0.2, "gain": 0.1, "gain_ci95": [0.0, 0.2]}]
        for kind in ("parts", "eval_rewards")
    },
}
SUMMARY = {
    "images_trained": 96,
    "train_seconds": 1.0,
    "seconds": {HOSTILE: 1.0},
    "frozen_sha256_after": HOSTILE,
    "sweep": [ROW],
}


def config(text: str) -> dict:
    return TrainConfig.of(
        model=text, reward=text, prompts=(text,), eval_rewards=(text,), negative_prompt=text, license=text
    ).plain()


def write_run_report(path: Path) -> None:
    picture = torch.rand(3, 8, 8)
    pair = Pair(HOSTILE, 2, picture, picture, {"reward": 0.5, "strict": 1.0}, {"reward": 0.5, "strict": 0.0})
    metrics = [{"images": 96, "reward": 0.5, "kl_to_prior": 1.0}]
    write_report(path, config=config(HOSTILE), summary=SUMMARY, metrics=metrics, pairs=[pair])


def result_of(name: str) -> dict:
    """A measured result with hostile words wherever a machine or its user can have put some."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    result.setdefault("workers", 1)  # which older results do not have
    machine = result.setdefault("machine", {"gpu": "", "processor": "", "threads": 1})
    for key, value in machine.items():
        if isinstance(value, str):
            machine[key] = HOSTILE
    if name == "latency":
        result |= {"model": HOSTILE, "next_gain": HOSTILE}
    return result


REPORTS = {
    "report": write_run_report,
    "algorithms": lambda path: write_benchmark_report(path, result_of("algorithms")),
    "kernels": lambda path: write_benchmark_report(path, result_of("kernels")),
    "latency": lambda path: write_benchmark_report(path, result_of("latency")),
}


def dom(browser: str, page: Path, folder: Path) -> str:
    """Return the page after its scripts, if it has any, have run."""
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-sync",
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=2000",
        "--dump-dom",
    ]
    done = subprocess.run([browser, *flags, page.as_uri()], check=True, capture_output=True, text=True, timeout=300)
    return done.stdout


@pytest.mark.browser
def test_the_browser_would_run_it(browser, tmp_path):
    (tmp_path / "page.html").write_text(f"<!doctype html><title>free</title><p>{HOSTILE}")
    assert "<title>owned</title>" in dom(browser, tmp_path / "page.html", tmp_path)


@pytest.mark.browser
@pytest.mark.parametrize("name", REPORTS)
def test_reports_show_it_as_text(name, browser, tmp_path):
    page = tmp_path / "page.html"
    REPORTS[name](page)
    html = page.read_text("utf-8")
    assert "&lt;script&gt;" in html and "<script" not in html and "<img src=x" not in html
    # Without the policy too: the escaping alone must hold.
    bare = tmp_path / "bare.html"
    bare.write_text(html.replace("Content-Security-Policy", "x-none"), "utf-8")
    for path in (page, bare):
        shown = dom(browser, path, tmp_path)
        assert "<title>noisepolicy" in shown and "<title>owned" not in shown
        assert "&lt;script&gt;document.title='owned'&lt;/script&gt;" in shown


def card(tmp_path: Path, **changes: str) -> tuple[dict, str]:
    """Front matter and text."""
    write_model_card(tmp_path, config={**config(MARKDOWN), "num_inference_steps": [2], **changes}, summary=SUMMARY)
    _, front, text = (tmp_path / "README.md").read_text("utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def test_a_cards_front_matter_holds_nothing_else(tmp_path):
    front, _ = card(tmp_path)
    assert front == {
        "library_name": "noisepolicy",
        "license": MARKDOWN,
        "tags": ["noisepolicy", "diffusion", "reinforcement-learning"],
    }
    assert card(tmp_path, model="stabilityai/sdxl-turbo")[0]["base_model"] == "stabilityai/sdxl-turbo"
    for model in ("../secret", "a/b\nlicense: mit", "a/b: c", "-/x", "a/b/c", "/etc/passwd"):
        assert "base_model" not in card(tmp_path, model=model)[0]


@pytest.mark.browser
def test_a_cards_markdown_shows_it_as_text(browser, tmp_path):
    markdown_it = pytest.importorskip("markdown_it")
    _, text = card(tmp_path)
    html = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    assert html.count("<h1>") == 1 and "<a " not in html and "<script" not in html
    (tmp_path / "page.html").write_text(f"<!doctype html><meta charset=utf-8><title>card</title>{html}", "utf-8")
    shown = dom(browser, tmp_path / "page.html", tmp_path)
    assert "<title>card</title>" in shown and "&lt;script&gt;" in shown
