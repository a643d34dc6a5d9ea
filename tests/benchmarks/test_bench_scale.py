"""`noisepolicy-bench scale` at its smallest, by the real torchrun."""

import json

import pytest

from noisepolicy.cli.bench import main


@pytest.mark.slow
def test_images_and_bytes_of_one_and_two_processes(capsys):
    assert main(["scale", "--iterations", "1"]) == 0
    one, two = json.loads(capsys.readouterr().out.splitlines()[-1])["scale"]
    assert (one["processes"], two["processes"], one["images"]) == (1, 2, 96)
    assert one["bytes_per_iteration"] == 0 and one["rollout_speedup"] == 1
    assert two["bytes_per_iteration"] == 96 * (20 + 4 * 512 + 2 * 768)  # the formula of docs/scale.md
    assert two["rollout_images_per_s"] > 0 and two["iteration_speedup"] > 0
    assert 0 < one["save_share"] < 1 and min(one["resume_s"], two["resume_s"]) > 0
    generation, in_turn, overlapped = (one["overlap"][name] for name in ("generation_s", "in_turn_s", "overlapped_s"))
    assert generation < overlapped < in_turn and two["overlap"] is None


def test_no_processes_are_refused(capsys):
    assert main(["scale", "--processes", "0"]) == 2
    assert "--processes, --iterations and --gradient-accumulation-steps must be positive" in capsys.readouterr().err
