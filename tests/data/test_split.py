"""The split by hash of sample ids, and the fingerprint that reveals changes of the data."""

import hashlib
import math
import os
import random
import shutil
import unicodedata
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image

from src.data.module import BaseDataModule
from src.data.sources import InMemory
from src.data.split import DataFingerprint, hash_ids, split
from src.evaluate import evaluate
from tests.conftest import compose, train_tiny

TINY_IMAGES = ["data.image_size=8", "data.batch_size=4", "data.val_fraction=0.3", "data.num_workers=0"]


def is_validation(name: str, fraction: float = 0.3, seed: int = 0) -> bool:
    """Return whether a sample is for validation, by an independent implementation of docs/data.md."""
    return int(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).hexdigest(), 16) / 16**16 < fraction


def held_out_digits() -> int:
    """Return the number of validation samples at the fraction of conf/data/digits.yaml."""
    return sum(is_validation(str(k), 0.2) for k in range(1797))


def write_image(path: Path, seed: int, size: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_images(root: Path, count: int = 24) -> list[str]:
    """Write images into two subfolders, the classes, and return their names."""
    names = [f"{('cats', 'dogs')[k % 2]}/{k:02d}.png" for k in range(count)]
    for k, name in enumerate(names):
        write_image(root / name, k)
    return names


def sides(choice: str, *overrides: str) -> tuple[set[str], set[str]]:
    """Return the ids of validation and training samples of a configuration."""
    data = instantiate(compose("train", f"data={choice}", *overrides).data)
    data.setup()
    ids = [str(k) for k in range(len(data.source))] if data.source.ids is None else data.source.ids
    return {ids[k] for k in data.val_indices}, {ids[k] for k in data.train_indices}


def test_files_split_by_relative_path(tmp_path):
    """Independent of the root's path, following the documented rule and the split seed."""
    names = write_images(tmp_path / "here" / "photos")
    wanted = {name for name in names if is_validation(name)}
    assert 0 < len(wanted) < 24
    shutil.copytree(tmp_path / "here", tmp_path / "elsewhere")
    for root in (tmp_path / "here" / "photos", tmp_path / "elsewhere" / ".." / "elsewhere" / "photos"):
        assert sides("folder", f"data.root='{root}'", *TINY_IMAGES) == (wanted, set(names) - wanted)
    other = {name for name in names if is_validation(name, seed=7)}
    assert sides("folder", f"data.root='{root}'", *TINY_IMAGES, "data.split_seed=7")[0] == other != wanted
    more = {name for name in names if is_validation(name, 0.5)}
    assert sides("folder", f"data.root='{root}'", *TINY_IMAGES, "data.val_fraction=0.5")[0] == more > wanted


@pytest.mark.parametrize("choice", ["folder", "captions"])
def test_added_and_removed_files_move_no_others(tmp_path, choice):
    names = write_images(tmp_path)
    for name in names:
        (tmp_path / name).with_suffix(".txt").write_text("an image")
    before = sides(choice, f"data.root='{tmp_path}'", *TINY_IMAGES)
    for name in ("aaa/0.png", "cats/000.png", "zzz/9.png"):
        write_image(tmp_path / name, 1)
        (tmp_path / name).with_suffix(".txt").write_text("another")
    (tmp_path / names[3]).unlink()
    after = sides(choice, f"data.root='{tmp_path}'", *TINY_IMAGES)
    for old, new in zip(before, after, strict=True):
        assert old - new <= {names[3]} and new - old <= {"aaa/0.png", "cats/000.png", "zzz/9.png"}


def test_unicode_forms_of_names_split_equally(tmp_path):
    """File systems store accents in different forms."""
    for form in ("NFC", "NFD"):
        for k in range(12):
            write_image(tmp_path / form / unicodedata.normalize(form, f"é{k}.png"), k)
    one, other = (sides("folder", f"data.root='{tmp_path / form}'", *TINY_IMAGES) for form in ("NFC", "NFD"))
    assert one == other and {unicodedata.normalize("NFC", name) for name in one[0]} == one[0]


def test_rows_split_by_their_cells(tmp_path):
    """Independent of order, line ends and other rows; equal rows are on the same side."""
    chance = random.Random(0)
    rows = [f"{chance.gauss(0, 1):.6f},{chance.random():.6f}" for _ in range(40)]
    table, path = "a,b\n" + "\n".join(rows), tmp_path / "a.csv"
    settings = ["data.val_fraction=0.3", "data.batch_size=4"]
    path.write_text(table)
    before = sides("table", f"data.path='{path}'", *settings)
    assert before[0] == {row.replace(",", "\x1f") for row in rows if is_validation(row.replace(",", "\x1f"))}
    chance.shuffle(rows)
    other = tmp_path / "moved" / "b.csv"
    other.parent.mkdir()
    other.write_bytes(("a,b\r\n9.5,0.25\r\n" + "\r\n".join([*rows[1:], rows[5], rows[5]])).encode())
    after = sides("table", f"data.path='{other}'", *settings)
    assert not after[0] & after[1]
    for old, new in zip(before, after, strict=True):
        assert old - new <= {rows[0].replace(",", "\x1f")} and new - old <= {"9.5\x1f0.25"}


def test_fixed_datasets_split_by_index():
    validation, _ = sides("digits")
    assert validation == {str(k) for k in range(1797) if is_validation(str(k), 0.2)}


def test_the_fraction_is_about_val_fraction():
    """Within 4 standard deviations of a binomial over 10,000 ids; splits by different seeds are independent."""
    hashes = {seed: hash_ids((f"img_{k}.png" for k in range(10_000)), seed) for seed in range(4)}
    for fraction in (0.02, 0.1, 0.5, 0.9):
        four = 4 * math.sqrt(10_000 * fraction * (1 - fraction))
        chosen = []
        for each in hashes.values():
            validation, train, _ = split(each, math.ceil(fraction * 2**64))
            assert sorted(validation + train) == list(range(10_000))
            assert abs(len(validation) - 10_000 * fraction) < four
            chosen.append(set(validation))
        both = fraction**2
        assert abs(len(chosen[0] & chosen[1]) - 10_000 * both) < 4 * math.sqrt(10_000 * both * (1 - both))


def test_the_split_order_ignores_the_listing_order():
    ids = [f"{k}.png" for k in range(50)]
    shuffled = random.Random(1).sample(ids, 50)
    first, second = (
        [[listed[k] for k in side] for side in split(hash_ids(listed, 0), 2**62)[:2]] for listed in (ids, shuffled)
    )
    assert first == second


def test_no_side_of_a_split_is_empty():
    """The smallest hash is for validation, the largest for training; equal samples cannot be split."""
    ids = ["a", "b", "c"]
    by_hash = sorted(ids, key=lambda each: hashlib.blake2b(f"0/{each}".encode(), digest_size=8).digest())
    for fraction, count in ((1e-9, 1), (1 - 1e-9, 2)):
        validation, train, _ = split(hash_ids(ids, 0), math.ceil(fraction * 2**64))
        assert [ids[k] for k in validation] == by_hash[:count] and [ids[k] for k in train] == by_hash[count:]
    source = InMemory(torch.zeros(5, 2), ids=["same"] * 5)
    data = BaseDataModule(lambda: source, (2,), 1, 0.2, 0, 0, 0)
    with pytest.raises(ValueError, match=r"data\.val_fraction=0\.2 cannot split 5 samples"):
        data.setup()


def test_the_stored_threshold_keeps_the_split(tmp_path):
    """Even if no hash was below the fraction, and an added sample has a smaller one."""

    def module(ids: list[str]) -> BaseDataModule:
        source = InMemory(torch.zeros(len(ids), 2), ids=ids)
        return BaseDataModule(lambda: source, (2,), 1, 1e-9, 0, 0, 0)

    names = sorted((f"{k}.png" for k in range(8)), key=lambda each: int(hash_ids([each], 0)[0]))
    first = module(names[1:])
    first.setup()
    first.write_fingerprint(tmp_path / "record")
    second = module(names)
    second.fingerprint_path = tmp_path / "record"
    with pytest.warns(UserWarning, match="1 added .*1 of the added are for validation, no other sample changed sides"):
        second.setup()
    assert [names[k] for k in second.val_indices] == names[:2]


def test_a_resumed_run_warns_of_changed_data(tmp_path):
    """Evaluation warns too: of an added, a removed and a changed file, but not of another folder."""
    names = write_images(tmp_path / "photos")
    run, moved = tmp_path / "run", tmp_path / "moved"
    no_pictures = ["callbacks.samples=null", "callbacks.bits_per_dim=null", "neighbors.num_samples=0"]
    settings = ["data=folder", *TINY_IMAGES, *no_pictures]
    train_tiny(run, *settings, f"data.root='{tmp_path / 'photos'}'", "trainer.max_steps=2", "validate_every=2")
    shutil.move(tmp_path / "photos", moved)
    for path in moved.rglob("*.png"):
        os.utime(path, (1, 1))  # as after copying
    evaluating = ["device=cpu", "quality=false", "alignment.enabled=false", "num_terms=2", "num_val=2"]
    evaluation = compose("evaluate", f"run='{run}'", f"data.root='{moved}'", f"run_dir='{tmp_path / 'e'}'", *evaluating)
    again = [*settings, f"data.root='{moved}'", f"resume='{run}'"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_tiny(run, *again, "trainer.max_steps=3", "validate_every=1")
        evaluate(evaluation)
    assert not [w for w in caught if "data changed" in str(w.message)]

    new = next(f"cats/new{k}.png" for k in range(99) if is_validation(f"cats/new{k}.png"))
    write_image(moved / new, 99)
    (moved / names[0]).unlink()
    write_image(moved / names[5], 5, size=16)
    for start in (partial(train_tiny, run, *again, "trainer.max_steps=4"), partial(evaluate, evaluation)):
        with pytest.warns(UserWarning, match="data changed") as caught:
            start()
        (line,) = [str(w.message) for w in caught if "data changed" in str(w.message)]
        assert "\n" not in line
        for part in ("24 samples then, 24 now", f"1 added ({new})", "1 removed", f"1 changed ({names[5]})"):
            assert part in line
        assert "1 of the added are for validation, no other sample changed sides" in line


def test_samples_moved_by_a_setting_are_counted(tmp_path):
    ids = [f"{k}.png" for k in range(200)]
    source = InMemory(torch.zeros(200, 2), ids=ids)
    before, after = (BaseDataModule(lambda: source, (2,), 1, f, 0, 0, 0) for f in (0.5, 0.2))
    before.setup()
    before.write_fingerprint(tmp_path / "record")
    after.fingerprint_path = tmp_path / "record"
    moved = sum(is_validation(each, 0.5) and not is_validation(each, 0.2) for each in ids)
    with pytest.warns(UserWarning, match=f"{moved} validation samples moved to training"):
        after.setup()


def test_a_missing_or_corrupted_fingerprint_warns(tmp_path):
    source = InMemory(torch.zeros(9, 2))
    for contents in (None, b"", b"\xff" * 40):
        data = BaseDataModule(lambda: source, (2,), 1, 0.3, 0, 0, 0)
        data.fingerprint_path = tmp_path / "record"
        if contents is not None:
            data.fingerprint_path.write_bytes(contents)
        with pytest.warns(UserWarning, match="record (is missing|cannot be read)"):
            data.setup()
        assert len(data.val_indices) + len(data.train_indices) == 9


def test_changes_match_an_independent_count():
    """Also where several samples share an id."""
    chance = random.Random(3)
    for _ in range(20):
        then, now = ([chance.choice("abcdefgh") for _ in range(chance.randint(2, 12))] for _ in "12")
        if {*then} == {then[0]}:
            continue
        was = InMemory(torch.zeros(len(then), 1), ids=then)
        before = DataFingerprint.of(was, 0, 0.3, 2**62)
        message = before.changes(InMemory(torch.zeros(len(now), 1), ids=now), [])
        more = sum(max(0, now.count(c) - then.count(c)) for c in "abcdefgh")
        fewer = sum(max(0, then.count(c) - now.count(c)) for c in "abcdefgh")
        if more or fewer:
            assert f" {more} added" in message and f" {fewer} removed" in message
