"""Embeddings on disk: computed once by all processes, computed again if corrupted."""

import multiprocessing
import pickle
from functools import partial

import numpy as np
import pytest

from src.data.embedding_cache import EmbeddingCache


def embeddings(key):
    return np.random.default_rng(key).normal(size=(1 + key % 5, 4)).astype(np.float16)


def compute(keys, log=None):
    if log is not None:
        log.extend(keys)
    return [embeddings(key) for key in keys]


def never(keys):
    raise AssertionError(f"computed {keys} again")


def check(arrays, keys):
    assert len(arrays) == len(keys)
    for array, key in zip(arrays, keys, strict=True):
        assert array.dtype == np.float16 and np.array_equal(array, embeddings(key))


def test_cached_embeddings_are_computed_once(tmp_path):
    cache, log = EmbeddingCache(tmp_path / "new", 4), []
    check(cache.get([3, 1, 3], partial(compute, log=log)), [3, 1, 3])
    check(cache.get([2**62, 1], partial(compute, log=log)), [2**62, 1])
    assert log == [3, 1, 2**62]
    again = EmbeddingCache(tmp_path / "new", 4)
    assert again.missing([5, 1, 3, 4, 5]) == [5, 4]
    for each in (again, pickle.loads(pickle.dumps(again))):
        check(each.get([1, 2**62, 3], never), [1, 2**62, 3])
    assert cache.get([], never) == []


def test_embeddings_of_another_process_are_read(tmp_path):
    first, second = EmbeddingCache(tmp_path, 4), EmbeddingCache(tmp_path, 4)
    check(first.get([1], compute), [1])
    check(second.get([8, 1], compute), [8, 1])
    check(first.get([8, 1], never), [8, 1])


def test_leftovers_of_a_killed_process_are_ignored(tmp_path):
    check(EmbeddingCache(tmp_path, 4).get([1, 2], compute), [1, 2])
    (tmp_path / "x.safetensors.123.partial").write_bytes(b"abc")
    check(EmbeddingCache(tmp_path, 4).get([2, 1], never), [2, 1])


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-3], lambda b: b"\xff" * len(b)])
def test_a_corrupted_file_is_computed_again(tmp_path, damage):
    check(EmbeddingCache(tmp_path, 4).get([1, 2], compute), [1, 2])
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="is corrupted"):
        check(EmbeddingCache(tmp_path, 4).get([1, 2], compute), [1, 2])
    check(EmbeddingCache(tmp_path, 4).get([2, 1], never), [2, 1])


def test_another_width_is_computed_again(tmp_path):
    EmbeddingCache(tmp_path, 3).get([1], lambda keys: [np.zeros((2, 3), np.float16)])
    with pytest.warns(UserWarning, match="is corrupted"):
        check(EmbeddingCache(tmp_path, 4).get([1], compute), [1])


def test_an_unwritable_folder_warns_once(tmp_path):
    (tmp_path / "file").touch()
    cache = EmbeddingCache(tmp_path / "file", 4)
    with pytest.warns(UserWarning, match="cannot be") as warned:
        check(cache.get([1, 2], compute) + cache.get([3], compute), [1, 2, 3])
    assert len(warned) == 1


def compute_and_log(keys, log):
    with log.open("a") as file:
        file.writelines(f"{key}\n" for key in keys)
    return compute(keys)


def fill(folder, log, first):
    cache = EmbeddingCache(folder, 4)
    for start in range(first, first + 40, 8):
        keys = [key % 40 for key in range(start, start + 8)]
        check(cache.get(keys, partial(compute_and_log, log=log)), keys)


def test_processes_compute_each_embedding_once(tmp_path):
    context = multiprocessing.get_context("fork")
    folder, log = tmp_path / "cache", tmp_path / "log"
    workers = [context.Process(target=fill, args=(folder, log, first)) for first in (0, 3, 20)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert sorted(map(int, log.read_text().split())) == list(range(40))
    check(EmbeddingCache(folder, 4).get(range(40), never), range(40))


def read_in_worker(cache, queue):
    queue.put([array.tolist() for array in cache.get([1, 2], never)])


def test_forked_workers_read_the_open_files(tmp_path):
    cache = EmbeddingCache(tmp_path, 4)
    cache.get([1, 2], compute)
    check(cache.get([1, 2], never), [1, 2])  # opens the files before the fork
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    workers = [context.Process(target=read_in_worker, args=(cache, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    expected = [embeddings(key).tolist() for key in (1, 2)]
    assert [queue.get() for _ in workers] == [expected, expected]
    for worker in workers:
        worker.join()
