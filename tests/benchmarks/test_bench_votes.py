"""`noisepolicy-bench votes` on two captions: votes with errors are understood, and a policy learns from them."""

import json

import pytest

import noisepolicy
from noisepolicy.benchmarks import votes
from noisepolicy.cli.bench import main
from noisepolicy.prior import noise


@pytest.mark.slow
@pytest.mark.parametrize("taste", ["shapes", "red"])
def test_sixty_votes_are_worth_more_than_half_of_best_of_four(taste, capsys):
    assert main(["votes", "--tastes", taste, "--num-prompts", "2", "--num-voters", "1"]) == 0
    [row] = json.loads(capsys.readouterr().out.splitlines()[-1])["tastes"]
    half = (row["base"] + row["best_of_4"]) / 2
    assert row["base"] < row["best_of_4"] and row["base"] < row["knock_out"]
    assert row["votes_60"] > half
    assert row["policy"] > half, "the mean of its pictures"


def test_the_policy_is_measured_on_noise_that_nobody_voted_on(monkeypatch):
    seeds = []

    class Run:
        policy = property(lambda self: self)

        def __init__(self, frozen, **settings):
            self.frozen = frozen

        def __iter__(self):
            return iter(())

        def latents(self, frozen, prompts, *, seed):
            seeds.append(seed)
            return noise(seed=seed, index=range(len(prompts)), shape=frozen.latent_shape)

    monkeypatch.setattr(noisepolicy, "Run", Run)
    monkeypatch.setattr(votes, "_NUM_PICTURES", 64)
    assert main(["votes", "--tastes", "red", "--num-prompts", "1", "--num-voters", "2"]) == 0
    assert len(seeds) == 2 and not {0, 1} & set(seeds), "the voters' seeds"


def test_what_is_refused(capsys):
    assert main(["votes", "--tastes", "nothing"]) == 2
    assert "unknown reward 'nothing'" in capsys.readouterr().err
    assert main(["votes", "--num-voters", "0"]) == 2
    assert "must be positive" in capsys.readouterr().err
