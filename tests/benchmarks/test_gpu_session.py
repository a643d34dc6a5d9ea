"""The GPU session's steps, on models so small that a CPU goes through them; and the models it makes."""

import json

import diffusers
import pytest
import torch

from noisepolicy.benchmarks.gpu import main
from noisepolicy.benchmarks.random_models import SIZES, write_random_model


@pytest.mark.slow
def test_the_session_on_a_cpu(tmp_path):
    assert main([str(tmp_path / "gpu.json"), "--tiny", "--device", "cpu"]) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["runs_are_bit_identical"] is True
    steps = result["steps"]
    assert list(steps) == ["kernels", "latency sd-turbo bfloat16", "training 0", "training 1"]
    assert steps["kernels"]["result"] and steps["latency sd-turbo bfloat16"]["result"]
    assert steps["training 0"]["summary"]["seconds"]["frozen_model"] > 0


@pytest.mark.parametrize("size", SIZES)
def test_models_of_published_sizes(tmp_path, size):
    folder = write_random_model(size, tmp_path, dtype=torch.float32, device=torch.device("cpu"), tiny=True)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a picture", num_inference_steps=1, guidance_scale=0.0, output_type="pt").images
    assert images.shape == (1, 3, 64, 64) and images.isfinite().all()


def test_no_gpu_is_said_in_a_line(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as error:
        main([str(tmp_path / "gpu.json")])
    assert error.value.code == 2 and "no CUDA device; --tiny --device cpu" in capsys.readouterr().err
