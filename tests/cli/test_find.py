"""FIND by the real commands: train, go on, generate, evaluate; and what it refuses."""

import json

import pytest

from noisepolicy.policies import NoisePolicy

CAPTION = "a red circle, a blue square and a green triangle from left to right"
SHORT = [
    "--algorithm",
    "find",
    "--prompts",
    CAPTION,
    "--group-size",
    "6",
    "--checkpoint-every",
    "1",
    "--sample-every",
    "2",
    "--eval-group-size",
    "2",
    "--eval-steps",
    "1,2",
]


@pytest.mark.slow
def test_one_prompt_from_start_to_report(run_command, tmp_path):
    result = run_command("train", *SHORT, "--num-iterations", "2", "--output-dir", "run")
    assert result.returncode == 0, result.stderr
    assert "the prompts it was made for, same seeds" in result.stdout
    run = tmp_path / "run"
    assert json.loads((run / "summary.json").read_text())["images_trained"] == 12
    policy = NoisePolicy.from_pretrained(run / "policy")
    assert (policy.kind, policy.prompts) == ("table", [CAPTION])
    for text in ((run / "report.html").read_text(), (run / "policy" / "README.md").read_text()):
        assert "prompts it was made for" in text and "eld-out" not in text

    more = run_command("train", "--resume", "run", "--num-iterations", "3")
    assert more.returncode == 0, more.stderr
    assert json.loads((run / "summary.json").read_text())["images_trained"] == 18
    assert run_command("eval", "run", "--steps", "2").returncode == 0

    picture = run_command("generate", "run", CAPTION, "--num-images", "2", "--output-dir", "pictures")
    assert picture.returncode == 0, picture.stderr
    for refused, said in (
        (
            ("generate", "run", CAPTION.replace("red", "yellow"), "--output-dir", "other"),
            "none of those this policy was",
        ),
        (("export", "run", "--output-dir", "exported"), "is a table"),
        (("eval", "run", "--prompts", "another"), "measured on the prompts it was made for"),
    ):
        result = run_command(*refused)
        assert result.returncode != 0 and said in result.stderr and "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--algorithm", "find"], "--algorithm find needs --prompts"),
        ([*SHORT, "--prompts", "A dog and a cat"], "not a caption of the shapes world"),
        ([*SHORT, "--batch-size", "12"], "more than a group of 6 for each of 1 prompts"),
        ([*SHORT, "--init-policy", "nothing"], "--init-policy nothing holds no policy"),
        ([*SHORT, "--group-size", "1"], "--group-size must be at least 2"),
        ([*SHORT, "--eval-prompts", CAPTION], "measured on the prompts it was made for"),
        (["--init-policy", "run"], "--init-policy is for --algorithm find"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused_leaves_no_run(run_command, tmp_path, arguments, said):
    result = run_command("train", *arguments, "--output-dir", "run")
    assert result.returncode == 2, result.stdout
    assert said in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "run" / "config.yaml").exists()
