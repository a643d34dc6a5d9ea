"""Two iterations of the real loop on every family: the policy moves, the pictures are scored, the weights stay."""

import base64
import io

import pytest
from PIL import Image

import noisepolicy
from noisepolicy.evaluation import evaluate_sweep, write_report
from noisepolicy.frozen import FrozenDiffusersPipeline
from noisepolicy.policies import SpectralPolicy
from noisepolicy.rewards import load_reward
from noisepolicy.training.config import TrainConfig

from .tiny_pipelines import SIZE


@pytest.mark.parametrize("name", SIZE)
@pytest.mark.parametrize("drops", [False, True], ids=["keep", "drop"])
def test_every_family_trains(family_folder, tmp_path, name, drops):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(["a red circle", "a blue square", "a red square", "a blue circle"]))
    is_video = "num_frames" in SIZE[name]
    run = noisepolicy.Run(
        str(family_folder(name)),
        prompts=prompts,
        eval_num_prompts=0,
        output_dir=tmp_path / "run",
        reward="frames(brightness)" if is_video else "brightness",
        num_inference_steps=(1,),
        guidance_scale=1.0,
        bands=2,
        batch_size=4,
        num_iterations=2,
        critic_warmup=4,
        critic_updates=1,
        critic_batch_size=4,
        rollout_batch_size=3,
        checkpoint_every=1,
        drop_text_encoders=drops,
        device="cpu",
        **SIZE[name],
    )
    frozen = run._task.frozen
    before = frozen.weights_sha256()
    metrics = list(run)
    assert [row["iteration"] for row in metrics] == [1, 2] and metrics[-1]["kl_to_prior"] > 0
    assert frozen.weights_sha256() == before
    policy = noisepolicy.load(tmp_path / "run")
    assert policy.latent_shape == frozen.latent_shape and policy.critic is not None


def test_a_video_policy_is_evaluated_and_reported(family_folder, tmp_path):
    name = "WanPipeline"
    frozen = FrozenDiffusersPipeline.from_pretrained(family_folder(name), **SIZE[name])
    prompts = ["a red circle", "a blue square"]
    embeds = frozen.encode(prompts)
    policy = SpectralPolicy(latent_shape=frozen.latent_shape, prompt_shape=embeds.prompt_embeds.shape[1:], bands=2)
    policy.mean.bias.data += 1.0
    sweep = evaluate_sweep(
        policy,
        frozen,
        load_reward("frames(brightness)"),
        prompts,
        step_counts=(1,),
        group_size=2,
        guidance_scale=1.0,
        seed=0,
        eval_rewards=[load_reward("frames(red)")],
        embeds=embeds,
    )
    row = sweep.rows[0]
    assert row["num_pairs"] == 4 and row["base"]["diversity"] > 0 and row["eval_rewards"][0]["name"] == "frames(red)"
    assert sweep.pairs[0].policy_image.shape == (SIZE[name]["num_frames"], 3, SIZE[name]["height"], SIZE[name]["width"])
    summary = {
        "images_trained": 1,
        "train_seconds": 1.0,
        "seconds": {},
        "frozen_sha256_after": "0",
        "sweep": sweep.rows,
    }
    write_report(
        tmp_path / "report.html",
        config=TrainConfig.of(num_inference_steps=1).plain(),
        summary=summary,
        metrics=[],
        pairs=sweep.pairs,
    )
    report = (tmp_path / "report.html").read_text()
    data = base64.b64decode(report.split("data:image/gif;base64,")[1].split('"')[0])
    assert Image.open(io.BytesIO(data)).n_frames == SIZE[name]["num_frames"]
