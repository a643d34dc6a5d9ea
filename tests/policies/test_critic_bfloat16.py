"""The sketch that is learned in bfloat16 where the machine has it, and chosen by in float32 everywhere."""

import copy

import torch

from noisepolicy.policies import SpectralPolicy
from noisepolicy.policies.critic import CriticShape, RewardCritic
from noisepolicy.policies.networks import plain_arithmetic

PROMPT_SHAPE = (5, 16)


def make_critic():
    torch.manual_seed(0)
    return RewardCritic(CriticShape(PROMPT_SHAPE, (4, 8, 8), True, (2,)), size=2, channels=16, hidden_width=16)


def inputs():
    generator = torch.Generator().manual_seed(1)
    embeds, action = (torch.randn(6, *shape, generator=generator) for shape in (PROMPT_SHAPE, (4, 8, 8)))
    return embeds, action, torch.zeros(6, dtype=torch.int64)


def test_a_sketch_in_bfloat16_is_float32_and_near():
    critic = make_critic()
    exact = critic.sketch(*inputs())
    critic.sketch.in_bfloat16 = True
    rounded = critic.sketch(*inputs())
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.02


def test_weights_and_gradients_stay_float32():
    critic = make_critic()
    critic.sketch.in_bfloat16 = True
    critic(*inputs()).sum().backward()
    gradients = [parameter.grad for parameter in critic.parameters() if parameter.grad is not None]
    assert gradients and all(gradient.dtype == torch.float32 for gradient in gradients)


def test_a_changed_weight_is_seen():
    critic = make_critic()
    critic.sketch.in_bfloat16 = True
    with plain_arithmetic():
        before = critic.sketch(*inputs())
        critic.sketch.first.weight.data *= 2
        assert not torch.equal(critic.sketch(*inputs()), before)


def test_a_policy_chooses_in_float32():
    critic, policy = make_critic(), SpectralPolicy(bands=8, latent_shape=(4, 8, 8), prompt_shape=PROMPT_SHAPE)
    policy.attach_critic(copy.deepcopy(critic), 32)
    expected = policy.choose(inputs()[0], seed=3)
    critic.sketch.in_bfloat16 = True
    policy.attach_critic(critic, 32)
    assert torch.equal(policy.choose(inputs()[0], seed=3), expected)
