"""Files are whole or absent, whoever else writes beside them."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from noisepolicy import storage
from noisepolicy.storage import HALF_WRITTEN, write_bytes


def test_nothing_is_written_through_a_link(tmp_path, monkeypatch):
    """Laid where the file is while it is half-written, by somebody who guesses its name."""
    other, path = tmp_path / "other", tmp_path / "a.json"
    other.write_bytes(b"mine")
    monkeypatch.setattr(storage.secrets, "randbelow", lambda limit: 7)
    (link := tmp_path / f".{path.name}.7.tmp").symlink_to(other)
    with pytest.raises(FileExistsError):
        write_bytes(path, b"{}")
    assert other.read_bytes() == b"mine" and link.is_symlink() and not path.exists()


def test_threads_write_the_same_file_side_by_side(tmp_path):
    path = tmp_path / "a.json"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: write_bytes(path, bytes([number]) * 1000), range(100)))
    assert len(set(path.read_bytes())) == 1 and list(tmp_path.iterdir()) == [path]


def test_names_of_half_written_files_are_known_as_such(tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(storage.os, "fsync", lambda descriptor: names.extend(tmp_path.iterdir()))
    write_bytes(tmp_path / "a.json", b"{}")
    assert len(names) == 1 and names[0].match(HALF_WRITTEN)
