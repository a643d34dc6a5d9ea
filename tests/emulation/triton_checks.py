"""Checks of the Triton backend against the reference, for processes where Triton's interpreter stands for the GPU.

Every tensor that the backend allocates lies between guards and is filled with NaN, so an element that is not written,
is written beyond the end or is read before it is written shows.
"""

import torch

from noisepolicy.ops import layout, reference, triton_backend

GUARD, GUARD_VALUE = 64, 12345.0


class GuardedAllocator:
    """Stands for `triton_backend._empty`."""

    def __init__(self):
        self.buffers = []

    def __call__(self, like, *shape, dtype=torch.float32):
        size = torch.Size(shape).numel()
        buffer = torch.full((size + 2 * GUARD,), GUARD_VALUE, dtype=dtype)
        self.buffers.append(buffer)
        return buffer[GUARD : GUARD + size].fill_(torch.nan).reshape(shape)

    def check(self):
        for buffer in self.buffers:
            guards = torch.cat([buffer[:GUARD], buffer[-GUARD:]])
            assert torch.equal(guards, torch.full_like(guards, GUARD_VALUE)), "written beyond a tensor's end"


def make_policy(shape, log_std_shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(shape, generator=generator).to(dtype)
    return mean, (0.3 * torch.randn(log_std_shape, generator=generator)).to(dtype)


def assert_same(ours, expected, names, rtol=1e-6, atol=1e-6):
    for name, a, b in zip(names, ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def check_sample(shape=(3, 5), log_std_shape=None, dtype=torch.float32, seed=2**40 + 5, offset=11):
    mean, log_std = make_policy(shape, log_std_shape or shape, dtype)
    ours, expected = (backend.gaussian_sample(mean, log_std, seed, offset) for backend in (triton_backend, reference))
    assert_same(ours[:1], expected[:1], ["latents"])
    assert_same(ours[1:], expected[1:], ["log_prob"], atol=1e-5)


def check_ppo(shape=(3, 5), log_std_shape=None, dtype=torch.float32):
    mean, log_std = make_policy(shape, log_std_shape or shape, dtype)
    generator = torch.Generator().manual_seed(2)
    latents, log_prob = reference.gaussian_sample(mean, log_std, 1, 0)
    old_log_prob = log_prob + 0.3 * torch.randn(shape[0], generator=generator)
    arguments = latents, mean, log_std, old_log_prob, torch.randn(shape[0], generator=generator), 0.2, 0.05
    ours, expected = (backend.ppo_clip_loss(*arguments) for backend in (triton_backend, reference))
    # A rounding of log_prob, 6e-8 of it, is in the ratio and all that follows.
    slack = 1e-5 + 2.5e-7 * log_prob.abs().max().item() if shape[0] else 0
    assert_same(ours, expected, layout.PpoForward._fields, rtol=slack, atol=slack)
    assert torch.equal(triton_backend.gaussian_log_prob(latents, mean, log_std), ours.log_prob)


def check_backward(shape=(3, 5), log_std_shape=None, dtype=torch.float32, needs_latents=True):
    mean, log_std = make_policy(shape, log_std_shape or shape, dtype)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    arguments = latents, mean, log_std, torch.linspace(-1, 2, shape[0]), torch.linspace(0.1, 0.3, shape[0])
    ours, expected = (backend.gaussian_backward(*arguments, needs_latents) for backend in (triton_backend, reference))
    assert (ours[2] is None) is not needs_latents
    assert [grad.dtype for grad in ours[:2]] == [dtype, dtype]
    # One unit in the last place of the storage type; the interpreter cuts bfloat16 off where a GPU rounds.
    rtol = {torch.float32: 3e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    atol = 3e-6 * (mean.numel() / max(log_std.numel(), 1)) ** 0.5
    count = 3 if needs_latents else 2
    assert_same(ours[:count], expected[:count], ["grad_mean", "grad_log_std", "grad_latents"][:count], rtol, atol)


def check_spectral(latent_shape=(2, 3, 5), bands=(2, 3), log_std_shape=None, dtype=torch.float32, offset=2**64 - 7):
    action_shape = (2, latent_shape[0], *bands)
    mean, log_std = make_policy(action_shape, log_std_shape or action_shape, dtype)
    spectrum = layout.make_spectrum(action_shape[1:], latent_shape)
    ours, expected = (
        backend.spectral_sample(mean, log_std, spectrum, 4, offset) for backend in (triton_backend, reference)
    )
    names = ["latents", "coefficients", "log_prob"]
    assert_same([a.reshape(b.shape) for a, b in zip(ours, expected, strict=True)], expected, names, 3e-6, 1e-5)


def check_prior(latent_shape=(2, 3, 5), bands=(2, 3)):
    """An untrained spectral policy is the prior bit for bit."""
    mean = torch.zeros(2, latent_shape[0], *bands)
    spectrum = layout.make_spectrum(tuple(mean.shape[1:]), latent_shape)
    latents, _, _ = triton_backend.spectral_sample(mean, torch.zeros(2), spectrum, 8, 5)
    prior, _ = triton_backend.gaussian_sample(torch.zeros(2, *latent_shape), torch.zeros(2), 8, 5)
    assert torch.equal(latents.flatten(1), prior.flatten(1))


def check_guards():
    """Nothing is written beyond the end of what a backend allocates; values are other checks' business."""
    mean, log_std = make_policy((3, 5), (3,))
    triton_backend.gaussian_sample(mean, log_std, 1, 0)
    rows = torch.zeros(3)
    triton_backend.ppo_clip_loss(mean, mean, log_std, rows, rows, 0.2, 0.1)
    triton_backend.gaussian_backward(mean, mean, log_std, rows, rows, True)
    spectrum = layout.make_spectrum((2, 2, 1), (2, 3, 5))
    triton_backend.spectral_sample(torch.zeros(1, 2, 2, 1), torch.zeros(1), spectrum, 4, 0)
    triton_backend._empty.check()


def check_nan_is_reported():
    """A NaN ratio is not clipped into a number."""
    zeros = torch.zeros(2, 5)
    arguments = zeros, zeros, torch.zeros(2), torch.tensor([0.0, torch.nan]), torch.ones(2), 0.2, 0.0
    assert triton_backend.ppo_clip_loss(*arguments).totals[0].isnan()
