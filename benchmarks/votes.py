"""`noisepolicy-bench votes`: what a simulated voter's votes are worth, by the reward that the voter has in mind.

The voter errs in a tenth of the pairs. Compared are the picture that is best by the votes, a policy that FIND learned
from the votes, and two ways that learn nothing: best of 4, chosen without error, and a knock-out in which the winner of
each pair meets the next picture. The knock-out is a mean over many voters, which cost no pictures.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import noisepolicy
from noisepolicy.frozen import FrozenModel
from noisepolicy.prior import noise
from noisepolicy.rewards import Reward, load_reward
from noisepolicy.training.devices import make_accelerator
from noisepolicy.training.task import load_model
from noisepolicy.training.voting import Voting
from noisepolicy.worlds.shapes import held_out_scenes

COUNTS = (20, 40, 60)
_ERROR = 0.1
_NUM_PICTURES = 256
_NUM_KNOCK_OUTS = 100
_NUM_OF_POLICY = 64
_SEED_OF_POLICY = 2**20  # of no voter: the policy was taught by pictures of the voters' noise
_COLUMNS = ("base", "best_of_4", "knock_out", *(f"votes_{count}" for count in COUNTS), "policy")


def run(tastes: Sequence[str], num_prompts: int, num_voters: int) -> dict[str, Any]:
    """Print a table and return its rows.

    Args:
        tastes: Rewards by name, each of which a voter has in mind.
        num_prompts: Held-out captions of the embedded model.
        num_voters: Voters of each taste and caption.

    Raises:
        ValueError: if a reward is unknown, or a number is not positive.
    """
    if min(num_prompts, num_voters) < 1:
        raise ValueError("--num-prompts and --num-voters must be positive")
    rewards = {taste: load_reward(taste) for taste in tastes}
    config = noisepolicy.TrainConfig.of(model="shapes", device="cpu")
    frozen = load_model(config.model, make_accelerator("cpu").device, settings=config)
    settings = {"num_inference_steps": config.num_inference_steps[0], "guidance_scale": config.guidance_scale}
    prompts = [scene.caption for scene in held_out_scenes()[:num_prompts]]
    pictures = [_pictures(frozen, prompt, settings) for prompt in prompts]
    rows = []
    print(f"{'taste':24s}", *(f"{name:>10s}" for name in _COLUMNS))
    for taste, reward in rewards.items():
        measured = [
            _measure(frozen, prompt, reward, pictures[place], settings, seed=place * num_voters + voter)
            for place, prompt in enumerate(prompts)
            for voter in range(num_voters)
        ]
        means = {name: sum(row[name] for row in measured) / len(measured) for name in _COLUMNS}
        rows.append({"taste": taste, **means, "each": measured})
        print(f"{taste:24s}", *(f"{means[name]:10.3f}" for name in _COLUMNS), flush=True)
    return {"num_prompts": num_prompts, "num_voters": num_voters, "error": _ERROR, "tastes": rows}


def _pictures(frozen: FrozenModel, prompt: str, settings: dict[str, Any]) -> torch.Tensor:
    latents = noise(seed=1, index=range(_NUM_PICTURES), shape=frozen.latent_shape)
    embeds = frozen.encode([prompt])
    return torch.cat([frozen.generate(part, embeds[[0] * len(part)], **settings) for part in latents.split(64)])


def _measure(
    frozen: FrozenModel, prompt: str, reward: Reward, pictures: torch.Tensor, settings: dict[str, Any], *, seed: int
) -> dict[str, float]:
    """Return the mean true reward of each column for one voter."""
    base = reward(pictures, [prompt] * len(pictures))
    row = {"base": base.mean().item(), "best_of_4": base.reshape(-1, 4).amax(1).mean().item()}
    row["knock_out"] = _knock_out(base, COUNTS[-1], seed)
    with tempfile.TemporaryDirectory() as work:
        votes = Path(work) / "votes"
        voting = Voting(frozen, prompt, votes, seed=seed, **settings)
        generator = torch.Generator().manual_seed(seed)
        for count in COUNTS:
            simulate(voting, reward, count - len(voting.votes), error=_ERROR, generator=generator)
            row[f"votes_{count}"] = reward(voting.image(voting.best)[None], [prompt]).item()
        run = noisepolicy.Run(
            frozen,
            reward=f"votes({votes})",
            prompts=[prompt],
            algorithm="find",
            output_dir=Path(work) / "run",
            eval_num_prompts=0,
            seed=seed,
        )
        for _ in run:
            pass
        latents = run.policy.latents(frozen, [prompt] * _NUM_OF_POLICY, seed=_SEED_OF_POLICY)
        images = frozen.generate(latents, frozen.encode([prompt] * _NUM_OF_POLICY), **settings)
        row["policy"] = reward(images, [prompt] * _NUM_OF_POLICY).mean().item()
    return row


def simulate(voting: Voting, reward: Reward, count: int, *, error: float, generator: torch.Generator) -> None:
    """Vote for the picture with the higher reward, but for a share of errors."""
    for _ in range(count):
        one, other = (reward(voting.image(number)[None], [voting.prompt]).item() for number in voting.pair)
        is_right = bool(torch.rand((), generator=generator) >= error)
        voting.vote(voting.pair[0 if (one >= other) == is_right else 1])


def _knock_out(rewards: torch.Tensor, num_votes: int, seed: int) -> float:
    """Return the mean reward of the pictures that win against `num_votes` others, one after another."""
    generator, total = torch.Generator().manual_seed(seed), 0.0
    for _ in range(_NUM_KNOCK_OUTS):
        best, *others = torch.randperm(len(rewards), generator=generator)[: num_votes + 1]
        for other in others:
            if bool(rewards[other] > rewards[best]) == bool(torch.rand((), generator=generator) >= _ERROR):
                best = other
        total += rewards[best].item()
    return total / _NUM_KNOCK_OUTS
