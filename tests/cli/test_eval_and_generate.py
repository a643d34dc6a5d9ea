"""`noisepolicy-eval` and `noisepolicy-generate` on a small real run, as processes of their own."""

import json

import numpy as np
import pytest
from PIL import Image

import noisepolicy

PROMPT = "a red circle, a blue square and a green triangle from left to right"
OTHER_PROMPT = "a red circle, a blue square and a green triangle from top to bottom"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run_folder(commands, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval") / "run"
    settings = {
        "output-dir": folder,
        "num-iterations": 2,
        "batch-size": 16,
        "critic-warmup": 16,
        "critic-updates": 2,
        "eval-steps": 1,
        "eval-num-prompts": 4,
        "eval-group-size": 2,
        "eval-rewards": "brightness",
        "license": "mit",
    }
    flags = [text for name, value in settings.items() for text in (f"--{name}", value)]
    done = commands.run("train", *flags, folder=folder.parent, output=folder.parent)
    assert done.returncode == 0, done.stderr
    assert "brightness" in done.stdout
    return folder


def test_generate_on_another_engine_makes_the_same_pictures(run_command, run_folder, tmp_path):
    pytest.importorskip("onnxruntime")
    pictures = []
    for name in ("eager", "onnx"):
        done = run_command("generate", run_folder, PROMPT, "--engine", name, "--output-dir", tmp_path / name)
        assert done.returncode == 0, done.stderr
        pictures.append(np.asarray(Image.open(tmp_path / name / "0000.png"), dtype=int))
    assert abs(pictures[0] - pictures[1]).max() <= 1
    done = run_command("generate", run_folder, PROMPT, "--denoiser", "quick")
    assert done.returncode == 2 and "--engine must be one of auto, eager" in done.stderr


def test_eval_measures_further_rewards_and_writes_a_report(run_command, run_folder, tmp_path):
    done = run_command(
        "eval",
        run_folder,
        "--steps",
        "1,2",
        "--rewards",
        "red",
        "0.5*blue + sharpness",
        "--group-size",
        "2",
        "--num-prompts",
        "4",
        "--output-dir",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "summary.json").read_text())["sweep"]
    assert [row["num_inference_steps"] for row in rows] == [1, 2] and rows[0]["num_pairs"] == 8
    assert [other["name"] for other in rows[0]["eval_rewards"]] == ["red", "0.5*blue + sharpness"]
    assert -1 <= rows[0]["eval_rewards"][0]["base"] <= 1
    report = (tmp_path / "report.html").read_text()
    assert "0.5*blue + sharpness" in report and "not trained for" in report


def test_generate_writes_pictures_beside_the_base_models(run_command, run_folder, tmp_path):
    done = run_command("generate", run_folder, PROMPT, "--num-images", "3", "--compare", "--output-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "0000.png",
        "0000_base.png",
        "0001.png",
        "0001_base.png",
        "0002.png",
        "0002_base.png",
        "grid.png",
    ]
    assert Image.open(tmp_path / "grid.png").size == (3 * 64, 2 * 64)
    again = tmp_path / "again"
    assert run_command("generate", run_folder, PROMPT, "--num-images", "3", "--output-dir", again).returncode == 0
    assert (again / "0001.png").read_bytes() == (tmp_path / "0001.png").read_bytes()
    other = tmp_path / "other"
    assert run_command("generate", run_folder, PROMPT, "--seed", "1", "--output-dir", other).returncode == 0
    assert (other / "0000.png").read_bytes() != (tmp_path / "0000.png").read_bytes()


def test_generate_keeps_the_best_by_a_reward(run_command, run_folder, tmp_path):
    def pictures(*flags):
        folder = tmp_path / "-".join(flags)
        done = run_command("generate", run_folder, PROMPT, *flags, "--output-dir", folder)
        assert done.returncode == 0, done.stderr
        return [np.asarray(Image.open(path)).astype(float) for path in sorted(folder.iterdir())]

    eight, two = pictures("--num-images", "8"), pictures("--num-images", "2", "--best-of", "4", "--reward", "red")
    redness = [picture[..., 0].mean() - picture[..., 1:].mean() for picture in eight]
    for first, best in zip((0, 4), two, strict=True):
        assert np.array_equal(best, eight[first + int(np.argmax(redness[first : first + 4]))])
    assert len(pictures("--best-of", "2")) == 1, "by the run's reward"


def test_variety_of_generate_and_eval(run_command, run_folder, tmp_path):
    """The run's Python object makes the same pictures, and each prompt counts its own."""
    flags = ("--num-images", "3", "--variety", "0.5", "--output-dir", tmp_path)
    done = run_command("generate", run_folder, OTHER_PROMPT, PROMPT, *flags)
    assert done.returncode == 0, done.stderr
    run = noisepolicy.resume(run_folder)
    alone = run.generate(PROMPT, num_images_per_prompt=3, variety=0.5)
    plain = run.generate(PROMPT, num_images_per_prompt=3)
    written = [np.asarray(Image.open(tmp_path / f"{number:04d}.png")).astype(int) for number in (3, 4, 5)]
    for picture, expected in zip(written, alone, strict=True):
        assert np.abs(picture - np.asarray(expected)).max() <= 2
    assert np.array_equal(alone[0], plain[0]) and not np.array_equal(alone[1], plain[1])

    flags = ("--variety", "1", "--steps", "1", "--num-prompts", "2", "--group-size", "4")
    done = run_command("eval", run_folder, *flags, "--output-dir", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    assert "at variety 1, same seeds" in done.stdout
    assert "at variety 1" in (tmp_path / "report" / "report.html").read_text()
    [row] = json.loads((tmp_path / "report" / "summary.json").read_text())["sweep"]
    [plain] = run.evaluate(steps=[1], num_prompts=2, group_size=4).rows
    assert row["variety"] == 1 and row["base"]["reward"] == pytest.approx(plain["base"]["reward"], abs=1e-4)
    assert row["policy"]["diversity"] != pytest.approx(plain["policy"]["diversity"], abs=1e-4)


def test_model_card_has_the_runs_numbers(run_folder):
    card = (run_folder / "policy" / "README.md").read_text()
    assert 'license: "mit"' in card and "library_name: noisepolicy" in card
    row = json.loads((run_folder / "summary.json").read_text())["sweep"][0]
    assert f"| 1 | {row['base']['reward']:.3f} | {row['policy']['reward']:.3f} |" in card
    assert "`brightness`, not trained for" in card


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("eval", ["nothing"], "not a run folder"),
        ("eval", ["RUN", "--steps", "two"], "--steps must be numbers"),
        ("eval", ["RUN", "--rewards", "beauty"], "unknown reward 'beauty'"),
        ("eval", ["RUN", "--num-prompts", "0"], "--num-prompts must be positive, got 0"),
        ("generate", ["nothing", "a prompt"], "not a run folder"),
        ("generate", ["RUN", "a prompt", "--num-images", "0"], "--num-images must be 1 or more"),
        ("generate", ["RUN", "a prompt", "--best-of", "0"], "--best-of must be 1 or more, got 0"),
        ("generate", ["RUN", "a prompt", "--variety", "2"], "variety must be from 0 to 1, got 2"),
        ("generate", ["RUN", "a prompt", "--reward", "red"], "say how many with --best-of"),
        ("generate", ["RUN", "a prompt", "--best-of", "2", "--reward", "beauty"], "unknown reward 'beauty'"),
    ],
)
def test_bad_input_is_one_line(run_command, run_folder, module, arguments, message):
    done = run_command(module, *(run_folder if argument == "RUN" else argument for argument in arguments))
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
