"""Votes on pairs of pictures: no vote is lost, and they are a reward. What they are worth: test_bench_votes.py."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import noisepolicy
from noisepolicy.benchmarks.votes import simulate
from noisepolicy.policies import SpectralPolicy
from noisepolicy.rewards.registry import load_reward, with_absolute_paths
from noisepolicy.training.voting import Voting
from noisepolicy.worlds.shapes import held_out_scenes

PROMPTS = [scene.caption for scene in held_out_scenes()[:3]]
SETTINGS = {"num_inference_steps": 2, "guidance_scale": 1.5}


def simulated_votes(voting, reward, count, *, error, seed=0):
    simulate(voting, reward, count, error=error, generator=torch.Generator().manual_seed(seed))


def test_votes_are_kept_and_taken_back(frozen, tmp_path):
    voting = Voting(frozen, PROMPTS[0], tmp_path, **SETTINGS)
    pairs = []
    for _ in range(16):  # past the first new pictures
        pairs.append(voting.pair)
        voting.vote(voting.pair[1])
    assert len(set(pairs)) > 8
    with pytest.raises(ValueError, match=r"the pair is .*, got a vote for 999"):
        voting.vote(999)
    again = Voting(frozen, PROMPTS[0], tmp_path, **SETTINGS)
    assert again.votes == voting.votes and again.pair == voting.pair and again.best == voting.best
    torch.testing.assert_close(again.image(70), voting.image(70), rtol=0, atol=1e-4)
    again.undo()
    assert set(again.pair) == set(pairs[-1]) and len(again.votes) == 15
    assert len(Voting(frozen, PROMPTS[0], tmp_path, **SETTINGS).votes) == 15
    assert again.latents(again.best).shape == (1, 8, 8, 8)
    with pytest.raises(ValueError, match="holds votes on something else"):
        Voting(frozen, PROMPTS[1], tmp_path, **SETTINGS)
    with open(tmp_path / "votes.jsonl", "a") as file:
        file.write("[1, 5000]\n")
    with pytest.raises(ValueError, match="cannot be read: a vote on pictures 1 and 5000, of 96"):
        Voting(frozen, PROMPTS[0], tmp_path, **SETTINGS)


def test_votes_without_their_pictures_are_not_written_over(frozen, tmp_path):
    voting = Voting(frozen, PROMPTS[0], tmp_path, **SETTINGS)
    voting.vote(voting.pair[0])
    (tmp_path / "pictures.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot be read: .*pictures\.safetensors"):
        Voting(frozen, PROMPTS[0], tmp_path, **SETTINGS)
    assert len((tmp_path / "votes.jsonl").read_text().splitlines()) == 1


def test_it_starts_from_a_policy(frozen, tmp_path):
    torch.manual_seed(0)
    policy = SpectralPolicy(latent_shape=(8, 8, 8), prompt_shape=(20, 128))
    torch.nn.init.normal_(policy.mean.weight, std=0.1)
    voting = Voting(frozen, PROMPTS[0], tmp_path, policy=policy, seed=3, **SETTINGS)
    expected = policy.latents(frozen, PROMPTS[0], seed=3, index=5, num_inference_steps=2)
    torch.testing.assert_close(voting.latents(5), expected, rtol=0, atol=1e-5)


def test_votes_become_a_reward_of_any_command(frozen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"votes\(mine\).*mine holds no votes; noisepolicy vote"):
        load_reward("votes(mine)")
    with pytest.raises(ValueError, match=r"votes\(\).*it needs a folder in parentheses"):
        load_reward("votes()")
    voting = Voting(frozen, PROMPTS[0], tmp_path / "mine", **SETTINGS)
    with pytest.raises(ValueError, match="holds no votes"):
        load_reward("votes(mine)")
    simulated_votes(voting, load_reward("red"), 10, error=0)
    reward = load_reward("0.5*votes(mine) + 0.5*brightness")
    assert with_absolute_paths("votes(mine)") == f"votes({tmp_path / 'mine'})"
    images = torch.stack([voting.image(number) for number in range(64)])
    learned = reward.parts(images, [PROMPTS[0]] * 64)[:, 0]
    assert learned.argmax() == voting.best
    assert torch.corrcoef(torch.stack([learned, load_reward("red")(images, [""] * 64)]))[0, 1] > 0.3
    # Of two colours as far from what was voted on, that which won is better; further still, both are a guess.
    red, blue = (torch.zeros(1, 3, 64, 64).index_fill_(1, torch.tensor(channel), 1) for channel in (0, 2))
    mine = load_reward("votes(mine)")
    assert mine(images.mean(0, keepdim=True) + 0.1 * red, [""]) > mine(images.mean(0, keepdim=True) + 0.1 * blue, [""])
    video = images[:2, None].expand(-1, 3, -1, -1, -1)
    torch.testing.assert_close(mine(video, ["", ""]), mine(images[:2], ["", ""]))
    (tmp_path / "mine" / "votes.jsonl").write_text(json.dumps([0, 64]) + "\n")
    with pytest.raises(ValueError, match="cannot be read: a vote on pictures 0 and 64, of 64"):
        load_reward("votes(mine)")


def test_a_run_goes_on_with_the_votes_that_it_was_started_with(frozen, tmp_path):
    voting = Voting(frozen, PROMPTS[0], tmp_path / "mine", **SETTINGS)
    simulated_votes(voting, load_reward("red"), 14, error=0)
    settings = {"algorithm": "find", "prompts": [PROMPTS[0]], "group_size": 4, "batch_size": 4, "eval_num_prompts": 0}
    rewards = ["votes({})", "cached(votes({}))", "0.5*votes({}) + 0.5*brightness"]
    runs = [tmp_path / f"run{number}" for number in range(len(rewards))]
    for reward, run in zip(rewards, runs, strict=True):
        reward = reward.format(tmp_path / "mine")
        noisepolicy.train(frozen, reward=reward, num_iterations=1, output_dir=run, **settings)
    simulated_votes(voting, load_reward("red"), 1, error=0)  # and new pictures
    for run in runs:
        with pytest.raises(ValueError, match=r"the votes that the reward .*mine.* learns from are not those") as caught:
            noisepolicy.resume(run, model=frozen, num_iterations=2)
        assert "take the later votes back, or start anew" in str(caught.value) and "\n" not in str(caught.value)
    voting.undo()
    for run in runs:
        assert noisepolicy.resume(run, model=frozen, num_iterations=2).train().iteration == 2


def test_so_does_a_run_that_stops_on_votes(frozen, tmp_path):
    voting = Voting(frozen, PROMPTS[0], tmp_path / "mine", **SETTINGS)
    simulated_votes(voting, load_reward("red"), 4, error=0)
    votes = f"votes({tmp_path / 'mine'})"
    settings = {"reward": "red", "eval_rewards": [votes], "stop_on": votes, "algorithm": "find", "group_size": 4}
    noisepolicy.train(frozen, prompts=[PROMPTS[0]], num_iterations=1, output_dir=tmp_path / "run", **settings)
    simulated_votes(voting, load_reward("red"), 1, error=0)
    with pytest.raises(ValueError, match=r"the votes that the reward .*mine.* learns from are not those"):
        noisepolicy.resume(tmp_path / "run", model=frozen, num_iterations=2)


@pytest.mark.parametrize(
    "tiles",
    [
        torch.zeros(64),
        torch.zeros(64, 47),
        torch.zeros(1, 48),
        torch.zeros(64, 48, dtype=torch.int64),
        torch.full((64, 48), torch.nan),
    ],
    ids=["one axis", "another width", "one picture", "whole numbers", "no numbers"],
)
def test_tiles_that_are_none(frozen, tmp_path, tiles):
    voting = Voting(frozen, PROMPTS[0], tmp_path, **SETTINGS)
    voting.vote(voting.pair[0])
    path = tmp_path / "pictures.safetensors"
    save_file(load_file(path) | {"tiles": tiles}, path)
    (tmp_path / "votes.jsonl").write_text("[0, 0]\n")
    message = r"cannot be read: its tiles are no finite float32 tensor \(2 or more, 48\)"
    with pytest.raises(ValueError, match=message):
        load_reward(f"votes({tmp_path})")
    with pytest.raises(ValueError, match=message):
        Voting(frozen, PROMPTS[0], tmp_path, **SETTINGS)
