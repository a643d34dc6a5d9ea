"""The numbers that reports quote, against plainer ways to the same thing."""

import itertools

import pytest
import torch

from noisepolicy.evaluation.statistics import bootstrap_mean_ci95, expected_best_of, mean_pairwise_distance


def test_best_of_n_is_the_mean_over_all_subsets():
    rewards = torch.rand(3, 6, generator=torch.Generator().manual_seed(0))
    for n in (1, 2, 4, 6):
        subsets = list(itertools.combinations(range(6), n))
        expected = sum(rewards[:, list(subset)].max(1).values.mean().item() for subset in subsets) / len(subsets)
        assert expected_best_of(rewards, n) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="n must be in"):
        expected_best_of(rewards, 7)


def test_interval_covers_the_truth_about_95_times_in_100():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(300):
        # Images of a prompt share the prompt's effect: resampling images alone would be far too sure.
        values = torch.randn(40, 1, generator=generator) + 0.3 * torch.randn(40, 8, generator=generator)
        low, high = bootstrap_mean_ci95(values, num_resamples=500)
        hits += low <= 0 <= high
    assert 0.89 <= hits / 300 <= 0.99


def test_pairwise_distance():
    images = torch.zeros(1, 3, 3, 2, 2)
    images[0, 2] = 1.0
    assert mean_pairwise_distance(images) == pytest.approx(2 / 3)
    assert mean_pairwise_distance(images[:, :1]) == 0


def test_interval_of_a_single_prompt_is_over_its_images():
    values = torch.randn(1, 200, generator=torch.Generator().manual_seed(1))
    low, high = bootstrap_mean_ci95(values)
    error = values.std().item() / 200**0.5
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert low < values.mean() < high
