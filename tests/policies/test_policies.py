"""Every policy: the prior at first, its config and weights through a folder, and use with a diffusers pipeline."""

import pytest
import torch

from noisepolicy.ops import dct_basis, gaussian_kl, gaussian_log_prob, gaussian_sample, num_counters
from noisepolicy.policies import DensePolicy, NoisePolicy, SpectralPolicy
from noisepolicy.policies.critic import CriticShape, RewardCritic
from noisepolicy.policies.networks import power_preserving

PROMPT_SHAPE = (6, 16)
POLICIES = [
    (SpectralPolicy, {"latent_shape": (4, 16, 12), "bands": 4}),
    (SpectralPolicy, {"latent_shape": (4, 16, 12), "bands": 4, "std": "learned"}),
    (SpectralPolicy, {"latent_shape": (4, 6, 16, 12), "bands": 4, "std": "learned"}),
    (SpectralPolicy, {"latent_shape": (4, 16, 12), "std": "one"}),
    (DensePolicy, {"latent_shape": (4, 16, 13)}),
    (DensePolicy, {"latent_shape": (4, 5, 3), "std": "learned"}),
]


@pytest.fixture(params=POLICIES, ids=lambda param: f"{param[0].kind}-{len(param[1]['latent_shape'])}d-{len(param[1])}")
def policy(request):
    kind, options = request.param
    return kind(prompt_shape=PROMPT_SHAPE, **options)


@pytest.fixture
def embeds():
    return torch.randn(3, *PROMPT_SHAPE, generator=torch.Generator().manual_seed(0))


def disturb(policy):
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def test_untrained_policy_is_the_prior_bit_for_bit(policy, embeds):
    sample = policy.sample(embeds, seed=5, offset=3)
    prior, _ = gaussian_sample(torch.zeros(3, *policy.latent_shape), torch.zeros(()), seed=5, offset=3)
    assert torch.equal(sample.latents, prior)


def test_sample_has_the_log_prob_of_its_action(policy, embeds):
    disturb(policy)
    sample = policy.sample(embeds, seed=5)
    assert sample.action.shape == (3, *policy.action_shape) and sample.latents.shape == (3, *policy.latent_shape)
    mean, log_std = policy(embeds)
    torch.testing.assert_close(sample.log_prob, gaussian_log_prob(sample.action, mean, log_std), rtol=1e-5, atol=1e-3)


def test_save_and_load(policy, embeds, tmp_path):
    disturb(policy)
    policy.save_pretrained(tmp_path / "policy")
    loaded = NoisePolicy.from_pretrained(tmp_path / "policy")
    assert type(loaded) is type(policy) and loaded.config == policy.config
    assert torch.equal(loaded.sample(embeds, seed=1).latents, policy.sample(embeds, seed=1).latents)


def test_critic_is_saved_with_the_policy(policy, embeds, tmp_path):
    disturb(policy)
    shape = CriticShape(
        prompt_shape=PROMPT_SHAPE,
        action_shape=policy.action_shape,
        is_spectral=policy.kind == "spectral",
        step_counts=(1, 4),
    )
    policy.attach_critic(RewardCritic(shape, size=2, channels=8, hidden_width=16), 3)
    latents = policy.choose(embeds, seed=7, num_inference_steps=8)
    for row in range(3):
        own = row * num_counters(policy.latent_shape)
        further = [2**63 + own * 65536 + number * num_counters(policy.latent_shape) for number in (1, 2)]
        draws = [policy.sample(embeds[row : row + 1], seed=7, offset=offset) for offset in (own, *further)]
        values = [
            policy.critic.lower_bound(embeds[row : row + 1], draw.action, torch.ones(1).long())[0] for draw in draws
        ]
        best = torch.cat(values).argmax()
        torch.testing.assert_close(latents[row], draws[best].latents[0])
    policy.save_pretrained(tmp_path)
    assert torch.equal(NoisePolicy.from_pretrained(tmp_path).choose(embeds, seed=7, num_inference_steps=8), latents)


def test_a_prompt_is_read_once_for_all_its_actions(embeds):
    """Actions of several draws, each of every prompt, as if each prompt were given with each of its actions."""
    torch.manual_seed(0)
    critic = RewardCritic(CriticShape(PROMPT_SHAPE, (3, 6, 8), False, (1, 4)), size=3, channels=8, hidden_width=16)
    action, step_index = torch.randn(2 * len(embeds), 3, 6, 8), torch.arange(len(embeds)) % 2
    alone = torch.stack(
        [critic(embeds[i : i + 1], action[i :: len(embeds)], step_index[i : i + 1]) for i in range(len(embeds))]
    )
    together = critic(embeds, action, step_index)
    torch.testing.assert_close(together.unflatten(1, (2, -1)).permute(2, 0, 1), alone)
    assert together.std(0).min() > 0, "readers are of different weights"


@pytest.mark.parametrize("extent", [(6, 8), (5, 6, 8)], ids=["picture", "clip"])
def test_a_critic_sees_places_in_the_coefficients(extent):
    """With every frequency there is, a spectral critic's sketch is the dense one's of the noise itself."""
    noise = torch.randn(2, 3, *extent, generator=torch.Generator().manual_seed(0))
    coefficients = noise
    for dim, size in enumerate(extent, 2):
        coefficients = (coefficients.movedim(dim, -1) @ dct_basis(size, size, noise.device).T).movedim(-1, dim)
    sketches = []
    for is_spectral, action in ((True, coefficients), (False, noise)):
        torch.manual_seed(0)
        critic = RewardCritic(CriticShape(PROMPT_SHAPE, noise.shape[1:], is_spectral, (1,)), size=2, channels=8)
        sketches.append(critic.sketch(torch.zeros(2, *PROMPT_SHAPE), action, torch.zeros(2, dtype=torch.int64)))
    torch.testing.assert_close(*sketches)
    frames = extent[0] if len(extent) == 3 else 1
    assert sketches[0].shape == (2, 3 * frames, 12, 16) == (2, *critic.shape.sketch_shape)


def test_critic_takes_the_nearest_step_count():
    shape = CriticShape((6, 16), (4, 4, 4), True, (1, 4))
    assert [shape.nearest_step_index(steps) for steps in (1, 3, 4, 50)] == [0, 1, 1, 1]


def test_power_preserving_keeps_a_row_as_loud_as_the_prior():
    shift = (
        torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1.0, 3.0])[:, None, None, None]
    )
    mean, log_std = power_preserving(shift)
    assert log_std.shape == (2, 1, 1, 1)
    torch.testing.assert_close((mean**2).mean((1, 2, 3)) + log_std.exp().flatten() ** 2, torch.ones(2))
    expected = 48 * torch.log1p((shift**2).mean((1, 2, 3))) / 2
    torch.testing.assert_close(gaussian_kl(mean, log_std), expected)


def test_word_order_is_kept(policy):
    disturb(policy)
    embeds = torch.randn(1, *PROMPT_SHAPE, generator=torch.Generator().manual_seed(0))
    swapped = embeds[:, [1, 0, 2, 3, 4, 5]]
    assert not torch.allclose(policy(embeds)[0], policy(swapped)[0])


def test_what_is_no_policy_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"kind": "sorcery"}')
    with pytest.raises(ValueError, match="unknown policy 'sorcery'"):
        NoisePolicy.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"kind": "spectral", "latent_shape": [4, 8, 8], "prompt_shape": [2, 3]}')
    (tmp_path / "policy.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="does not hold a noise policy"):
        NoisePolicy.from_pretrained(tmp_path)


def test_shrinking_meets_the_budget_and_no_more(policy, embeds):
    disturb(policy)
    before = gaussian_kl(*policy(embeds)).mean().item()
    policy.shrink_to(2 * before, embeds)
    assert policy.scale == 1
    policy.shrink_to(before / 3, embeds)
    assert gaussian_kl(*policy(embeds)).mean().item() == pytest.approx(before / 3, rel=1e-3)
