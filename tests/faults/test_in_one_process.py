"""The trainer itself on the stub model: weights that are not numbers, and what many iterations leave behind."""

import json
import os
import resource
import zlib
from pathlib import Path

import pytest
import torch
from stub_world import StubModel, left_or_right

import noisepolicy
from noisepolicy.rewards import Reward
from noisepolicy.storage import write_tensors
from noisepolicy.training.checkpoint import whole_checkpoints
from noisepolicy.training.prompt_list import PromptList
from noisepolicy.training.rows import History


def make_trainer(folder, **settings):
    small = {
        "batch_size": 8,
        "group_size": 4,
        "num_iterations": 8,
        "checkpoint_every": 2,
        "critic_warmup": 8,
        "critic_batch_size": 8,
        "critic_updates": 1,
        "num_updates": 1,
        "bands": 4,
        "num_inference_steps": (1,),
        "eval_num_prompts": 0,
        "device": "cpu",
    }
    return noisepolicy.Run(
        StubModel(),
        reward=Reward("reward", left_or_right),
        prompts=["a", "bb", "ccc", "dddd"],
        output_dir=folder,
        **(small | settings),
    )


def resume(folder, **settings):
    return noisepolicy.resume(folder, model=StubModel(), reward=Reward("reward", left_or_right), **settings)


@pytest.mark.parametrize("part", ["policy", "critic"])
def test_weights_that_are_no_numbers_stop_the_run_and_are_not_kept(tmp_path, part):
    whole = make_trainer(tmp_path / "whole")
    list(whole)
    stopped = make_trainer(tmp_path / "stopped")
    with pytest.raises((RuntimeError, ValueError), match=r"diverged at iteration 6|must not hold NaN"):
        for metrics in stopped:
            if metrics["iteration"] == 5:
                network = stopped._learner.policy if part == "policy" else stopped._learner._critic
                next(network.parameters()).data.fill_(float("nan"))
    assert [row["iteration"] for row in stopped._folder.read_metrics()] == [1, 2, 3, 4, 5]
    resumed = resume(tmp_path / "stopped")
    assert resumed.iteration == 4
    list(resumed)
    for name, value in whole._learner.policy.state_dict().items():
        assert torch.equal(value, resumed._learner.policy.state_dict()[name]), name
    assert whole._folder.read_metrics() == resumed._folder.read_metrics()


@pytest.mark.filterwarnings("ignore:skipping damaged checkpoint", "ignore:the checkpoint does not say")
def test_a_checkpoint_of_any_content_is_read_or_skipped(tmp_path):
    trainer = make_trainer(tmp_path, num_iterations=2)
    list(trainer)
    checkpoint = next(whole_checkpoints(trainer._folder.checkpoints))
    outcomes = set()
    for name in (
        "iteration",
        "diversity_coef",
        "train_seconds",
        "seconds",
        "history",
        "prompts",
        "settings",
    ):
        for value in (None, "1", [1], {}, {"rows": "1", "digest": None}, -1, 1e300, 2**70):
            write_tensors(
                checkpoint.path, checkpoint.tensors, {"progress": json.dumps(checkpoint.progress | {name: value})}
            )
            try:
                resume(tmp_path)
                outcomes.add("read")
            except ValueError as error:
                assert "no checkpoint in" in str(error)
                outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.slow
def test_many_iterations_leave_no_memory_and_no_files_open(tmp_path, request):
    count = 10_000 if request.config.getoption("--soak") else 200
    trainer = make_trainer(tmp_path, num_iterations=count, checkpoint_every=25)
    seen = {}
    for metrics in trainer:
        if metrics["iteration"] in (count // 3, count):
            seen[metrics["iteration"]] = resident_bytes(), len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    (memory, files), (memory_at_end, files_at_end) = seen.values()
    assert files_at_end == files
    assert memory_at_end - memory < 8 * 2**20, (memory, memory_at_end)
    sizes = {path.stat().st_size for path in (tmp_path / "checkpoints").iterdir()}
    assert max(sizes) - min(sizes) < 4096, "a checkpoint does not grow with the run"


@pytest.mark.slow
def test_a_long_history_takes_disk_and_no_memory(tmp_path, request):
    """Rows of 256 numbers and a picture: 26 GB are ten million."""
    count, batch = (1_000_000 if request.config.getoption("--soak") else 40_000), 1000
    history = History(tmp_path, (4, 8, 8), (3, 16, 16), num_parts=1, device=torch.device("cpu"))
    rows = {
        "prompt_row": torch.arange(batch),
        "step_index": torch.zeros(batch, dtype=torch.int64),
        "parts": torch.rand(batch, 1),
        "action": torch.randn(batch, 4, 8, 8),
        "picture": torch.rand(batch, 3, 16, 16),
    }
    history.append(**rows)
    history.draw(64, torch.Generator())
    memory = resident_bytes()
    while history.size < count:
        history.append(**rows)
        history.draw(64, torch.Generator().manual_seed(history.size))
    assert resident_bytes() - memory < 8 * 2**20
    assert (tmp_path / "rows.bin").stat().st_size == count * (8 + 8 + 8 + 4 * 256 + 2 * 768 + 4)
    state = history.state()
    History(tmp_path, (4, 8, 8), (3, 16, 16), num_parts=1, device=torch.device("cpu")).load_state(state, tmp_path)
    assert resident_bytes() - memory < 64 * 2**20


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv"])
def test_a_long_list_of_prompts_stays_on_disk(tmp_path, soak, suffix):
    count = 10_000_000 if soak else 300_000
    path = tmp_path / f"prompts.{suffix}"
    head, line = {
        "txt": ("", "a photograph of {} lighthouses at the end of a long pier\n"),
        "jsonl": ("", '{{"prompt": "a photograph of {} lighthouses", "n": 1}}\n'),
        "csv": ("prompt,n\n", '"a photograph of {} lighthouses",1\n'),
    }[suffix]
    with open(path, "w") as file:
        file.write(head)
        file.writelines(line.format(number) for number in range(count))
    PromptList(["a cat"])
    memory = resident_bytes()
    prompts = PromptList([str(path)])
    assert len(prompts) == count and prompts[count - 1].startswith(f"a photograph of {count - 1} ")
    kept = prompts.select(prompts.crc32 % 5 != 0)
    assert kept[0] == next(prompt for prompt in prompts if zlib.crc32(prompt.encode()) % 5)
    assert (
        resident_bytes() - memory < 60 * count + 8 * 2**20
    )  # 24 bytes each in up to three copies: building, all, kept
