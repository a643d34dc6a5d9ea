"""FIND: that it learns, resumes, and has none of the faults of the method's released script."""

import shutil

import pytest
import torch

from noisepolicy.ops import gaussian_kl, gaussian_log_prob, ppo_clip_loss
from noisepolicy.policies import NoisePolicy, SpectralPolicy
from noisepolicy.training.find import Replay

FIND = {"algorithm": "find", "group_size": 16, "batch_size": None, "num_iterations": 12}


def embeds_of(trainer):
    return trainer._task.frozen.encode(trainer._task.train_prompts).prompt_embeds


@pytest.mark.parametrize(
    "settings",
    [{}, {"policy": "spectral"}, {"std": "learned"}, {"std": "one"}, {"num_inference_steps": (1, 2)}],
    ids=lambda settings: "-".join(str(value) for value in settings.values()) or "default",
)
def test_every_prompt_learns(make_trainer, tmp_path, settings):
    trainer = make_trainer(tmp_path, **(FIND | settings))
    metrics = list(trainer)
    assert metrics[-1]["reward"] > metrics[0]["reward"] + 0.05
    assert trainer.images_trained == 12 * 4 * 16
    kept = NoisePolicy.from_pretrained(tmp_path / "policy")
    assert (gaussian_kl(*kept(embeds_of(trainer))) > 0.5).all()


def test_before_training_it_is_the_prior(make_trainer, tmp_path):
    policy = make_trainer(tmp_path, **FIND)._learner.policy
    mean, log_std = policy.distribution(torch.arange(4))
    assert not mean.any() and not log_std.any()


def test_a_prompt_learns_the_same_in_any_company(make_trainer, tmp_path):
    """Rows do not touch one another: with the same noise and advantages, a row's step is its own."""
    rows = []
    for number, prompts in enumerate(([0, 1, 2, 3], [0])):
        trainer = make_trainer(tmp_path / str(number), **FIND)
        rollout = trainer.roll_out(0)
        prompt = torch.arange(4)
        names = ("action", "log_prob", "parts", "step_index")
        columns = {name: getattr(rollout, name).unflatten(0, (-1, 16)) for name in names}
        trainer._learner._replay.append(prompt, **columns)
        trainer._learner._update(torch.tensor(prompts), torch.Generator())
        rows.append(trainer._learner.policy.mean[0].detach())
    torch.testing.assert_close(*rows)


def test_resumed_run_is_bit_identical(make_trainer, resume_trainer, tmp_path):
    whole = make_trainer(tmp_path / "whole", **FIND)
    all_metrics = list(whole)
    for metrics in make_trainer(tmp_path / "running", **FIND):
        if metrics["iteration"] == 8:  # three iterations after the last checkpoint
            shutil.copytree(tmp_path / "running", tmp_path / "killed")
            break
    resumed = resume_trainer(tmp_path / "killed")
    assert resumed.iteration == 5
    list(resumed)
    for name, value in whole._learner.policy.state_dict().items():
        assert torch.equal(value, resumed._learner.policy.state_dict()[name]), name
    assert resumed._folder.read_metrics() == all_metrics


def test_a_batch_of_some_prompts_goes_round(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, **(FIND | {"batch_size": 48}))
    assert [trainer._learner.draw_prompts(number) for number in range(3)] == [[0, 1, 2], [3, 0, 1], [2, 3, 0]]
    assert len(list(trainer)) == 12
    with pytest.raises(ValueError, match="more than a group of 16 for each of 4 prompts"):
        make_trainer(tmp_path / "large", **(FIND | {"batch_size": 80}))


def test_it_starts_from_a_policy_and_follows_its_critic(make_trainer, resume_trainer, tmp_path):
    """The run keeps what it started from; and with no sample in use, the critic alone improves the policy."""
    list(make_trainer(tmp_path / "amortised", num_iterations=40, critic_updates=20, kl_budget=0.2))
    start = NoisePolicy.from_pretrained(tmp_path / "amortised" / "policy")
    settings = FIND | {"init_policy": tmp_path / "amortised", "max_log_ratio": 1e-12, "num_updates": 3}
    trainer = make_trainer(tmp_path / "find", **settings)
    for ours, theirs in zip(trainer._learner.policy(embeds_of(trainer)), start(embeds_of(trainer)), strict=True):
        torch.testing.assert_close(ours, theirs)
    metrics = list(trainer)
    assert metrics[-1]["reward"] > metrics[0]["reward"] + 0.02
    assert trainer.policy.critic is not None

    shutil.rmtree(tmp_path / "amortised")
    resumed = resume_trainer(tmp_path / "find")
    assert torch.equal(resumed._learner.policy.mean, trainer._learner.policy.mean)


def test_a_critic_is_asked_about_the_nearest_of_its_step_counts(make_trainer, tmp_path):
    list(make_trainer(tmp_path / "amortised", num_iterations=4, num_inference_steps=(1, 8)))
    settings = FIND | {"init_policy": tmp_path / "amortised", "num_inference_steps": (1, 2, 4, 16), "num_iterations": 2}
    trainer = make_trainer(tmp_path / "find", **settings)
    assert trainer._learner._critic_steps(torch.arange(4)).tolist() == [0, 0, 1, 1]
    assert len(list(trainer)) == 2


def test_a_policy_of_another_model_is_refused(make_trainer, tmp_path):
    other = SpectralPolicy(latent_shape=(3, 8, 8), prompt_shape=(3, 3))
    other.save_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match=r"is for latents \(3, 8, 8\)"):
        make_trainer(tmp_path / "find", **FIND, init_policy=tmp_path / "policy")
    with pytest.raises(ValueError, match="holds no policy"):
        make_trainer(tmp_path / "find", **FIND, init_policy=tmp_path / "nothing")


def test_prompts_that_the_text_encoder_takes_for_one_are_refused(make_trainer, tmp_path):
    with pytest.raises(ValueError, match="takes 'bb' and 'zz' for the same prompt"):
        make_trainer(tmp_path, **FIND, prompts=["a", "bb", "zz"])


def test_a_solved_prompt_stays_where_it_is(make_trainer, tmp_path):
    """Its rewards do not vary: what is left of the calibrator's error must not be taken for an advantage."""

    def solved_or_not(images, prompts):
        brightness = images.mean((1, 2, 3))
        return torch.where(torch.tensor([prompt == "a" for prompt in prompts]), 1.0, brightness)

    trainer = make_trainer(tmp_path, **FIND, reward=solved_or_not)
    list(trainer)
    kl = gaussian_kl(*trainer._learner.policy.distribution(torch.arange(4)))
    assert kl[0] < kl[1:].min()


def test_what_the_step_count_explains_is_no_advantage(make_trainer, blob, tmp_path, monkeypatch):
    """A reward that grows with the step count by more than it varies: the runs with and without it learn alike."""
    model, left_or_right = blob
    step, plain = [0], model.generate

    def remember(self, *arguments, num_inference_steps, **options):
        step[0] = num_inference_steps
        return plain(self, *arguments, num_inference_steps=num_inference_steps, **options)

    monkeypatch.setattr(model, "generate", remember)
    ends = []
    for offset in (0.0, 0.1):
        trainer = make_trainer(
            tmp_path / str(offset),
            **FIND,
            num_inference_steps=(1, 8),
            reward=lambda images, prompts, offset=offset: left_or_right(images, prompts) + offset * (step[0] == 8),
        )
        metrics = list(trainer)
        ends.append(metrics[-1]["reward"] - metrics[0]["reward"])
    assert ends[1] > 0.8 * ends[0] > 0.03


def test_the_log_prob_is_a_sum_over_dimensions(make_trainer, tmp_path):
    """The script's is their mean, and its clip never binds."""
    trainer = make_trainer(tmp_path, **FIND)
    list(trainer)
    rollout = trainer.roll_out(12)
    mean, log_std = trainer._learner.policy.distribution(rollout.prompt_row)
    log_std = log_std.expand_as(mean)
    exact = torch.distributions.Normal(mean.double(), log_std.double().exp()).log_prob(rollout.action.double())
    torch.testing.assert_close(rollout.log_prob.double(), exact.flatten(1).sum(1), atol=1e-3, rtol=1e-5)


def test_ratios_are_against_the_distribution_a_sample_was_drawn_from(make_trainer, tmp_path):
    """The script's are against N(0, I) for ever."""
    trainer = make_trainer(tmp_path, **(FIND | {"replay": 2, "num_iterations": 8}))
    drawn = []
    for _ in trainer:
        drawn.append({name: value.clone() for name, value in trainer._learner._replay.state().items()})
    samples, is_filled = trainer._learner._replay.of(torch.arange(4))
    assert is_filled.all()
    # Half of the ring is of the iteration before: its log-probs have not been refreshed.
    kept = (samples["log_prob"] == drawn[-2]["log_prob"]).float().mean()
    assert kept == 0.5
    prior = gaussian_log_prob(samples["action"].flatten(0, 1), torch.zeros(128, 2, 8, 8), torch.zeros(()))
    assert ((samples["log_prob"].flatten() - prior).abs() > 0.05).float().mean() > 0.9


def test_samples_keep_their_own_rewards(make_trainer, tmp_path):
    """The script pairs the newest noise with the oldest reward of its buffer."""
    trainer = make_trainer(tmp_path, **FIND)
    list(trainer)
    samples, _ = trainer._learner._replay.of(torch.arange(4))
    prompts = [prompt for prompt in trainer._task.train_prompts for _ in range(samples["parts"].shape[1])]
    embeds = trainer._task.frozen.encode(prompts)
    images = trainer._task.frozen.generate(
        samples["action"].flatten(0, 1), embeds, num_inference_steps=2, guidance_scale=1.5
    )
    torch.testing.assert_close(trainer._task.reward(images, prompts), samples["parts"].flatten())


def test_the_clip_is_pessimistic_and_binds(make_trainer, tmp_path):
    """A bad sample whose ratio has grown still pushes back, a good one does not; the script's clip has no min."""
    trainer = make_trainer(tmp_path, **(FIND | {"replay": 1, "num_updates": 4, "learning_rate": 0.03}))
    assert max(metrics["clip_fraction"] for metrics in trainer) > 0.05
    mean = torch.zeros(2, 4, requires_grad=True)
    action = torch.ones(2, 4)
    log_prob = gaussian_log_prob(action, mean.detach(), torch.zeros(()))
    loss, _ = ppo_clip_loss(
        action, mean, torch.zeros(()), log_prob - 1, torch.tensor([1.0, -1.0]), clip_range=0.2
    )  # ratio e
    loss.backward()
    assert not mean.grad[0].any() and (mean.grad[1] > 0).all()


def test_samples_outside_the_trust_region_are_dropped(make_trainer, tmp_path):
    settings = FIND | {"replay": 4, "num_updates": 1}
    near = make_trainer(tmp_path / "near", **settings, max_log_ratio=1e-3)
    far = make_trainer(tmp_path / "far", **settings, max_log_ratio=1e6)
    used = [list(trainer)[-1]["used_fraction"] for trainer in (near, far)]
    assert used[0] <= 0.3 and used[1] == 1.0


def test_replay_is_a_ring():
    replay = Replay(2, 3, (1,), num_parts=1, device=torch.device("cpu"))

    def add(prompt, *values):
        column = torch.tensor([values])
        replay.append(
            torch.tensor([prompt]),
            action=column[..., None].float(),
            log_prob=column.float(),
            parts=column[..., None].double(),
            step_index=column,
        )

    add(1, 1, 2)
    samples, is_filled = replay.of(torch.tensor([0, 1]))
    assert is_filled.tolist() == [[False] * 3, [True, True, False]]
    add(1, 3, 4)
    samples, is_filled = replay.of(torch.tensor([1]))
    assert samples["parts"].tolist() == [[[4.0], [2.0], [3.0]]] and is_filled.all()
