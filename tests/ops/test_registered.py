"""The registered ops, which anybody can call, and rows without elements: errors or the reference, never a crash."""

import pytest
import torch

from noisepolicy.ops import gaussian_log_prob, gaussian_sample, ppo_clip_loss

OPS = torch.ops.noisepolicy
MEAN, ROWS = torch.zeros(3, 4, 8), torch.zeros(3)


@pytest.mark.parametrize(
    "log_std",
    [
        torch.zeros(()),
        torch.zeros(2),
        torch.zeros(3, 5),
        torch.zeros(3, 4, 9),
        torch.zeros(3, 4, 8, 1),
        torch.zeros(3, 4).half(),
        torch.zeros(4, 3).T,
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)}-{tensor.dtype}-{tensor.device}",
)
def test_a_log_std_that_does_not_fit_is_refused(log_std):
    for call in (
        lambda: OPS.gaussian_sample(MEAN, log_std, 0, 0, "cpp"),
        lambda: OPS.gaussian_log_prob(MEAN, MEAN, log_std, "cpp"),
        lambda: OPS.ppo_clip_loss(MEAN, MEAN, log_std, ROWS, ROWS, 0.2, 0.0, "cpp"),
        lambda: OPS.gaussian_backward(MEAN, MEAN, log_std, ROWS, ROWS, True, "cpp"),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            call()


def test_other_tensors_that_do_not_fit_are_refused():
    log_std = torch.zeros(3)
    for bad in (torch.zeros(2, 4, 8), torch.zeros(3, 4, 8).half(), torch.zeros(3)):
        with pytest.raises(ValueError, match="latents must be float32"):
            OPS.gaussian_log_prob(bad, MEAN, log_std, "cpp")
    for bad in (torch.zeros(2), torch.zeros(3, 1), torch.zeros(3).double()):
        with pytest.raises(ValueError, match="must be float32"):
            OPS.ppo_clip_loss(MEAN, MEAN, log_std, bad, ROWS, 0.2, 0.0, "cpp")
        with pytest.raises(ValueError, match="must be float32"):
            OPS.gaussian_backward(MEAN, MEAN, log_std, ROWS, bad, False, "cpp")
    with pytest.raises(ValueError, match="contiguous"):
        OPS.gaussian_sample(torch.zeros(8, 3).T, log_std, 0, 0, "cpp")


@pytest.mark.parametrize(
    ("extent", "bands"), [([1, 8, 8], [1, 3, 3]), ([8, 8], [2, 4]), ([1, 1, 1], [1, 2, 4]), ([1, 8, 8], [-1, -2, 4])]
)
def test_bands_that_do_not_fit_are_refused(extent, bands):
    with pytest.raises(ValueError, match="coefficients of shape"):
        OPS.spectral_sample(MEAN.reshape(3, 4, 2, 4), torch.zeros(3), extent, bands, 0, 0, "cpp")


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_rows_without_elements(backend):
    mean, log_std = torch.zeros(3, 0, requires_grad=True), torch.zeros(3, 0, requires_grad=True)
    assert torch.equal(gaussian_sample(mean, log_std, seed=0, backend=backend)[1], ROWS)
    assert torch.equal(gaussian_log_prob(torch.zeros(3, 0), mean, torch.zeros(()), backend=backend), ROWS)
    loss, _ = ppo_clip_loss(torch.zeros(3, 0), mean, log_std, ROWS, ROWS, clip_range=0.2, backend=backend)
    loss.backward()
    assert loss == 0 and mean.grad.shape == (3, 0)


def test_a_mean_without_rows_is_a_value_error():
    with pytest.raises(ValueError, match="must be"):
        ppo_clip_loss(torch.zeros(()), torch.zeros(()), torch.zeros(()), ROWS, ROWS, clip_range=0.2)
