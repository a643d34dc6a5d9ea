"""A policy gives the same bits under any autocast, default dtype, inference mode and gradient mode of its caller."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from diffusers import StableDiffusionPipeline

from noisepolicy.ops.layout import _cached_basis, dct_basis
from noisepolicy.policies import DensePolicy, NoisePolicy, SpectralPolicy, TablePolicy
from noisepolicy.policies.critic import CriticShape, RewardCritic
from noisepolicy.worlds.shapes import model_folder

PROMPT_SHAPE = (20, 128)
CAPTION = "a red circle, a blue square and a green triangle from left to right"


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SURROUNDINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "inference mode": torch.inference_mode,
    "no gradient": torch.no_grad,
    "none": nullcontext,
}


@pytest.fixture(params=SURROUNDINGS)
def surroundings(request):
    return SURROUNDINGS[request.param]


def make_policies():
    options = {"latent_shape": (8, 8, 8), "prompt_shape": PROMPT_SHAPE}
    policies = {
        "spectral": SpectralPolicy(bands=4, **options),
        "std one": SpectralPolicy(bands=4, std="one", **options),
        "dense": DensePolicy(std="learned", **options),
        "dense one": DensePolicy(std="one", **options),
        "table": TablePolicy(prompts=["a", "b", "c"], std="power", **options),
    }
    generator = torch.Generator().manual_seed(1)
    policies["table"].learn_keys(embeds())
    for policy in policies.values():
        shape = CriticShape(PROMPT_SHAPE, policy.action_shape, policy.kind == "spectral", (1, 4))
        policy.attach_critic(RewardCritic(shape, size=2, channels=8, hidden_width=16), 3)
        for parameter in policy.parameters():
            # Small enough that a learned std does not overflow the critic.
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return policies


def embeds():
    return torch.randn(3, *PROMPT_SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


@pytest.mark.parametrize("name", make_policies())
def test_policies_and_critics_compute_the_same_bits(surroundings, name, tmp_path):
    torch.manual_seed(0)
    policy = make_policies()[name]

    def results(policy):
        sample = policy.sample(embeds(), seed=3)
        choice = policy.choose(embeds(), seed=3, num_inference_steps=4)
        values = policy.critic.lower_bound(embeds(), sample.action, torch.zeros(3, dtype=torch.int64))
        return [
            *sample,
            choice,
            *policy(embeds()),
            *values,
            policy.critic(embeds(), sample.action, torch.ones(3).long()),
        ]

    expected = results(policy)
    policy.save_pretrained(tmp_path)
    with surroundings():
        found = results(policy)
        loaded = results(NoisePolicy.from_pretrained(tmp_path))
    for ours, again, wanted in zip(found, loaded, expected, strict=True):
        assert ours.dtype == wanted.dtype == again.dtype
        assert torch.equal(ours, wanted) and torch.equal(again, wanted)


def test_latents_for_a_pipeline_are_the_same(surroundings):
    pipeline = StableDiffusionPipeline.from_pretrained(model_folder())
    torch.manual_seed(0)
    policy = make_policies()["spectral"]

    def latents():
        generators = [torch.Generator().manual_seed(seed) for seed in range(20)]
        return torch.cat([policy.sample_latents(pipeline, CAPTION, generator=generator) for generator in generators])

    expected = latents()
    with surroundings():
        assert torch.equal(latents(), expected)


def test_policies_are_made_in_float32_and_can_be_trained(surroundings):
    with surroundings():
        policies = make_policies()
    for policy in policies.values():
        assert all(parameter.dtype == torch.float32 for parameter in policy.parameters())
        assert not any(tensor.is_inference() for tensor in (*policy.parameters(), *policy.buffers()))
    policy = policies["spectral"].requires_grad_(True)
    policy(embeds())[0].sum().backward()
    assert policy.mean.bias.grad is not None


@pytest.mark.parametrize(
    "move",
    [
        lambda module: module.half(),
        lambda module: module.bfloat16(),
        lambda module: module.double(),
        lambda module: module.to(torch.float16),
        lambda module: module.type(torch.float16),
        lambda module: torch.nn.Sequential(module).half(),
    ],
)
def test_policies_stay_float32(move):
    policy = make_policies()["spectral"]
    for module in (policy, policy.critic):
        with pytest.raises(ValueError, match=r"computes in float32 and cannot be made torch\..*\.to\(device\)"):
            move(module)
    assert all(parameter.dtype == torch.float32 for parameter in policy.parameters())
    assert policy.to("cpu", torch.float32).float() is policy
    assert policy.to("meta").mean.weight.is_meta


def test_a_basis_of_inference_mode_can_be_trained_with():
    _cached_basis.cache_clear()
    shape = CriticShape((6, 16), (4, 4, 4), True, (1,))
    critic = RewardCritic(shape, size=2, channels=8, hidden_width=16)
    inputs = torch.zeros(2, 6, 16), torch.zeros(2, 4, 4, 4, requires_grad=True), torch.zeros(2, dtype=torch.int64)
    with torch.inference_mode():
        critic(*inputs)
    assert not dct_basis(4, 4, torch.device("cpu")).is_inference()
    critic(*inputs).sum().backward()
    assert inputs[1].grad is not None


def test_exporting_leaves_the_basis_as_it_was():
    _cached_basis.cache_clear()
    shape = CriticShape((6, 16), (4, 4, 4), True, (1,))
    critic = RewardCritic(shape, size=2, channels=8, hidden_width=16)
    inputs = torch.zeros(2, 6, 16), torch.randn(2, 4, 4, 4), torch.zeros(2, dtype=torch.int64)
    exported = torch.export.export(critic, inputs, strict=False)
    assert type(dct_basis(4, 4, torch.device("cpu"))) is torch.Tensor
    torch.testing.assert_close(exported.module()(*inputs), critic(*inputs))
