"""A reward's units: the same policy from `a * reward + b`, parts in units of their own, outliers, nothing to learn."""

import warnings

import pytest
import torch
from scipy import stats

from noisepolicy.rewards import Reward
from noisepolicy.rewards.base import RewardScale, WeightedSum, measure_spread
from noisepolicy.training.run_folder import RunFolder

ALGORITHMS = {
    "critic": {},
    "ppo": {"algorithm": "ppo", "group_size": 8},
    "find": {"algorithm": "find", "batch_size": None},
}
UNITS = [(4.0, 0.0), (2.0**-13, 0.0), (0.03, 0.0), (30.0, 0.0), (1e-4, 0.0), (1e4, 0.0), (1.0, 20.0), (1e4, -100.0)]


def trained_weights(trainer, num_iterations=5):
    for metrics in trainer:
        if metrics["iteration"] == num_iterations:
            break
    return torch.cat([parameter.detach().flatten() for parameter in trainer._learner.policy.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_policy_does_not_depend_on_the_reward_s_units(make_trainer, blob, tmp_path, algorithm):
    _, reward = blob
    settings = ALGORITHMS[algorithm]
    weights = trained_weights(make_trainer(tmp_path / "plain", **settings))
    assert weights.abs().max() > 0.01
    for number, (factor, offset) in enumerate(UNITS):
        trainer = make_trainer(
            tmp_path / str(number),
            reward=lambda images, prompts, a=factor, b=offset: a * reward(images, prompts).double() + b,
            **settings,
        )
        # To the bit even where the factor is no power of two: float64 scales and float32 takes the difference.
        assert torch.equal(trained_weights(trainer), weights), (factor, offset)


def test_a_float32_reward_far_from_zero_is_learned_from_as_well(make_trainer, blob, tmp_path):
    """1e-4 * reward + 100 has a dozen different values in float32; the rewards' order is left, and is enough."""
    _, reward = blob
    near = trained_weights(make_trainer(tmp_path / "near"))
    far = trained_weights(make_trainer(tmp_path / "far", reward=lambda *inputs: (1e-4 * reward(*inputs) + 100).float()))
    assert torch.nn.functional.cosine_similarity(near, far, 0) > 0.9


def test_a_resumed_run_has_the_scale_it_had(make_trainer, resume_trainer, tmp_path):
    whole = list(make_trainer(tmp_path / "whole", algorithm="ppo", num_iterations=10))
    first = make_trainer(tmp_path / "halves", algorithm="ppo", num_iterations=5)
    list(first)
    second = resume_trainer(tmp_path / "halves", num_iterations=10)
    assert second._learner._scale.spread == first._learner._scale.spread
    list(second)
    assert RunFolder(tmp_path / "halves").read_metrics() == whole


def test_spreads_of_normal_numbers():
    """Against the standard deviations the numbers were drawn with: 3 between prompts and 0.5 within."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(4096, 1, generator=generator, dtype=torch.float64)
    images = torch.randn(4096, 4, generator=generator, dtype=torch.float64)
    spread = measure_spread((20 + 3 * prompts + 0.5 * images).flatten(), 4)
    # Cutting 2.5% off both ends of a normal distribution leaves 0.94 of its standard deviation.
    assert spread.center == pytest.approx(20, abs=0.1)
    assert spread.total == pytest.approx((9 + 0.25) ** 0.5, rel=0.1)
    assert spread.within == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("outliers", [[1e6], [-1e6, 1e6], [1e30] * 10])
def test_outliers_do_not_move_the_spread(outliers):
    numbers = torch.randn(1024, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = measure_spread(numbers, 2)
    numbers[:: 1024 // len(outliers)][: len(outliers)] = torch.tensor(outliers, dtype=torch.float64)
    assert measure_spread(numbers, 2) == pytest.approx(plain, rel=0.1, abs=0.05)


def test_rare_successes_have_a_spread():
    """One image in a hundred: less than the share that counts as outliers, and all there is to learn from."""
    rewards = torch.zeros(1000, dtype=torch.float64)
    rewards[::100] = 1.0
    spread = measure_spread(rewards, 2)
    assert spread.within == pytest.approx(stats.bernoulli(0.01).std(), rel=0.1)


def test_equal_rewards_have_no_spread():
    """The mean of equal numbers may differ from them in its last bit, which is no difference to learn from."""
    for group_size in (1, 3, 5):
        assert measure_spread(torch.full((15,), 0.1, dtype=torch.float64), group_size)[1:] == (0.0, 0.0)
    within = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64).repeat_interleave(5)
    assert measure_spread(within, 5).within == 0.0 and measure_spread(within, 5).total > 0.05


def test_heavy_tailed_rewards_are_learned_from(make_trainer, blob, tmp_path):
    """Student's t with 1.5 degrees of freedom, and every fiftieth image a thousand off."""
    _, reward = blob
    generator = torch.Generator().manual_seed(0)
    noise = iter(torch.from_numpy(stats.t(1.5).rvs(100_000, random_state=0)).unbind())

    def heavy(images, prompts):
        drawn = torch.stack([next(noise) for _ in prompts])
        off = 1000.0 * (torch.rand(len(prompts), generator=generator) < 0.02)
        return reward(images, prompts).double() + 0.01 * drawn + off

    trainer = make_trainer(tmp_path, reward=heavy, num_iterations=30)
    list(trainer)
    clean = make_trainer(tmp_path / "clean")
    gain = [
        reward(images_of(start, clean), list(clean._task.train_prompts) * 64).mean().item()
        for start in (clean.policy, trainer.policy)
    ]
    assert gain[1] > gain[0] + 0.04


def images_of(policy, trainer):
    prompts = list(trainer._task.train_prompts) * 64
    embeds = trainer._task.frozen.encode(prompts)
    latents = policy.choose(embeds.prompt_embeds, seed=5)
    return trainer._task.frozen.generate(latents, embeds, num_inference_steps=1, guidance_scale=1.0)


def sum_of_bright_and_red(factor):
    """Two parts, of which the first has `factor` times the spread."""
    bright = Reward("bright", lambda images, prompts: factor * images.mean((1, 2, 3)).double())
    red = Reward("red", lambda images, prompts: images[:, 0].mean((1, 2)).double() - images[:, 1].mean((1, 2)).double())
    return WeightedSum("bright + red", [(1.0, bright), (1.0, red)])


def test_each_part_of_a_sum_has_its_own_unit(make_trainer, tmp_path):
    """If one part varies 1,000 times as much as the other, `each` raises both and `sum` follows the large one."""
    rises = {}
    for mode in ("each", "sum"):
        trainer = make_trainer(
            tmp_path / mode, reward=sum_of_bright_and_red(1000.0), normalize_rewards=mode, num_iterations=30
        )
        metrics = list(trainer)
        rises[mode] = {
            name: sum(row[f"reward/{name}"] for row in metrics[-5:]) / 5 - metrics[0][f"reward/{name}"]
            for name in ("bright", "red")
        }
        total = metrics[-1]["reward/bright"] + metrics[-1]["reward/red"]
        assert metrics[-1]["reward"] == pytest.approx(total)
    assert rises["each"]["bright"] > 20 and rises["each"]["red"] > 0.02
    # Not by nothing: what is brighter is redder too.
    assert rises["sum"]["bright"] > 20 and rises["sum"]["red"] < rises["each"]["red"] / 1.5


def test_a_weight_is_a_share_where_each_part_is_normalised():
    parts = torch.randn(512, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scales = [RewardScale({"a": 3.0, "b": 1.0}, 2, "each") for _ in range(2)]
    scales[0].update(parts)
    scales[1].update(parts * torch.tensor([1000.0, 1.0]))
    first, second = scales[0].standardise(parts), scales[1].standardise(parts * torch.tensor([1000.0, 1.0]))
    torch.testing.assert_close(first, second)
    assert torch.corrcoef(torch.stack([first.double(), parts[:, 0]]))[0, 1] > 0.9


def test_none_leaves_the_units_alone():
    scale = RewardScale({"a": 2.0}, 2, "none")
    parts = torch.tensor([[1.0], [1e6]], dtype=torch.float64)
    scale.update(parts)
    assert scale.standardise(parts).tolist() == [2.0, 2e6] and scale.within_share == 1.0


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda images, prompts: [0.5] * len(prompts), "it gave 0.5 to every image"),
        (lambda images, prompts: [float(len(prompt)) for prompt in prompts], "the same to every image of a prompt"),
    ],
)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_nothing_to_learn_is_said_once(make_trainer, tmp_path, reward, message, algorithm):
    trainer = make_trainer(tmp_path, reward=reward, **{"num_iterations": 6, **ALGORITHMS[algorithm]})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(trainer)
    told = [str(warning.message) for warning in caught if "nothing can be learned" in str(warning.message)]
    assert len(told) == 1 and message in told[0]


def test_a_reward_to_learn_from_is_not_warned_of(make_trainer, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(make_trainer(tmp_path, num_iterations=4))


def test_a_critic_s_predictions_survive_a_change_of_scale(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, num_iterations=4)
    list(trainer)
    critic, rows = trainer._learner._critic, torch.arange(4)
    embeds = trainer._prompts[rows].prompt_embeds.float()
    inputs = embeds, torch.randn(4, *trainer._learner.policy.action_shape), torch.zeros(4, dtype=torch.int64)
    with torch.no_grad():
        before = critic.in_reward_units(critic(*inputs))
        critic.set_scale(critic.reward_center.item() + 0.3, critic.reward_spread.item() * 3)
        torch.testing.assert_close(critic.in_reward_units(critic(*inputs)), before, rtol=1e-4, atol=1e-5)
