"""One batch of the current policy's images and their rewards; each process makes its share of the chunks.

A frozen model's rounding depends on the batch it is called with, so a batch is cut into the same chunks for any number
of processes, and everything of a chunk (policy, frozen model, reward) is computed with no other rows.

Randomness has no state: every draw is named by the run's seed, a purpose and a number. Nothing random has to be saved,
so a resumed run draws what an uninterrupted one would have drawn.
"""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from noisepolicy.frozen.base import row_seeds
from noisepolicy.ops import num_counters
from noisepolicy.policies import NoisePolicy
from noisepolicy.policies.critic import CriticShape, shrink_pictures
from noisepolicy.rewards.base import weigh
from noisepolicy.training.config import TrainConfig
from noisepolicy.training.processes import Processes
from noisepolicy.training.rows import PromptStore
from noisepolicy.training.task import Task

PHASES = ("frozen_model", "reward", "policy")
_MAX_PENDING = 2  # chunks handed to a reward's thread before the caller waits: one is scored while the next is made


@dataclass(frozen=True)
class Rollout:
    """A batch of images as the learner sees it, the same on every process; `(batch, ...)` on the policy's device."""

    prompt_row: torch.Tensor
    """Each image's row in the run's `PromptStore`; on the CPU."""
    step_index: torch.Tensor
    """Each image's index into the denoising step counts."""
    action: torch.Tensor
    log_prob: torch.Tensor
    parts: torch.Tensor
    """Each part of the reward, before it is weighted, float64 `(batch, parts)`; see `Reward.parts`."""
    reward: torch.Tensor
    """Weighted sum of the parts in the user's units, float64 `(batch,)`."""
    picture: torch.Tensor | None
    """Small pictures that the critic learns to sketch, float16; None without a critic."""


class RolloutMaker:
    """Samples, generates and scores the batches of a run.

    Args:
        config: Resolved settings.
        task: The frozen model, the reward and the prompts.
        prompts: Embeddings of the prompts met so far.
        processes: The processes that share a batch.
        clock: Adds up the time of each phase.
    """

    def __init__(
        self, config: TrainConfig, task: Task, prompts: PromptStore, processes: Processes, clock: "PhaseClock"
    ) -> None:
        self._config, self._task, self._prompts = config, task, prompts
        self._processes, self._clock = processes, clock

    @torch.no_grad()
    def make(
        self, policy: NoisePolicy, number: int, prompt_index: Sequence[int], critic_shape: CriticShape | None
    ) -> Rollout:
        """Make the batch of iteration `number`.

        The noise of a row is addressed by its number in the whole run, so the number of processes and their shares
        have no effect on any bit.

        Args:
            policy: The policy to sample from.
            number: Number of the batch in the run, from 0.
            prompt_index: Index of each group's prompt in the task.
            critic_shape: Shape of the pictures to keep for the critic, if there is one.
        """
        config, clock, reward = self._config, self._clock, self._task.reward
        seed = stream_seed(config.seed, "noise")
        device = next(policy.parameters()).device
        prompts = [self._task.train_prompts[i] for i in prompt_index for _ in range(config.group_size)]
        with clock.phase("frozen_model"):
            prompt_row = self._prompts.add(prompt_index).repeat_interleave(config.group_size)
        step_index = self.step_index(number)
        shares = self.shares(number)
        mine = shares[self._processes.index]
        actions = [torch.zeros(0, *policy.action_shape, device=device)]  # for a process that has no share
        log_probs, pictures = [torch.zeros(0, device=device)], []
        if critic_shape is not None:
            pictures = [torch.zeros(0, *critic_shape.sketch_shape, dtype=torch.float16, device=device)]
        with scoring(reward.parts, is_overlapped=config.overlap, device=device) as scorer:
            for chunk in mine:
                rows = slice(chunk.start, chunk.stop)
                with clock.phase("policy"):
                    embeds = self._prompts[prompt_row[rows]]
                    first = number * len(prompts) + chunk.start
                    offset = first * num_counters(policy.latent_shape)
                    sample = policy.sample(embeds.prompt_embeds, seed=seed, offset=offset)
                with clock.phase("frozen_model"), self._decoder():
                    images = self._task.frozen.generate(
                        sample.latents,
                        embeds,
                        num_inference_steps=config.num_inference_steps[chunk.step_index],
                        guidance_scale=config.guidance_scale,
                        seeds=row_seeds(config.seed, range(first, first + len(sample.latents))),
                    )
                actions.append(sample.action)
                log_probs.append(sample.log_prob)
                if critic_shape is not None:
                    if images.ndim not in (4, 5) or images.shape[-3] != 3:
                        raise ValueError(
                            "the critic learns from pictures (batch, 3, height, width), and the model makes images of "
                            f"shape {tuple(images.shape)}; --algorithm ppo needs no pictures"
                        )
                    pictures.append(shrink_pictures(images, critic_shape).to(device, torch.float16))
                with clock.phase("reward"):
                    scorer.add(images, prompts[rows])
            with clock.phase("reward"):
                rewards = [torch.zeros(0, len(reward.weights), dtype=torch.float64), *scorer.finish()]
        columns = [torch.cat(actions), torch.cat(log_probs), torch.cat(rewards).to(device)]
        if critic_shape is not None:
            columns.append(torch.cat(pictures))
        action, log_prob, parts, *picture = self._processes.gather_rows(
            f"'gather rewards' of iteration {number + 1}",
            torch.tensor([row for chunk in mine for row in range(chunk.start, chunk.stop)], dtype=torch.int64),
            columns,
            counts=[sum(chunk.stop - chunk.start for chunk in share) for share in shares],
        )
        return Rollout(
            prompt_row,
            step_index.to(device),
            action,
            log_prob,
            parts,
            weigh(parts, reward.weights),
            picture[0] if picture else None,
        )

    def _decoder(self) -> AbstractContextManager[None]:
        """Let a small autoencoder decode the images, if the run has one."""
        vae = self._task.rollout_vae
        return nullcontext() if vae is None else self._task.frozen.decoding_with(vae)

    def step_index(self, number: int) -> torch.Tensor:
        """Return rows' indices into the step counts: as many groups of each, adjacent, in rotating order."""
        config = self._config
        num_steps, num_groups = len(config.num_inference_steps), config.batch_size // config.group_size
        groups = (torch.arange(num_groups) * num_steps // num_groups + number) % num_steps
        return groups.repeat_interleave(config.group_size)

    def shares(self, number: int) -> list[list["Chunk"]]:
        """Return the chunks of batch `number` that each process makes."""
        chunks = split_batch(self.step_index(number), self._config.model.rollout_batch_size)
        return deal(chunks, self._config.num_inference_steps, self._processes.count)


class Chunk(NamedTuple):
    """Rows `start` to `stop` of a batch, all of one step count."""

    start: int
    stop: int
    step_index: int


def split_batch(step_index: torch.Tensor, max_rows: int) -> list[Chunk]:
    """Split a batch into chunks of at most `max_rows` adjacent rows of one step count.

    Each step count has an even number of chunks, whose sizes differ by one at most.

    The even number lets two processes share them fairly: a batch of 96 by at most 32 rows is 4 chunks of 24.

    Args:
        step_index: Each row's index into the step counts, int64 `(batch,)`.
    """
    chunks, start = [], 0
    _, lengths = torch.unique_consecutive(step_index, return_counts=True)
    for length in lengths.tolist():
        count = -(-length // max_rows)
        count = min(count + count % 2, length)
        edges = [start + length * number // count for number in range(count + 1)]
        step = int(step_index[start])
        chunks += [Chunk(first, last, step) for first, last in pairwise(edges)]
        start += length
    return chunks


def deal(chunks: Sequence[Chunk], step_counts: Sequence[int], num_processes: int) -> list[list[Chunk]]:
    """Deal out chunks, the costliest first, each to the process that has least to do; some may get none."""

    def cost(chunk: Chunk) -> int:
        return (chunk.stop - chunk.start) * step_counts[chunk.step_index]

    shares: list[list[Chunk]] = [[] for _ in range(num_processes)]
    load = [0] * num_processes
    for chunk in sorted(chunks, key=cost, reverse=True):
        process = load.index(min(load))
        shares[process].append(chunk)
        load[process] += cost(chunk)
    return shares


class Scorer:
    """Scores chunks in the order they are added, by the same calls with and without a thread.

    Args:
        score: Function of images and prompts that returns a tensor with one row per image.
        worker: Executor with one thread; None scores at once.
    """

    def __init__(
        self, score: Callable[[torch.Tensor, Sequence[str]], torch.Tensor], worker: ThreadPoolExecutor | None
    ) -> None:
        self._score, self._worker = score, worker
        self._pending: deque[Future[torch.Tensor]] = deque()
        self._scores: list[torch.Tensor] = []

    def add(self, images: torch.Tensor, prompts: Sequence[str]) -> None:
        """Score a chunk, or hand it to the thread and wait until the thread is at most one chunk behind.

        Errors of the reward are raised here, perhaps those on an earlier chunk.
        """
        if self._worker is None:
            self._scores.append(self._score(images, prompts))
            return
        self._pending.append(self._worker.submit(torch.no_grad()(self._score), images, prompts))
        while len(self._pending) >= _MAX_PENDING:
            self._scores.append(self._pending.popleft().result())

    def finish(self) -> list[torch.Tensor]:
        """Return the scores of all chunks."""
        self._scores += [future.result() for future in self._pending]
        self._pending.clear()
        return self._scores


@contextmanager
def scoring(
    score: Callable[[torch.Tensor, Sequence[str]], torch.Tensor], *, is_overlapped: bool, device: torch.device
) -> Iterator[Scorer]:
    """Make a `Scorer`, with a thread of its own if `is_overlapped`."""
    if not is_overlapped:
        yield Scorer(score, None)
        return
    # A new thread's current device is the first one.
    start = {"initializer": torch.cuda.set_device, "initargs": (device,)} if device.type == "cuda" else {}
    worker = ThreadPoolExecutor(1, "reward", **start)
    try:
        yield Scorer(score, worker)
    finally:
        worker.shutdown(wait=False, cancel_futures=True)  # after an error elsewhere, the reward is not waited for


class PhaseClock:
    """Adds up wall-clock seconds by phase. On CUDA it waits for the device, so a phase gets what it started."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._device = device

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of this context to a phase."""
        self._synchronize()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._synchronize()
            self.seconds[name] += time.perf_counter() - start

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def stream_seed(seed: int, purpose: str) -> int:
    """Return a 64-bit key for one purpose of a run."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest(), "little")


def stream_generator(seed: int, purpose: str, number: int) -> torch.Generator:
    """Return a fresh CPU generator for draw `number` of a purpose."""
    return torch.Generator().manual_seed(stream_seed(seed, f"{purpose}/{number}") >> 1)


def draw_noise(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw normal noise of the shape of `like`, on its device; the values are the same on every device."""
    return torch.randn(like.shape, generator=generator).to(like.device)
