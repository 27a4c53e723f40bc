"""Corrupted checkpoint files."""

from __future__ import annotations

import io
import random
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from src.training.checkpoints import is_intact, read_checkpoint


@pytest.fixture(scope="module")
def contents() -> bytes:
    torch.manual_seed(0)
    file = io.BytesIO()
    weights = {f"w{k}": torch.randn(300 * k) for k in range(1, 9)}
    torch.save({"state_dict": weights, "global_step": 3}, file)
    return file.getvalue()


def test_checkpoint_of_torch_is_intact(contents, tmp_path):
    path = tmp_path / "a.ckpt"
    path.write_bytes(contents)
    assert is_intact(path)


def test_flipped_bit_in_a_tensor_is_recognized(contents, tmp_path):
    """In each tensor, at 20 random positions; and in the pickle."""
    path, rng = tmp_path / "a.ckpt", random.Random(0)
    with zipfile.ZipFile(io.BytesIO(contents)) as archive:
        members = [m for m in archive.infolist() if "/data" in m.filename]
        places = {m.filename: (contents.index(archive.read(m)), m.file_size) for m in members}
    assert sum("/data/" in name for name in places) == 8 and any(name.endswith("data.pkl") for name in places)
    for start, size in places.values():
        for _ in range(20):
            damaged = bytearray(contents)
            damaged[start + rng.randrange(size)] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            assert not is_intact(path)


def test_flipped_bit_never_changes_a_weight_silently(contents, tmp_path):
    """No CRC covers padding and the central directory: there the file is refused, or has equal weights."""
    path, rng = tmp_path / "a.ckpt", random.Random(0)
    expected = torch.load(io.BytesIO(contents), weights_only=True)["state_dict"]
    for place in [*rng.sample(range(len(contents)), 200), *range(len(contents) - 300, len(contents))]:
        damaged = bytearray(contents)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with suppress(ValueError):  # refused in one line
            if is_intact(path):
                got = read_checkpoint(path)["state_dict"]
                assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)


def test_truncated_file_is_recognized(contents, tmp_path):
    path = tmp_path / "a.ckpt"
    for share in (0.0, 0.02, 0.3, 0.9, 0.99999):
        path.write_bytes(contents[: int(share * len(contents))])
        assert not is_intact(path), share


def test_compressed_archive_is_refused(tmp_path: Path):
    """A small file must not expand in memory."""
    path = tmp_path / "a.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))
    assert not is_intact(path)
