"""FIND's table: it knows its prompts, and no others."""

import pytest
import torch

from noisepolicy.ops import gaussian_log_prob, gaussian_sample
from noisepolicy.policies import NoisePolicy, TablePolicy

PROMPTS = ["a dog", "a cat", "a dog and a cat"]


def embeds(num_prompts=3):
    return torch.randn(num_prompts, 7, 16, generator=torch.Generator().manual_seed(2))


def make_table(**options):
    policy = TablePolicy(latent_shape=(2, 6, 6), prompt_shape=(7, 16), prompts=PROMPTS, **options)
    policy.learn_keys(embeds())
    return policy


@pytest.mark.parametrize("std", ["learned", "power", "one"])
@pytest.mark.parametrize("bands", [None, 3])
def test_fresh_table_draws_the_prior_and_its_log_probs_are_exact(std, bands):
    policy = make_table(std=std, bands=bands)
    prior, _ = gaussian_sample(torch.zeros(3, 2, 6, 6), torch.zeros(()), seed=5)
    sample = policy.sample(embeds(), seed=5)
    torch.testing.assert_close(sample.latents, prior)
    with torch.no_grad():
        policy.mean.normal_(generator=torch.Generator().manual_seed(0))
        if policy.log_std is not None:
            policy.log_std.uniform_(-1, 0.2, generator=torch.Generator().manual_seed(1))
    sample = policy.sample(embeds(), seed=5)
    torch.testing.assert_close(sample.log_prob, gaussian_log_prob(sample.action, *policy(embeds())))


def test_rows_are_found_by_embedding():
    policy = make_table()
    order = torch.tensor([2, 0, 1, 0])
    assert policy.row_of(embeds()[order]).tolist() == order.tolist()
    assert policy.row_of(embeds().bfloat16()).tolist() == [0, 1, 2]


def test_another_prompt_is_refused_by_name():
    with pytest.raises(ValueError, match=r"1 of 4 prompts are none of those .*'a dog', 'a cat', 'a dog and a cat'"):
        make_table()(torch.cat([embeds(), torch.randn(1, 7, 16)]))


def test_prompts_that_differ_in_one_token_have_their_own_rows():
    base = embeds(1).expand(3, -1, -1).clone()
    base[1, 5] = torch.randn(16, generator=torch.Generator().manual_seed(8))
    base[2, 6] = torch.randn(16, generator=torch.Generator().manual_seed(9))
    policy = make_table()
    policy.learn_keys(base)
    assert policy.row_of(base).tolist() == [0, 1, 2]


def test_save_and_load(tmp_path):
    policy = make_table(bands=3)
    policy.set_distribution(torch.randn(3, 2, 3, 3), torch.full((), -0.5))
    policy.save_pretrained(tmp_path)
    loaded = NoisePolicy.from_pretrained(tmp_path)
    assert loaded.prompts == PROMPTS
    assert torch.equal(loaded.sample(embeds(), seed=1).latents, policy.sample(embeds(), seed=1).latents)


@pytest.mark.parametrize("std", ["learned", "power"])
def test_set_distribution_is_what_it_then_has(std):
    policy = make_table(std=std)
    mean = 0.3 * torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(3))
    # A power-preserving policy's std follows from its mean.
    log_std = 0.5 * torch.log1p(-(mean**2).mean((1, 2, 3), keepdim=True))
    policy.set_distribution(mean, log_std)
    ours, ours_std = policy.distribution(torch.arange(3))
    torch.testing.assert_close(ours, mean)
    torch.testing.assert_close(ours_std.expand_as(mean), log_std.expand_as(mean))


def test_latents_of_another_size():
    assert make_table(bands=3).sample(embeds(), seed=1, latent_shape=(2, 8, 4)).latents.shape == (3, 2, 8, 4)
    with pytest.raises(ValueError, match="chooses every latent"):
        make_table().sample(embeds(), seed=1, latent_shape=(2, 8, 4))


def test_a_natural_step_moves_its_rows_by_the_gradient_over_the_fisher_information():
    policy = make_table()
    with torch.no_grad():
        policy.log_std.fill_(-0.7)
    mean, log_std = policy.distribution(torch.arange(3))
    (mean.sum() + 3 * log_std.sum()).backward()
    policy.natural_step(torch.tensor([0, 2]), 0.1)
    expected = -0.1 * torch.exp(torch.tensor(-1.4))
    torch.testing.assert_close(policy.mean[0].detach(), torch.full((2, 6, 6), expected.item()))
    torch.testing.assert_close(policy.log_std[2].detach(), torch.full((2, 6, 6), -0.7 - 0.15))
    assert not policy.mean[1].any()
