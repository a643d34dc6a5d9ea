"""`noisepolicy-bench copies` at its smallest: every copy has a row, and the LoRA changes the pictures."""

import json

import pytest

import noisepolicy
from noisepolicy.cli.bench import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    settings = {"num_iterations": 1, "batch_size": 8, "critic_warmup": 8, "critic_updates": 1, "device": "cpu"}
    noisepolicy.Run("shapes", output_dir=folder, eval_num_prompts=0, checkpoint_every=1, **settings).train()
    return folder


@pytest.mark.slow
def test_a_row_for_each_copy(run, capsys):
    arguments = ["copies", str(run), "--steps", "1", "--num-prompts", "1", "--lora-steps", "2"]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {(row["copy"], row["steps"]): row for row in result["copies"]}
    assert {("its own", 2), ("its own", 1), ("LoRA at 0.5", 2), ("LoRA at 1.0", 2), ("bfloat16", 2)} <= rows.keys()
    assert len({rows[name, 2]["base"] for name in ("its own", "LoRA at 0.5", "LoRA at 1.0", "bfloat16")}) == 4
    for row in rows.values():
        assert row["gain"] == pytest.approx(row["policy"] - row["base"], abs=1e-6)


def test_what_is_refused(run, tmp_path, capsys):
    assert main(["copies", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert main(["copies", str(run), "--num-prompts", "0"]) == 2
    assert "must be positive" in capsys.readouterr().err
