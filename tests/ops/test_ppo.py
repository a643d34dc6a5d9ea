"""The fused loss against PPO written out in float64 with torch.distributions."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from noisepolicy.ops import gaussian_log_prob, gaussian_sample, ppo_clip_loss

BACKENDS = ["cpp", "torch"]


def make_case(shape, dtype=torch.float32, log_std_shape=()):
    generator = torch.Generator().manual_seed(0)
    old_mean = (0.1 * torch.randn(shape, generator=generator)).to(dtype)
    log_std = (0.1 * torch.randn(log_std_shape, generator=generator)).to(dtype)
    latents, old_log_prob = gaussian_sample(old_mean, log_std, seed=1)
    size = torch.Size(shape[1:]).numel()
    mean = (old_mean.float() + 0.3 * size**-0.5 * torch.randn(shape, generator=generator)).to(dtype)
    return latents, mean, log_std, old_log_prob, torch.randn(shape[0], generator=generator)


def exact_loss(latents, mean, log_std, old_log_prob, advantages, clip_range, kl_coef):
    policy = Normal(mean, log_std.exp().expand(mean.shape))
    ratio = (policy.log_prob(latents.double()).flatten(1).sum(1) - old_log_prob.double()).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    kl = kl_divergence(policy, Normal(torch.zeros_like(mean), 1.0)).flatten(1).sum(1)
    surrogate = torch.minimum(ratio * advantages.double(), clipped * advantages.double())
    return -surrogate.mean() + kl_coef * kl.mean(), ratio, kl


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "log_std_shape"),
    [((16, 5), ()), ((7, 123), (7, 123)), ((9, 4, 16, 16), (9, 4, 1, 1)), ((6, 2, 3, 4, 5), (6, 1, 1, 1, 1))],
)
def test_loss_statistics_and_gradients(backend, dtype, shape, log_std_shape):
    latents, mean, log_std, old_log_prob, advantages = make_case(shape, dtype, log_std_shape)
    ours = [tensor.clone().requires_grad_() for tensor in (mean, log_std)]
    loss, stats = ppo_clip_loss(latents, *ours, old_log_prob, advantages, clip_range=0.2, kl_coef=0.05, backend=backend)
    (0.5 * loss).backward()
    oracle = [tensor.double().requires_grad_() for tensor in (mean, log_std)]
    expected, ratio, kl = exact_loss(latents, *oracle, old_log_prob, advantages, 0.2, 0.05)
    (0.5 * expected).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats.ratio.double(), ratio, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(stats.kl_to_prior.double(), kl, rtol=1e-5, atol=1e-5)
    assert stats.clip_fraction.item() == pytest.approx(((ratio - 1).abs() > 0.2).double().mean().item())
    assert 0 < stats.clip_fraction < 1, "the case must exercise both branches"
    tolerance = {"rtol": 1e-3, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-3}
    for leaf, exact in zip(ours, oracle, strict=True):
        assert leaf.grad.dtype == dtype
        torch.testing.assert_close(leaf.grad.double(), exact.grad, **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ratio_is_one_before_the_first_update(backend):
    latents, mean, log_std, _, advantages = make_case((32, 8, 8, 8))
    old_log_prob = gaussian_log_prob(latents, mean, log_std, backend=backend)
    _, stats = ppo_clip_loss(latents, mean, log_std, old_log_prob, advantages, clip_range=0.2, backend=backend)
    assert (stats.ratio - 1).abs().max() <= 1e-6
    assert stats.approx_kl == 0 and stats.clip_fraction == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_clipped_rows_have_no_gradient(backend):
    mean = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]], requires_grad=True)
    latents = torch.full((4, 1), 1.0)
    old_log_prob = gaussian_log_prob(latents, torch.zeros(4, 1), torch.zeros(()))  # ratios e^.5, e^.5, e^-1.5, e^-1.5
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, _ = ppo_clip_loss(
        latents + torch.tensor([[0.0], [0.5], [0.0], [0.0]]),
        mean,
        torch.zeros(()),
        old_log_prob,
        advantages,
        clip_range=0.2,
        backend=backend,
    )
    loss.backward()
    # Too far in the direction its advantage asks for: clipped. Too far against it: still pulled back.
    assert (mean.grad[:, 0] != 0).tolist() == [False, True, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    empty, rows = torch.zeros(0, 4, requires_grad=True), torch.zeros(0)
    loss, stats = ppo_clip_loss(torch.zeros(0, 4), empty, torch.zeros(()), rows, rows, clip_range=0.2, backend=backend)
    assert loss == 0 and stats.ratio.shape == (0,) and stats.approx_kl == 0
    loss.backward()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("clip_range", 0.0, "clip_range must be positive"),
        ("old_log_prob", torch.zeros(3), "old_log_prob must be float32 of shape"),
        ("advantages", torch.zeros(2, dtype=torch.float64), "advantages must be float32"),
        ("latents", torch.zeros(2, 5), "latents must be float32 of shape"),
    ],
)
def test_bad_arguments_are_named(name, value, message):
    arguments = {
        "latents": torch.zeros(2, 4),
        "mean": torch.zeros(2, 4),
        "log_std": torch.zeros(()),
        "old_log_prob": torch.zeros(2),
        "advantages": torch.zeros(2),
        "clip_range": 0.2,
    } | {name: value}
    with pytest.raises(ValueError, match=message):
        ppo_clip_loss(**arguments)
