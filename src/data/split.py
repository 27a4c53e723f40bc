"""The split into training and validation data, and a fingerprint to detect changes of the data of a resumed run.

A sample belongs to the validation set if its hash is below the threshold val_fraction * 2^64. The hash is the 8 bytes
of BLAKE2b over "<split_seed>/<id>" in UTF-8, as a big-endian integer. It depends on nothing else, so adding
or removing samples does not move others.
"""

import hashlib
import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from src.cache import write_atomically
from src.data.sources import Source

Hashes = npt.NDArray[np.uint64]

FINGERPRINT_FILE = "data.safetensors"
"""The file in a run folder with its `DataFingerprint`."""


def sample_ids(source: Source) -> Iterable[str]:
    """Return the id of each sample, or its index if the source has no ids."""
    return map(str, range(len(source))) if source.ids is None else source.ids


def hash_ids(ids: Iterable[str], split_seed: int) -> Hashes:
    """Return the hash (N,) of each id. Takes about a microsecond each."""
    # File names may contain bytes that are not UTF-8, which Python represents as surrogates.
    texts = (f"{split_seed}/{each}".encode("utf-8", "surrogatepass") for each in ids)
    digests = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, ">u8").astype(np.uint64)


def hash_threshold(val_fraction: float) -> int:
    """Return the smallest hash of a training sample."""
    return math.ceil(val_fraction * 2**64)


def split(hashes: Hashes, threshold: int) -> tuple[list[int], list[int], int]:
    """Return the indices of validation and training samples, each ordered by hash, and the threshold between them.

    The returned threshold differs if one side would be empty: then the sample with the smallest hash is for
    validation, or the one with the largest for training. Raises ValueError if all hashes are equal, as that of one.
    """
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    if len(ordered) == 1:
        raise ValueError("one sample cannot be both for training and for validation")
    if not len(ordered) or ordered[0] == ordered[-1]:
        raise ValueError("all samples are equal")
    threshold = min(max(threshold, int(ordered[0]) + 1), int(ordered[-1]))
    count = int(np.searchsorted(ordered, np.uint64(threshold)))
    return order[:count].tolist(), order[count:].tolist(), threshold


def split_by_mask(hashes: Hashes, mask: npt.NDArray[np.bool_]) -> tuple[list[int], list[int]]:
    """Return the indices of validation and training samples, each ordered by hash; `mask` (N,) marks validation.

    Raises ValueError if one side is empty.
    """
    order = np.argsort(hashes, kind="stable")
    held_out = np.asarray(mask, bool)[order]
    if held_out.all() or not held_out.any():
        raise ValueError("its own split leaves no samples for training or for validation")
    return order[held_out].tolist(), order[~held_out].tolist()


class DataFingerprint(NamedTuple):
    """The data of a run at its start: hash and stamp (both (N,)) of each sample in order of hashes, and the split."""

    hashes: Hashes
    stamps: Hashes
    split_seed: int
    val_fraction: float
    bound: int | None
    """The threshold of the split; None if the source defined it."""

    @classmethod
    def of(cls, source: Source, split_seed: int, val_fraction: float, bound: int | None) -> "DataFingerprint":
        hashes = hash_ids(sample_ids(source), split_seed)
        order = np.argsort(hashes, kind="stable")
        return cls(hashes[order], _stamps(source)[order], split_seed, val_fraction, bound)

    def write(self, path: Path) -> None:
        from safetensors.numpy import save

        metadata = {name: str(value) for name, value in self._asdict().items() if name not in ("hashes", "stamps")}
        write_atomically(path, save({"hashes": self.hashes, "stamps": self.stamps}, metadata))

    @classmethod
    def read(cls, path: Path) -> "DataFingerprint | None":
        """Return the fingerprint in a file. Warns and returns None if it is missing or corrupted."""
        from safetensors import safe_open

        try:
            with safe_open(path, "numpy") as file:
                metadata: dict[str, str] = file.metadata()
                hashes, stamps = file.get_tensor("hashes"), file.get_tensor("stamps")
            if not hashes.dtype == stamps.dtype == np.uint64 or not hashes.shape == stamps.shape == (hashes.size,):
                raise ValueError("wrong type or shape")
            fraction = float(metadata["val_fraction"])
            bound = None if metadata["bound"] == "None" else int(metadata["bound"])
            return cls(hashes, stamps, int(metadata["split_seed"]), fraction, bound)
        except FileNotFoundError:
            reason = "is missing"
        except Exception as error:  # a corrupted file can raise anything
            reason = f"cannot be read ({' '.join(str(error).split()):.100})"
        warnings.warn(
            f"{path} {reason}: cannot check whether the data and their split changed since the run began; runs from "
            "before this file existed used another split",
            stacklevel=2,
        )
        return None

    def changes(self, source: Source, val_indices: Sequence[int]) -> str:
        """Describe how the data with validation samples `val_indices` differ from the record; empty if they do not."""
        ids = list(sample_ids(source))
        now, stamps = hash_ids(ids, self.split_seed), _stamps(source)
        added = np.flatnonzero(_surplus(now, self.hashes))
        removed = int(_surplus(self.hashes, now).sum())
        position = np.searchsorted(self.hashes, now).clip(max=len(self.hashes) - 1)
        known = self.hashes[position] == now
        changed = np.flatnonzero(known & (self.stamps[position] != stamps))
        after = np.zeros(len(now), bool)
        after[np.asarray(val_indices, np.int64)] = True
        before = after if self.bound is None else now < np.uint64(self.bound)
        moved = {
            "validation samples moved to training": int((known & before & ~after).sum()),
            "training samples moved to validation": int((known & ~before & after).sum()),
        }
        if not (len(added) or removed or len(changed) or any(moved.values())):
            return ""
        parts = [f"{len(added)} added{_examples(ids, added)}", f"{removed} removed"]
        parts.append(f"{len(changed)} changed{_examples(ids, changed)}")
        moves = [f"{count} {what}" for what, count in moved.items() if count]
        return (
            f"the data changed since the run began ({len(self.hashes)} samples then, {len(now)} now): "
            f"{', '.join(parts)}; {int(after[added].sum())} of the added are for validation, "
            f"{', '.join(moves) or 'no other sample changed sides'}"
        )


def _stamps(source: Source) -> Hashes:
    stamps = source.stamps()
    return np.zeros(len(source), np.uint64) if stamps is None else np.asarray(stamps, np.uint64)


def _surplus(some: Hashes, others: Hashes) -> npt.NDArray[np.bool_]:
    """Return which hashes (N,) exceed their number among `others`; of equal hashes, the last ones."""
    import pandas as pd

    hashes = pd.Series(some)
    counts = hashes.map(pd.Series(others).value_counts()).fillna(0)
    surplus: npt.NDArray[np.bool_] = (hashes.groupby(hashes).cumcount() >= counts).to_numpy()
    return surplus


def _examples(ids: Sequence[str], which: npt.NDArray[np.int64], limit: int = 3) -> str:
    if not len(which):
        return ""
    names = ", ".join(f"{ids[k]:.60}".replace("\x1f", ",") for k in which[:limit])
    return f" ({names}{', ...' if len(which) > limit else ''})"
