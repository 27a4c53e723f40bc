"""LSUN's databases of photographs as a source.

Torchvision's `LSUN` has the same arguments, but stores the keys in a file of the working directory that two databases
may share.
"""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from src.data.encoded import ImageBytes, Names
from src.data.fit import Fit, ImageSpec, height_and_width
from src.data.folder import refuse_val_root
from src.data.image_source import ImageSource, open_images
from src.errors import format_override, one_line, optional_package

_OPEN: dict[Path, tuple[int, Any]] = {}
"""The process that opened each database, and the database."""


def lsun(
    root: str | None,
    image_size: int | Sequence[int],
    channels: int,
    prepare: bool = False,
    *,
    classes: Sequence[str] = ("bedroom_train",),
    fit: Fit = "crop",
    background: str = "white",
    value_range: Sequence[float] | None = None,
    skip_unreadable: bool | float = False,
    cache: bool = True,
    cache_dir: str | None = None,
    val_root: str | None = None,
) -> ImageSource:
    """Open the databases `<root>/<name>_lmdb` of the names in `classes`, such as `bedroom_train`.

    Several databases are classes. The other arguments are those of `src.data.folder.folder`. Raises FileNotFoundError
    if a database does not exist, and ValueError if the package lmdb is missing, a database cannot be read, occurs twice
    or has test images, or as `folder` does.
    """
    refuse_val_root(val_root, "leave it out, or set data.val_fraction")
    names = [classes] if isinstance(classes, str) else list(classes)
    paths = _find_databases(root, names)
    keys, sizes, counts = _list_images(paths)
    which = np.repeat(np.arange(len(paths)), counts)
    stated = [(str(path), (path / "data.mdb").stat().st_mtime_ns) for path in paths]
    listed = Names(f"{names[k]}/{key}.webp" for k, key in zip(which, keys, strict=True))
    found = ImageBytes(
        place=f"under {root}",
        key=repr(stated),
        names=listed,
        sample_ids=listed,
        sizes=np.array(sizes, np.int64),
        read=partial(_read, paths, which, Names(keys)),
    )
    labels = [names[k].removesuffix("_train").removesuffix("_val") for k in which] if len(names) > 1 else None
    spec = ImageSpec(height_and_width(image_size), channels, fit, background)
    return open_images(found, spec, labels, None, value_range, skip_unreadable, cache, cache_dir)


def _find_databases(root: str | None, names: Sequence[str]) -> list[Path]:
    """Return the folder of each database. Raises FileNotFoundError and ValueError as `lsun`."""
    setting = format_override("data.source.classes", names)
    if not names or any(name.endswith("_test") for name in names):
        raise ValueError(f"{setting} must name databases that are not for testing, such as [bedroom_train]")
    paths = [Path(root or ".") / f"{name}_lmdb" for name in names]
    for k, path in enumerate(paths):
        if root is None or not (path / "data.mdb").is_file():
            raise FileNotFoundError(
                f"{format_override('data.root', root)} has no {path.name}/data.mdb; download and unzip it there, or "
                f"change {setting}"
            )
        if same := next((each for each in paths[:k] if (path / "data.mdb").samefile(each / "data.mdb")), None):
            raise ValueError(
                f"{setting} names one database twice, as {same.name} and {path.name}, so validation would repeat "
                "training images; leave one out"
            )
    return [path.resolve() for path in paths]  # a process can open a database once, by one name


def _list_images(paths: Sequence[Path]) -> tuple[list[str], list[int], list[int]]:
    """Return key and size in bytes of each image, and the number of images of each database."""
    keys: list[str] = []
    sizes: list[int] = []
    counts = []
    for path in paths:
        before = len(keys)
        with _environment(path).begin(buffers=True) as transaction:
            for key, value in transaction.cursor():
                keys.append(bytes(key).decode("utf-8", "surrogateescape"))
                sizes.append(len(value))
        counts.append(len(keys) - before)
    return keys, sizes, counts


def _read(paths: Sequence[Path], which: npt.NDArray[np.int64], keys: Names, row: int) -> bytes:
    with _environment(paths[int(which[row])]).begin() as transaction:
        value: bytes | None = transaction.get(keys[row].encode("utf-8", "surrogateescape"))
    if value is None:
        raise ValueError("the database has no such image")
    return value


def _environment(path: Path) -> Any:
    """Open a database once per process: a forked process must not use that of its parent, and closes it."""
    process, environment = _OPEN.get(path, (0, None))
    if process == os.getpid():
        return environment
    with optional_package("data=lsun", "lmdb"):
        import lmdb
    if environment is not None:
        environment.close()  # else the library refuses to open it again
    try:
        environment = lmdb.open(str(path), readonly=True, lock=False, readahead=False, meminit=False)
    except lmdb.Error as error:
        raise ValueError(
            f"{path} cannot be opened as an LMDB database ({one_line(error)}); download it again, or close it if this "
            "process has opened it elsewhere"
        ) from error
    _OPEN[path] = os.getpid(), environment
    return environment
