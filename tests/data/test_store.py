"""What is kept on disk: computed once by all processes, whatever was damaged or cut off."""

import multiprocessing
import pickle
from functools import partial

import numpy as np
import pytest

from src.data.store import RECORD, Store


def rows(number, count=3):
    return np.random.default_rng(number).normal(size=(count, 4)).astype(np.float16)


def compute(keys, asked=None):
    if asked is not None:
        asked.extend(keys)
    return [rows(key, 1 + key % 5) for key in keys]


def expect(found, keys):
    assert len(found) == len(keys)
    for each, key in zip(found, keys, strict=True):
        assert (each == rows(key, 1 + key % 5)).all()


def test_what_is_stored_is_computed_once(tmp_path):
    store, asked = Store(tmp_path / "new", 4), []
    expect(store.get([3, 1, 3], partial(compute, asked=asked)), [3, 1, 3])
    expect(store.get([2**62, 1], partial(compute, asked=asked)), [2**62, 1])
    assert asked == [3, 1, 2**62]
    again = Store(tmp_path / "new", 4)
    assert again.lacks([5, 1, 3, 4, 5]) == [5, 4]
    for each in (again, pickle.loads(pickle.dumps(again))):
        expect(each.get([1, 2**62, 3], None), [1, 2**62, 3])
    expect(again.get([8], compute), [8])
    expect(store.get([8, 1], None), [8, 1])  # what another has written since
    assert store.get([], None) == []


@pytest.mark.parametrize("name", ["index", "rows"])
def test_what_a_killed_process_began_to_write_does_no_harm(tmp_path, name):
    expect(Store(tmp_path, 4).get([1, 2], compute), [1, 2])
    with (tmp_path / name).open("ab") as file:
        file.write(b"abc")
    expect(Store(tmp_path, 4).get([2, 1, 3], compute), [2, 1, 3])
    expect(Store(tmp_path, 4).get([3, 2, 1], None), [3, 2, 1])


def test_what_is_damaged_is_computed_again(tmp_path):
    expect(Store(tmp_path, 4).get([1, 2], compute), [1, 2])
    path = tmp_path / "rows"
    whole = path.read_bytes()
    for damaged in (bytes([whole[0] ^ 1]) + whole[1:], b"", whole[:-3]):
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match="is damaged: what is missing is computed again"):
            expect(Store(tmp_path, 4).get([2, 1], compute), [2, 1])
        expect(Store(tmp_path, 4).get([1, 2], None), [1, 2])
    assert (tmp_path / "index").stat().st_size % RECORD.itemsize == 0


def test_where_nothing_can_be_written_it_is_done_without(tmp_path):
    (tmp_path / "file").touch()
    store = Store(tmp_path / "file", 4)
    with pytest.warns(UserWarning, match="could not be") as said:
        expect(store.get([1, 2], compute) + store.get([3], compute), [1, 2, 3])
    assert len(said) == 1


def slow(keys, log):
    with log.open("a") as file:
        file.writelines(f"{key}\n" for key in keys)
    return compute(keys)


def fill(folder, log, first):
    store = Store(folder, 4)
    for start in range(first, first + 40, 8):
        keys = [key % 40 for key in range(start, start + 8)]
        expect(store.get(keys, partial(slow, log=log)), keys)


def test_processes_compute_each_array_once(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=fill, args=(tmp_path / "store", tmp_path / "log", i)) for i in (0, 3, 20)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert sorted(map(int, (tmp_path / "log").read_text().split())) == list(range(40))
