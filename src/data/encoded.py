"""Encoded images of any origin: what the cache of decoded pixels reads."""

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar, cast, overload

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
D = TypeVar("D")


class Names(Sequence[str]):
    """Strings in one block of memory, which processes that load data share instead of copying object by object."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self._text = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "list[str]": ...
    @overload
    def __getitem__(self, index: Mask) -> "Names": ...
    def __getitem__(self, index: int | slice | Mask) -> "str | list[str] | Names":
        if isinstance(index, np.ndarray):
            return Names(self[k] for k in np.flatnonzero(index).tolist())
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        k = range(len(self))[index]
        return self._text[self._ends[k] : self._ends[k + 1]].tobytes().decode("utf-8", "surrogateescape")

    @classmethod
    def of(cls, ends: npt.NDArray[np.int64], text: npt.NDArray[np.uint8]) -> "Names":
        """Return the names of `arrays`."""
        names = cls(())
        names._ends, names._text = ends, text
        return names

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return what `of` takes, to be stored."""
        return {"ends": self._ends, "text": self._text}

    def digest(self) -> bytes:
        return sha256(self._ends.tobytes() + self._text.tobytes()).digest()


class EncodedImages(Protocol):
    """The images of a dataset as files or bytes.

    `names` identify them in messages, with the suffix of the format if it is known. `sizes` (N,) are bytes. `val_mask`
    (N,) marks validation images, or is None without such a split. `left_out` has the names of other images by reason.
    """

    @property
    def names(self) -> Sequence[str]: ...
    @property
    def sizes(self) -> npt.NDArray[np.int64]: ...
    @property
    def val_mask(self) -> Mask | None: ...
    @property
    def left_out(self) -> dict[str, list[str]]: ...
    @property
    def place(self) -> str:
        """Where the images are, for messages: "under photos", "of user/dataset"."""
        ...

    def __len__(self) -> int: ...

    def open(self, index: int) -> BinaryIO:
        """Open an image. Raises OSError."""
        ...

    def path(self, index: int) -> Path | str:
        """Return the path or name of an image, for messages."""
        ...

    def identity(self) -> str:
        """Return a text that changes whenever the contents or the order of the images may have changed."""
        ...

    def ids(self) -> Sequence[str]:
        """Return the id of each sample, on which the split depends."""
        ...

    def keep(self, chosen: Sequence[bool] | Mask, reason: str) -> "EncodedImages":
        """Return the chosen images; the others are left out for `reason`."""
        ...


def keep_rows(found: D, chosen: Sequence[bool] | Mask, reason: str) -> D:
    """Return a dataclass with the chosen rows of all its arrays and `Names`; the other images are left out."""
    mask, images = np.asarray(chosen, bool), cast(Any, found)
    if mask.all():
        return found
    values = {field.name: getattr(images, field.name) for field in fields(images)}
    rows = {name: value[mask] for name, value in values.items() if isinstance(value, np.ndarray | Names)}
    left_out = {**images.left_out, reason: [*images.left_out.get(reason, []), *images.names[~mask]]}
    return cast(D, replace(images, **rows, left_out=left_out))


@dataclass(frozen=True)
class ImageBytes:
    """Images whose bytes `read` returns by their row in the dataset.

    `key` changes whenever the dataset does. The other fields are those of `EncodedImages`; `rows` (N,) are the rows of
    the images that were kept, or None for all.
    """

    place: str
    key: str
    names: Names
    sample_ids: Names
    sizes: npt.NDArray[np.int64]
    read: Callable[[int], bytes]
    val_mask: Mask | None = None
    left_out: dict[str, list[str]] = field(default_factory=dict)
    rows: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def open(self, index: int) -> BinaryIO:
        return io.BytesIO(self.read(index if self.rows is None else int(self.rows[index])))

    def path(self, index: int) -> str:
        return self.names[index]

    def identity(self) -> str:
        rows = b"" if self.rows is None else self.rows.tobytes()
        return sha256(self.key.encode() + self.names.digest() + self.sizes.tobytes() + rows).hexdigest()

    def ids(self) -> Sequence[str]:
        return self.sample_ids

    def repeats_training(self) -> bool:
        """Return whether the validation images equal those for training, by all sizes and the bytes of some."""
        if self.val_mask is None:
            return False
        train, val = np.flatnonzero(~self.val_mask), np.flatnonzero(self.val_mask)
        if not np.array_equal(self.sizes[train], self.sizes[val]):
            return False
        some = np.flatnonzero(self.sizes[train])[:9]  # the others have no image
        pairs = zip(train[some].tolist(), val[some].tolist(), strict=True)
        return len(some) > 0 and all(self.open(k).read() == self.open(j).read() for k, j in pairs)

    def keep(self, chosen: Sequence[bool] | Mask, reason: str) -> "ImageBytes":
        rows = np.arange(len(self)) if self.rows is None else self.rows
        return self if all(chosen) else keep_rows(replace(self, rows=rows), chosen, reason)
