"""The image files of a dataset: where they are, which are for validation, and what is left out."""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
import numpy.typing as npt

from src.data.archives import open_member
from src.data.decode import HEIF_SUFFIXES
from src.data.encoded import EncodedImages, Names, keep_rows
from src.errors import counted, first_names, format_override, printable


@dataclass(frozen=True)
class FoundImages:
    """The images of a dataset, in order of their names.

    `names` are paths with slashes relative to one of `roots`, the one with number `which` (N,). `sizes` (N,) are bytes,
    `times` (N,) nanoseconds of the last change, `val_mask` (N,) whether the folder is one of validation images, or None
    without such folders. `left_out` has the names of other files by reason, relative to the first root or absolute.
    """

    roots: tuple[Path, ...]
    which: npt.NDArray[np.int64]
    names: Names
    sizes: npt.NDArray[np.int64]
    times: npt.NDArray[np.int64]
    val_mask: npt.NDArray[np.bool_] | None
    left_out: dict[str, list[str]]

    def __len__(self) -> int:
        return len(self.names)

    def open(self, index: int) -> BinaryIO:
        """Open the file of an image. Raises OSError."""
        return open_member(self.roots[int(self.which[index])], self.names[index])

    @property
    def root(self) -> Path:
        return self.roots[0]

    @property
    def place(self) -> str:
        return f"under {self.root}"

    def path(self, index: int) -> Path:
        """Return the path of an image, for messages."""
        return self.roots[int(self.which[index])] / self.names[index]

    def paths_of(self, index: int) -> list[str]:
        """Return the paths by which a table may name an image."""
        return [str(self.path(index))]

    def identity(self) -> str:
        """Return a digest of the place, name, size and time of change of every file."""
        total = sha256(f"{[str(root.resolve()) for root in self.roots]}".encode() + self.names.digest())
        total.update(self.which.tobytes() + self.sizes.tobytes() + self.times.tobytes())
        return total.hexdigest()

    def ids(self) -> Sequence[str]:
        """Return names in Unicode normal form C, since file systems store accents differently.

        With several roots, the number of the root comes first.
        """
        if len(self.roots) == 1 and all(name.isascii() for name in self.names):
            return self.names
        prefixes = [f"{k}/" if len(self.roots) > 1 else "" for k in range(len(self.roots))]
        named = zip(self.which, self.names, strict=True)
        stored = [f"{prefixes[k]}{name}" for k, name in named]
        taken = {*stored}  # a name in form D beside the same one in form C is another file
        composed = [unicodedata.normalize("NFC", name) for name in stored]
        return Names(name if new in taken else new for name, new in zip(stored, composed, strict=True))

    def keep(self, chosen: Sequence[bool] | npt.NDArray[np.bool_], reason: str) -> Self:
        """Return the chosen images; the others are left out for `reason`."""
        return keep_rows(self, chosen, reason)

    def without_used(self, paths: Iterable[Path]) -> Self:
        """Return the images; those of `paths` no longer count as left out, since they were read as captions or labels.

        Relative paths are below the first root.
        """
        used = {os.path.abspath(self.root / path) for path in paths}
        left = {
            reason: [name for name in out if os.path.abspath(self.root / name) not in used]
            for reason, out in self.left_out.items()
        }
        return replace(self, left_out={reason: out for reason, out in left.items() if out})


def join(parts: Sequence[FoundImages], val: FoundImages | None) -> FoundImages:
    """Return the images of several roots as one dataset; those of `val` are the validation set."""
    several = [*parts, *([] if val is None else [val])]
    if len(several) == 1:
        return several[0]
    masks = [np.zeros(len(part), bool) if part.val_mask is None else part.val_mask for part in parts]
    if val is not None:
        masks.append(np.ones(len(val), bool))
    has_split = val is not None or any(part.val_mask is not None for part in parts)
    left_out: dict[str, list[str]] = {}
    for k, part in enumerate(several):
        for reason, names in part.left_out.items():
            left_out.setdefault(reason, []).extend(os.path.abspath(part.root / name) if k else name for name in names)
    return FoundImages(
        tuple(part.root for part in several),
        np.repeat(np.arange(len(several)), [len(part) for part in several]),
        Names(name for part in several for name in part.names),
        np.concatenate([part.sizes for part in several]),
        np.concatenate([part.times for part in several]),
        np.concatenate(masks) if has_split else None,
        left_out,
    )


def without_linked(found: FoundImages) -> FoundImages:
    """Return the images without training images that are the same file as a validation image, by a link.

    Raises ValueError if none is left for training.
    """
    if found.val_mask is None:
        return found
    is_val = found.val_mask.tolist()
    stamps = list(zip(found.sizes.tolist(), found.times.tolist(), strict=True))  # equal for names of one file
    shared = {s for s, held in zip(stamps, is_val, strict=True) if held}
    shared &= {s for s, held in zip(stamps, is_val, strict=True) if not held}
    in_folder = [root.is_dir() for root in found.roots]
    inodes = {
        k: (status.st_dev, status.st_ino)
        for k, (stamp, root) in enumerate(zip(stamps, found.which.tolist(), strict=True))
        if stamp in shared and in_folder[root] and (status := os.stat(found.path(k)))
    }
    held_out = {inode for k, inode in inodes.items() if is_val[k]}
    kept = found.keep([held or inodes.get(k) not in held_out for k, held in enumerate(is_val)], "used for validation")
    if kept.val_mask is not None and kept.val_mask.all():
        raise ValueError(
            f"{format_override('data.root', str(found.root))} needs training samples, and all are links "
            "to validation samples or the targets of such links; replace the links, or set data.val_root to other files"
        )
    return kept


def describe(found: EncodedImages, classes: Sequence[str] | None, noun: str = "image") -> str:
    """Return one line about a dataset: files by type, classes with counts, and what was left out and why."""
    suffixes = Counter(suffix_of(name).lstrip(".") or "no ending" for name in found.names)
    roots = len(found.roots) if isinstance(found, FoundImages) else 1
    text = f"{counted(len(found), noun)} ({_counts(suffixes)})" + f" in {roots} folders" * (roots > 1)
    if found.val_mask is not None:
        text += f", {int(found.val_mask.sum()):,} of them for validation"
    if classes is not None:
        text += f", {counted(len(set(classes)), 'class')} ({_counts(Counter(classes))})"
        held_out = np.zeros(len(found), bool) if found.val_mask is None else found.val_mask
        trained = {name for name, held in zip(classes, held_out, strict=True) if not held}
        if untrained := sorted(set(classes) - trained):
            text += f", {len(untrained)} of them only in validation ({first_names(untrained)})"
    if found.left_out:
        parts = (
            f"{len(names):,} {reason} ({printable(names[0])}{', ...' * (len(names) > 1)})"
            for reason, names in found.left_out.items()
        )
        text += f"; left out: {', '.join(parts)}"
    return text + _describe_depth(found)


def _describe_depth(found: EncodedImages) -> str:
    """Return the part of the summary about AVIF and HEIC files of more than 8 bits, if one of at most nine is such."""
    files = [k for k, name in enumerate(found.names) if suffix_of(name) in HEIF_SUFFIXES | {".avif"}]
    for k in files[:: max(1, -(-len(files) // 9))]:
        with suppress(OSError), found.open(k) as stream:
            _, _, box = stream.read(4096).partition(b"pixi")  # version and flags, number of channels, bits of each
            if len(box) > 5 and box[5] > 8:
                return f"; AVIF and HEIC files of more than 8 bits are read as 8 bits ({printable(found.names[k])})"
    return ""


def suffix_of(name: str) -> str:
    """Return the suffix of a file name in lower case, such as ".tif" (also for a file named ".tif"), or ""."""
    end = name.rpartition("/")[2].lower().partition(".")[2].rpartition(".")[2]
    return f".{end}" if end else ""


def _counts(counter: Counter[str], limit: int = 10) -> str:
    parts = [f"{count:,} {name}" for name, count in counter.most_common(limit)]
    return ", ".join(parts) + (", ..." if len(counter) > limit else "")
