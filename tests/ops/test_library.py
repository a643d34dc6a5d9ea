"""The ops inside torch.compile and torch.export: no graph break, the same numbers, and torch's own checks."""

import pytest
import torch

from noisepolicy.ops import gaussian_log_prob, gaussian_sample, library, ppo_clip_loss, ppo_ratio, spectral_sample


def make_case(log_std_shape=(3, 4, 8, 8)):
    generator = torch.Generator().manual_seed(0)
    latents, mean = torch.randn(2, 3, 4, 8, 8, generator=generator)
    log_std = 0.1 * torch.randn(log_std_shape, generator=generator)
    old_log_prob = gaussian_log_prob(latents, mean, log_std) + torch.tensor([0.0, 0.1, -0.4])
    return latents, mean, log_std, old_log_prob, torch.tensor([1.0, -1.0, 0.5])


def use_every_op(latents, mean, log_std, old_log_prob, advantages):
    loss, stats = ppo_clip_loss(latents, mean, log_std, old_log_prob, advantages, clip_range=0.2, kl_coef=0.1)
    ratio = ppo_ratio(latents, mean, log_std, old_log_prob)
    samples = gaussian_sample(mean, log_std, seed=2**63 + 5, offset=2**64 - 3)
    spectral = spectral_sample(mean, log_std, latent_shape=(4, 16, 16), seed=3)
    return loss + ratio.sum(), stats.ratio, stats.kl_to_prior, stats.approx_kl, *samples, *spectral


@pytest.mark.parametrize("log_std_shape", [(3, 4, 8, 8), (4, 1, 1), ()])
def test_compiled_without_a_graph_break(log_std_shape):
    latents, mean, log_std, *rows = make_case(log_std_shape)
    results, gradients = [], []
    for function in (use_every_op, torch.compile(use_every_op, fullgraph=True, backend="aot_eager")):
        leaves = [tensor.clone().requires_grad_() for tensor in (mean, log_std)]
        outputs = function(latents, *leaves, *rows)
        outputs[0].backward()
        results.append(outputs)
        gradients.append([leaf.grad for leaf in leaves])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_exported():
    class Sampler(torch.nn.Module):
        def forward(self, mean, log_std):
            return gaussian_sample(mean, log_std, seed=1)

    _, mean, log_std, *_ = make_case()
    exported = torch.export.export(Sampler(), (mean, log_std)).module()
    for ours, expected in zip(exported(mean, log_std), gaussian_sample(mean, log_std, seed=1), strict=True):
        assert torch.equal(ours, expected)


def test_torchs_own_checks_of_the_registrations():
    latents, mean, log_std, old_log_prob, advantages = make_case()
    leaves = [tensor.clone().requires_grad_() for tensor in (mean, log_std)]
    arguments = {
        "gaussian_sample": (mean, log_std, 5, 3, "auto"),
        "spectral_sample": (mean, log_std, [1, 16, 16], [1, 8, 8], 5, 3, "auto"),
        "gaussian_log_prob": (latents, *leaves, "auto"),
        "ppo_clip_loss": (latents, *leaves, old_log_prob, advantages, 0.2, 0.1, "auto"),
        "gaussian_backward": (latents, mean, log_std, old_log_prob, advantages, True, "auto"),
    }
    for name, values in arguments.items():
        torch.library.opcheck(getattr(library, name), values)


def test_gradients_flow_twice_through_a_kept_graph():
    latents, mean, log_std, old_log_prob, advantages = make_case()
    leaf = mean.clone().requires_grad_()
    loss, _ = ppo_clip_loss(latents, leaf, log_std, old_log_prob, advantages, clip_range=0.2)
    loss.backward(retain_graph=True)
    once = leaf.grad.clone()
    (3 * loss).backward()
    torch.testing.assert_close(leaf.grad, 4 * once)


def test_a_second_derivative_is_refused():
    latents, mean, log_std, old_log_prob, advantages = make_case()
    leaf = mean.clone().requires_grad_()
    losses = [
        ppo_clip_loss(latents, leaf, log_std, old_log_prob, advantages, clip_range=0.2)[0],
        gaussian_log_prob(latents, leaf, log_std).sum(),
    ]
    for loss in losses:
        (grad,) = torch.autograd.grad(loss**2, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()
