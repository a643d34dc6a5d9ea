"""The history on disk: rows that stay together, draws as from memory, and what a disk can do to it."""

import os

import pytest
import torch

from noisepolicy.storage import DamagedFileError
from noisepolicy.training.rows import History

ACTION, PICTURE = (3, 2), (1, 2, 2)


def make_history(folder):
    return History(folder, ACTION, PICTURE, num_parts=2, device=torch.device("cpu"))


def batch(start, count=4):
    rows = torch.arange(start, start + count)
    return {
        "prompt_row": rows,
        "step_index": rows + 1,
        "parts": torch.stack([rows / 3, rows + 1e-9], 1).double(),
        "action": rows[:, None, None].expand(-1, 3, 2) / 7,
        "picture": rows[:, None, None, None].expand(-1, 1, 2, 2) / 5,
    }


def filled(folder, batches=3):
    history = make_history(folder)
    for number in range(batches):
        history.append(**batch(4 * number))
    return history


def same_draws(first, second):
    one, other = (history.draw(64, torch.Generator().manual_seed(0)) for history in (first, second))
    return all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


def test_draws_are_those_of_tensors_in_memory(tmp_path):
    drawn = filled(tmp_path).draw(64, torch.Generator().manual_seed(0))
    index = torch.randint(12, (64,), generator=torch.Generator().manual_seed(0))
    rows = batch(0, 12)
    assert all(torch.equal(drawn[name], rows[name][index]) for name in ("prompt_row", "step_index", "parts", "action"))
    assert torch.equal(drawn["picture"], rows["picture"].half()[index])


def test_a_checkpoint_s_rows_come_back_and_later_ones_are_made_again(tmp_path):
    history = filled(tmp_path / "h", 2)
    state = history.state()
    history.append(**batch(8))
    os.truncate(tmp_path / "h" / "rows.bin", (tmp_path / "h" / "rows.bin").stat().st_size - 1)  # torn by a crash
    restored = make_history(tmp_path / "h")
    restored.load_state(state, tmp_path / "h")
    assert restored.state() == state
    restored.append(**batch(8))
    assert same_draws(restored, filled(tmp_path / "other"))
    assert (tmp_path / "h" / "rows.bin").read_bytes() == (tmp_path / "other" / "rows.bin").read_bytes()


def test_another_process_has_its_own_rows(tmp_path):
    main, other = filled(tmp_path), filled(None)
    assert same_draws(main, other)
    copy = make_history(None)
    copy.load_state(main.state(), tmp_path)
    copy.append(**batch(12))
    main.append(**batch(12))
    assert same_draws(main, copy)


@pytest.mark.parametrize("place", ["row 0", "row 5", "row 11", "cut", "missing", "header", "no header", "other rows"])
def test_damage_is_named(tmp_path, place):
    state = filled(tmp_path).state()
    rows, header = tmp_path / "rows.bin", tmp_path / "header.json"
    size = rows.stat().st_size // 12
    if place.startswith("row"):
        data = bytearray(rows.read_bytes())
        data[int(place.split()[1]) * size + 20] ^= 1
        rows.write_bytes(data)
        expected = f"{place} of .*rows.bin is damaged"
    elif place == "cut":
        os.truncate(rows, size * 12 - 1)
        expected = "cut short: 11 rows of 12"
    elif place == "missing":
        rows.unlink()
        expected = "rows.bin cannot be read"
    elif place == "header":
        header.write_bytes(header.read_bytes().replace(b"<f4", b"<f8"))
        expected = "header.json is not this run's"
    elif place == "no header":
        header.write_bytes(b"")
        expected = "header.json cannot be read"
    else:
        state["digest"] ^= 1
        expected = "other rows than the checkpoint's"
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DamagedFileError, match=expected):
        make_history(tmp_path).load_state(state, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_row_that_the_disk_altered_is_not_trained_on(tmp_path):
    history = filled(tmp_path)
    with open(tmp_path / "rows.bin", "r+b") as file:
        file.seek(30)
        file.write(b"x")
    with pytest.raises(DamagedFileError, match=r"row 0 of .*rows.bin is damaged"):
        history.draw(200, torch.Generator().manual_seed(0))
