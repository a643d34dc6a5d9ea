"""Trackers that follow a run: what arrives in those that are installed here, offline."""

import json
import sqlite3

import pytest
import torch

import noisepolicy

PROMPTS = ["from the left", "calm", "from the right", "still"]
NUM_IMAGES = [16, 32, 48]


class Throws:
    """A model without diffusers."""

    latent_shape = (2, 4, 4)

    def encode(self, prompts):
        return torch.tensor([[[float("left" in prompt), len(prompt) / 20]] for prompt in prompts])

    def generate(self, latents, prompt_embeds, *, num_inference_steps, guidance_scale):
        x = latents.mean((1, 2, 3)) + prompt_embeds.prompt_embeds[:, 0, 0]
        return torch.sigmoid(torch.linspace(-2, 2, 16) - x[:, None]).expand(16, 3, -1, -1).permute(2, 1, 0, 3)


def dark(images, prompts):
    return 1 - images.mean((1, 2, 3))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of three iterations that the named trackers follow."""
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_DIR", "TRACKIO_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
        (tmp_path / name).mkdir()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")

    def make(*trackers, **settings):
        return noisepolicy.Run(
            Throws(),
            reward=dark,
            prompts=PROMPTS,
            eval_prompts=PROMPTS[:2],
            output_dir=tmp_path / "run",
            trackers=trackers,
            **{"num_iterations": 3, "batch_size": 16, "critic_warmup": 16, "sample_every": 1, **settings},
            eval_steps=(1, 2),
            critic_updates=2,
        )

    return make


def test_tensorboard_gets_metrics_samples_and_the_table(run, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = run(tensorboard=True).train()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    rewards = events.Scalars("reward")
    assert [event.step for event in rewards] == NUM_IMAGES
    assert [event.value for event in rewards] == pytest.approx([metrics["reward"] for metrics in made.metrics])
    [samples] = [tag for tag in tags["images"] if tag.startswith("samples")]
    assert [event.step for event in events.Images(samples)] == NUM_IMAGES
    [gain] = events.Scalars("evaluation/2_steps/gain")
    assert gain.value == pytest.approx(made.evaluation.rows[1]["gain"])
    assert any("evaluation" in tag for tag in tags["tensors"])


def test_wandb_gets_them_offline(run, tmp_path):
    wandb = pytest.importorskip("wandb")
    run("wandb", num_iterations=2).train()
    noisepolicy.resume(tmp_path / "run", model=Throws(), reward=dark, num_iterations=3).train()
    wandb.teardown()  # its files are whole now
    run_id = json.loads((tmp_path / "run" / "tracker.json").read_text())["id"]
    records = [path.read_bytes() for path in (tmp_path / "WANDB_DIR").rglob(f"run-{run_id}.wandb")]
    assert len(records) == 2, "a resumed run goes on under the same id"
    for name in (b"reward", b"kl_to_prior", b"evaluation/2_steps/gain"):
        assert all(name in record for record in records)
    files = {path.name.split("_")[0] for path in (tmp_path / "WANDB_DIR").rglob("*.*") if "media" in path.parts}
    assert {"samples", "evaluation", "report", "before"} <= files


def test_trackio_gets_them(run, tmp_path):
    pytest.importorskip("trackio")
    made = run("trackio").train()
    [database] = (tmp_path / "TRACKIO_DIR").rglob("noisepolicy.db")
    rows = [json.loads(row[0]) for row in sqlite3.connect(database).execute("SELECT metrics FROM metrics ORDER BY id")]
    rewards = [row["reward"] for row in rows if "reward" in row]
    assert rewards == pytest.approx([metrics["reward"] for metrics in made.metrics])
    assert sum("samples" in row for row in rows) == 3
    assert any("evaluation" in row for row in rows)


def test_mlflow_gets_them(run, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    made = run("mlflow").train()
    client = mlflow.MlflowClient()
    [experiment] = client.search_experiments(filter_string="name = 'noisepolicy'")
    [tracked] = client.search_runs([experiment.experiment_id])
    assert tracked.info.status == "FINISHED" and tracked.info.run_name.startswith("run-")
    assert tracked.data.params["batch_size"] == "16"
    rewards = client.get_metric_history(tracked.info.run_id, "reward")
    assert [each.step for each in rewards] == NUM_IMAGES
    assert [each.value for each in rewards] == pytest.approx([metrics["reward"] for metrics in made.metrics])
    assert tracked.data.metrics["evaluation/2_steps/gain"] == pytest.approx(made.evaluation.rows[1]["gain"])
    artifacts = {each.path for each in client.list_artifacts(tracked.info.run_id)}
    assert {"samples", "before_after", "report.html"} <= artifacts
    assert len(client.list_artifacts(tracked.info.run_id, "samples")) == 3


def test_a_tracker_that_fails_is_left_out(run, monkeypatch):
    pytest.importorskip("tensorboard")
    from accelerate.tracking import TensorBoardTracker

    def log(self, values, step=None, **kwargs):
        raise ConnectionError("the service is gone")

    monkeypatch.setattr(TensorBoardTracker, "log", log)
    with pytest.warns(UserWarning, match="the tracker tensorboard fails and is left out .*service is gone"):
        assert run("tensorboard").train().iteration == 3


def test_unknown_and_missing_trackers_are_refused(run, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"unknown tracker 'sheet'; choose from .*tensorboard, wandb"):
        run("sheet")
    monkeypatch.setattr("noisepolicy.training.trackers.get_available_trackers", list)
    with pytest.raises(ValueError, match="mlflow needs a package that is not installed: pip install mlflow"):
        run("mlflow")
    assert not (tmp_path / "run").exists()
