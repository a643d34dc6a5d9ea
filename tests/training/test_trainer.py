"""The loop itself, on a tiny frozen model with no diffusers in it, and on the embedded one."""

import shutil

import pytest
import torch

import noisepolicy
from noisepolicy.ops import gaussian_kl, gaussian_log_prob, ppo_clip_loss

from ..sampling import everyday


@pytest.mark.parametrize(
    "settings",
    everyday(
        [
            {"algorithm": "critic"},
            {"algorithm": "ppo"},
            {"algorithm": "critic", "policy": "dense"},
            {"algorithm": "critic", "num_inference_steps": (1, 2), "std": "learned"},
            {"algorithm": "ppo", "policy": "dense", "std": "learned"},
        ],
        2,
    ),
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)
def test_every_recipe_learns(make_trainer, tmp_path, settings):
    metrics = list(make_trainer(tmp_path, num_iterations=40, **settings))
    start = sum(row["reward"] for row in metrics[:3]) / 3
    end = sum(row["reward"] for row in metrics[-3:]) / 3
    assert end > start + 0.05, (start, end)
    assert [row["iteration"] for row in metrics] == list(range(1, 41))


@pytest.mark.parametrize("algorithm", ["critic", "ppo"])
def test_resumed_run_is_bit_identical(make_trainer, resume_trainer, blob, tmp_path, algorithm):
    settings = {"algorithm": algorithm, "num_iterations": 8, "checkpoint_every": 3}
    whole = make_trainer(tmp_path / "whole", **settings)
    all_metrics = list(whole)
    for metrics in make_trainer(tmp_path / "running", **settings):
        if metrics["iteration"] == 5:  # two iterations after the last checkpoint
            shutil.copytree(tmp_path / "running", tmp_path / "killed")
            break
    encoded = []

    class Watched(blob[0]):
        def encode(self, prompts):
            encoded.extend(prompts)
            return super().encode(prompts)

    resumed = resume_trainer(tmp_path / "killed", frozen=Watched())
    assert resumed.iteration == 3
    assert len(encoded) < 10, "it read what it had encoded; only the sample pictures' prompts are encoded again"
    list(resumed)
    for name, parameter in whole._learner.policy.state_dict().items():
        assert torch.equal(parameter, resumed._learner.policy.state_dict()[name]), name
    assert resumed._folder.read_metrics() == all_metrics


@pytest.mark.parametrize("settings", [{}, {"std": "one"}, {"policy": "dense"}])
def test_gradient_accumulation_takes_the_same_steps(make_trainer, tmp_path, settings, monkeypatch):
    """In parts of 10, 11 and 11 of the 32 rows."""
    sizes = set()

    def watched(latents, *arguments, **options):
        sizes.add(len(latents))
        return ppo_clip_loss(latents, *arguments, **options)

    whole = make_trainer(tmp_path / "whole", algorithm="ppo", num_iterations=4, **settings)
    list(whole)
    monkeypatch.setattr("noisepolicy.training.noise_ppo.ppo_clip_loss", watched)
    parts = make_trainer(
        tmp_path / "parts", algorithm="ppo", num_iterations=4, gradient_accumulation_steps=3, **settings
    )
    list(parts)
    assert sizes == {11, 10}
    for expected, ours in zip(whole._folder.read_metrics(), parts._folder.read_metrics(), strict=True):
        assert ours == pytest.approx(expected, rel=1e-3, abs=1e-4)
    embeds = whole._task.frozen.encode(whole._task.train_prompts).prompt_embeds
    assert torch.allclose(whole._learner.policy(embeds)[0], parts._learner.policy(embeds)[0], atol=1e-4)


def test_seeds_differ_and_repeat(make_trainer, tmp_path):
    def final(folder, seed):
        trainer = make_trainer(tmp_path / folder, seed=seed, num_iterations=4)
        list(trainer)
        return torch.cat([parameter.flatten() for parameter in trainer._learner.policy.parameters()])

    first, again, other = final("a", 0), final("b", 0), final("c", 1)
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("settings", [{}, {"policy": "dense"}, {"std": "learned"}, {"algorithm": "ppo"}])
def test_training_stays_within_its_kl_budget(make_trainer, tmp_path, settings):
    settings |= {"num_iterations": 12, "learning_rate": 1e-2, "target_kl": 10.0}
    free = list(make_trainer(tmp_path / "free", kl_training_budget=50.0, **settings))
    held = list(make_trainer(tmp_path / "held", kl_training_budget=0.2, **settings))
    assert free[-1]["kl_to_prior"] > 0.4
    assert 0.18 < held[-1]["kl_to_prior"] <= 0.2 + 1e-4, "at the budget's edge, not below it"


def test_the_critics_learning_rate_ends_low_also_in_a_run_made_longer(make_trainer, resume_trainer, tmp_path):
    def rate(run):
        return run._learner._critic_optimizers["critic_muon"].param_groups[0]["lr"]

    run = make_trainer(tmp_path, num_iterations=4)
    rates = [rate(run) for _ in run]
    assert rates[0] == rates[1] == rates[2] > 4 * rates[3] / 3.5 > 0
    longer = resume_trainer(tmp_path, num_iterations=40)
    assert max(rate(longer) for _ in longer) == rates[0]
    assert rate(longer) < rates[0] / 10


def test_a_finished_run_can_be_given_another_budget(make_trainer, resume_trainer, tmp_path):
    """The weights stay; the policy that is kept is scaled anew, and written to the folder."""
    run = make_trainer(tmp_path, num_iterations=12, learning_rate=1e-2, kl_budget=0.4)
    list(run)
    run.finish()
    resumed = resume_trainer(tmp_path, kl_budget=0.1, num_candidates=3)
    assert not (tmp_path / "summary.json").exists(), "it was about another policy"
    resumed.finish()
    again = resume_trainer(tmp_path)
    assert again.config.kl_budget == 0.1, "a run keeps what it is given"
    kept = noisepolicy.load(tmp_path / "policy")
    embeds = resumed._task.frozen.encode(resumed._task.train_prompts).prompt_embeds
    assert 0.09 < gaussian_kl(*kept(embeds)).mean() < 0.11 < gaussian_kl(*run.policy(embeds)).mean()
    assert (kept.num_candidates, run.policy.num_candidates) == (3, 256)
    assert torch.equal(kept.mean.weight, run.policy.mean.weight)


def test_diversity_is_held_to_its_target(make_trainer, tmp_path):
    """The coefficient falls while there is more variety than asked for and rises while there is less."""
    settings = {"num_iterations": 30, "learning_rate": 2e-3, "kl_training_budget": 200.0, "diversity_coef": 1.5}
    low = list(make_trainer(tmp_path / "low", diversity_target=0.05, **settings))
    high = list(make_trainer(tmp_path / "high", diversity_target=1.0, **settings))
    assert low[-1]["diversity_coef"] < 1.5 < high[-1]["diversity_coef"]
    kept = [sum(row["diversity_kept"] for row in rows[-10:]) / 10 for rows in (low, high)]
    assert kept[0] < kept[1] - 0.02, kept


@pytest.mark.parametrize("algorithm", ["critic", "ppo"])
def test_updates_stop_at_the_target_kl_and_come_back_to_it(make_trainer, tmp_path, algorithm):
    settings = {"algorithm": algorithm, "num_updates": 10, "num_iterations": 8, "learning_rate": 3e-3}
    free = list(make_trainer(tmp_path / "free", target_kl=1e9, **settings))
    held = list(make_trainer(tmp_path / "held", target_kl=0.01, **settings))
    assert max(row["step_kl"] for row in held) <= 0.02
    assert free[-1]["step_kl"] > 0.06 and held[-1]["step_kl"] > 0.002


def test_the_average_remembers_little_at_the_start(make_trainer, tmp_path):
    """A tenth of the initial weights after the first iteration, two elevenths of that after the second."""
    trainer = make_trainer(tmp_path, algorithm="ppo", num_iterations=2)
    expected = trainer._learner.policy.mean.bias.detach().clone()
    for _, decay in zip(trainer, (1 / 10, 2 / 11), strict=True):
        expected.lerp_(trainer._learner.policy.mean.bias.detach(), 1 - decay)
        torch.testing.assert_close(trainer._learner.average.mean.bias, expected)


def test_first_ratio_is_one(make_trainer, tmp_path, monkeypatch):
    """Watches every loss call of an iteration: the first sees the policy that made the batch."""
    ratios = []

    def watched(*args, **kwargs):
        loss, stats = ppo_clip_loss(*args, **kwargs)
        ratios.append(stats.ratio)
        return loss, stats

    monkeypatch.setattr("noisepolicy.training.noise_ppo.ppo_clip_loss", watched)
    trainer = make_trainer(tmp_path, algorithm="ppo", num_iterations=4, num_updates=3, target_kl=1e9)
    for _ in trainer:
        if ratios:
            assert (ratios[0] - 1).abs().max() <= 1e-6
            assert (ratios[1] - 1).abs().max() > 1e-6
            ratios.clear()


def test_an_action_of_another_policy_is_noticed(make_trainer, tmp_path):
    """Plants the bug: the rollout was made by other weights than the update starts from."""
    trainer = make_trainer(tmp_path, algorithm="ppo")
    rollout = trainer.roll_out(0)
    mean, log_std = trainer._learner.policy(trainer._prompts[rollout.prompt_row].prompt_embeds)
    assert torch.allclose(rollout.log_prob, gaussian_log_prob(rollout.action, mean, log_std), atol=1e-3)
    trainer._learner.policy.mean.bias.data += 0.1
    with pytest.raises(RuntimeError, match="log-probs of the rollout"):
        trainer._learner.learn(rollout, 20)


def test_the_critic_chooses_better_starts(make_trainer, tmp_path):
    """Chosen draws of a policy have more of the real reward than its first draws; one candidate is the plain draw."""
    trainer = make_trainer(tmp_path, num_iterations=40, kl_budget=0.1)
    list(trainer)
    policy, frozen, prompts = trainer.policy, trainer._task.frozen, list(trainer._task.train_prompts) * 32
    embeds = frozen.encode(prompts)

    def mean_reward(latents):
        images = frozen.generate(latents, embeds, num_inference_steps=1, guidance_scale=1)
        return trainer._task.reward(images, prompts).mean()

    chosen = policy.choose(embeds.prompt_embeds, seed=3)
    policy.num_candidates = 1
    plain = policy.choose(embeds.prompt_embeds, seed=3)
    assert torch.equal(plain, policy.sample(embeds.prompt_embeds, seed=3).latents)
    assert mean_reward(chosen) > mean_reward(plain) + 0.02
