"""Which samples are held out, and what a run remembers of its data.

A sample is held out if its hash lies below `val_fraction` of all: the 8 bytes of BLAKE2b over "<split_seed>/<id>" in
UTF-8, as a number, big-endian, divided by 2^64. Nothing else enters: samples that come or go move no others.
"""

import hashlib
import math
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from src.data.sources import Source

Hashes = npt.NDArray[np.uint64]

RECORD = "data.safetensors"
"""The file in a run's folder with its `Record`."""


def ids_of(source: "Source") -> Iterable[str]:
    """What each sample is known by; its number where the source says nothing else."""
    return map(str, range(len(source))) if source.ids is None else source.ids


def hash_ids(ids: Iterable[str], split_seed: int) -> Hashes:
    """The hash (N,) of each id, as the module's docstring defines it. About a microsecond each."""
    # File names may hold bytes that are no UTF-8, which Python has as surrogates.
    texts = (f"{split_seed}/{each}".encode("utf-8", "surrogatepass") for each in ids)
    digests = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, ">u8").astype(np.uint64)


def bound_of(val_fraction: float) -> int:
    """The hash from which on samples are for training."""
    return math.ceil(val_fraction * 2**64)


def split(hashes: Hashes, bound: int) -> tuple[list[int], list[int], int]:
    """Indices of the held-out samples, of those for training, and the bound between them; both in order of the hashes.

    That is `bound`, unless one side would be empty: then the sample with the smallest hash is held out, or that with
    the largest is for training. Raises ValueError if all hashes are the same.
    """
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    if not len(ordered) or ordered[0] == ordered[-1]:
        raise ValueError("there are not two different samples")
    bound = min(max(bound, int(ordered[0]) + 1), int(ordered[-1]))
    count = int(np.searchsorted(ordered, np.uint64(bound)))
    return order[:count].tolist(), order[count:].tolist(), bound


class Record(NamedTuple):
    """The data that a run began with: the hash of each sample, in order, and its stamp (both (N,)), and their split."""

    hashes: Hashes
    stamps: Hashes
    split_seed: int
    val_fraction: float
    bound: int

    @classmethod
    def of(cls, source: "Source", split_seed: int, val_fraction: float, bound: int) -> "Record":
        hashes = hash_ids(ids_of(source), split_seed)
        order = np.argsort(hashes, kind="stable")
        return cls(hashes[order], stamps_of(source)[order], split_seed, val_fraction, bound)

    def write(self, path: Path) -> None:
        from safetensors.numpy import save_file

        about = {name: str(value) for name, value in self._asdict().items() if name not in ("hashes", "stamps")}
        partial = path.with_name(f"{path.name}.partial")
        try:
            save_file({"hashes": self.hashes, "stamps": self.stamps}, partial, about)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path) -> "Record | None":
        """The record in a file. None, with a warning, if it is not there or damaged."""
        from safetensors import safe_open

        try:
            with safe_open(path, "numpy") as file:
                about: dict[str, Any] = file.metadata()
                hashes, stamps = file.get_tensor("hashes"), file.get_tensor("stamps")
            if not hashes.dtype == stamps.dtype == np.uint64 or not hashes.shape == stamps.shape == (hashes.size,):
                raise ValueError("its arrays have other types or shapes")
            seed, fraction, bound = int(about["split_seed"]), float(about["val_fraction"]), int(about["bound"])
            return cls(hashes, stamps, seed, fraction, bound)
        except FileNotFoundError:
            reason = "is missing"
        except Exception as error:  # whatever a damaged file leads to
            reason = f"cannot be read ({' '.join(str(error).split()):.100})"
        warnings.warn(
            f"{path} {reason}: whether the data and their split are those that the run began with is unknown; a run "
            "from before there was such a file held out other samples",
            stacklevel=2,
        )
        return None

    def changes(self, source: "Source", held_out: Sequence[int]) -> str:
        """What is different in the data now, of which the samples `held_out` are; empty if nothing is."""
        ids = list(ids_of(source))
        now, stamps = hash_ids(ids, self.split_seed), stamps_of(source)
        added = np.flatnonzero(_beyond(now, self.hashes))
        removed = int(_beyond(self.hashes, now).sum())
        place = np.searchsorted(self.hashes, now).clip(max=len(self.hashes) - 1)
        known = self.hashes[place] == now
        changed = np.flatnonzero(known & (self.stamps[place] != stamps))
        before, after = now < np.uint64(self.bound), np.zeros(len(now), bool)
        after[np.asarray(held_out, np.int64)] = True
        moved = {
            "held-out samples are now trained on": int((known & before & ~after).sum()),
            "training samples are now held out": int((known & ~before & after).sum()),
        }
        if not (len(added) or removed or len(changed) or any(moved.values())):
            return ""
        parts = [f"{len(added)} added{_named(ids, added)}", f"{removed} removed"]
        parts.append(f"{len(changed)} changed{_named(ids, changed)}")
        joined = int(after[added].sum())
        moves = [f"{count} {what}" for what, count in moved.items() if count]
        return (
            f"the data changed since the run began ({len(self.hashes)} samples then, {len(now)} now): "
            f"{', '.join(parts)}; {joined} of the added held out, {', '.join(moves) or 'no other changes sides'}"
        )


def stamps_of(source: "Source") -> Hashes:
    """A number (N,) for each sample that tells another content under the same id, as far as the source can tell."""
    stamps = source.stamps()
    return np.zeros(len(source), np.uint64) if stamps is None else np.asarray(stamps, np.uint64)


def _beyond(some: Hashes, others: Hashes) -> npt.NDArray[np.bool_]:
    """Which of some hashes (N,) are more often among them than among others: so many of them, the last ones."""
    order = np.argsort(some, kind="stable")
    ordered = some[order]
    turn = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)  # 0 for the first of each value, then 1, ...
    others = np.sort(others)
    there = np.searchsorted(others, ordered, side="right") - np.searchsorted(others, ordered)
    found = np.zeros(len(some), bool)
    found[order] = turn >= there
    return found


def _named(ids: Sequence[str], which: npt.NDArray[np.int64], most: int = 3) -> str:
    if not len(which):
        return ""
    names = ", ".join(f"{ids[k]:.60}".replace("\x1f", ",") for k in which[:most])
    return f" ({names}{', ...' if len(which) > most else ''})"
