"""Scoring one chunk while the next is generated: the same bits, in less time."""

import time

import pytest
import torch

from noisepolicy.rewards import RewardError

SETTINGS = {"algorithm": "ppo", "num_iterations": 5, "rollout_batch_size": 4, "num_updates": 1}
CHUNK_S = 0.25
NUM_CHUNKS = 8


def test_bits_do_not_depend_on_it(make_trainer, tmp_path):
    runs = []
    for overlap in (False, True):
        trainer = make_trainer(tmp_path / str(overlap), overlap=overlap, **SETTINGS | {"algorithm": "critic"})
        runs.append((list(trainer), trainer._learner.policy.state_dict()))
    assert runs[0][0] == runs[1][0]
    for name, value in runs[0][1].items():
        assert torch.equal(value, runs[1][1][name]), name


@pytest.mark.parametrize(("overlap", "least", "most"), [(True, 1.0, 1.25), (False, 2.0, 9.0)])
def test_an_iteration_takes_little_more_than_the_longer_of_the_two(
    make_trainer, blob, tmp_path, monkeypatch, overlap, least, most
):
    """Generation and reward each sleep as long, so together they take twice as long as either."""
    model, left_or_right = blob
    plain = model.generate

    def slowly(self, latents, *arguments, **options):
        time.sleep(CHUNK_S)
        return plain(self, latents, *arguments, **options)

    def reward(images, prompts):
        time.sleep(CHUNK_S)
        assert len(images) == 32 // NUM_CHUNKS and not torch.is_grad_enabled()
        return left_or_right(images, prompts)

    monkeypatch.setattr(model, "generate", slowly)
    iterations = iter(make_trainer(tmp_path, reward=reward, overlap=overlap, **SETTINGS))
    next(iterations)
    seconds = []
    while len(seconds) < 3 and (not seconds or min(seconds) > most * NUM_CHUNKS * CHUNK_S):  # a busy machine may err
        start = time.perf_counter()
        next(iterations)
        seconds.append(time.perf_counter() - start)
    assert least <= min(seconds) / (NUM_CHUNKS * CHUNK_S) <= most, seconds


def test_a_failing_reward_is_named(make_trainer, tmp_path):
    calls = []

    def fails_late(images, prompts):
        calls.append(len(images))
        return images.mean((1, 2, 3)) * (1 // (len(calls) < 4))

    trainer = make_trainer(tmp_path, reward=fails_late, overlap=True, **SETTINGS)
    with pytest.raises(RewardError, match="reward 'fails_late' raised ZeroDivisionError"):
        list(trainer)
    assert len(calls) < NUM_CHUNKS
