"""Find the files of arrays: one file with all samples, or one file per sample, with the classes of the samples."""

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from src.data.array_files import is_array, open_numpy
from src.data.decode import ARRAY_SUFFIXES
from src.data.found_images import FoundImages, join, without_linked
from src.data.label_table import find_tables, read_classes
from src.data.layout import SPLITS
from src.data.overlap import check_overlap
from src.data.scan import find_in
from src.data.table_files import FILE_COLUMNS, read_table
from src.errors import first_names, format_override

LABEL_NAMES = {"label", "labels", "target", "targets"}
"""Words in the names of files that hold the classes of the samples beside them, such as train_labels.npy."""


def names_labels(name: str) -> bool:
    """Return whether a file, by its path below a root, seems to hold the classes of samples beside it."""
    return "/" not in name and not LABEL_NAMES.isdisjoint(re.split(r"[\W_]", PurePosixPath(name).stem.lower()))


def labels_beside(path: Path) -> list[str]:
    """Return the names of arrays that seem to be labels, in the folder of a file of all samples."""
    names = (each.name for each in path.parent.iterdir() if each != path)
    return sorted(name for name in names if is_array(name) and names_labels(name))


def one_file(root: Any, labels: str | None) -> Path | None:
    """Return the file with all samples: `root`, or its only file without labels; None for one file per sample.

    Folders that hold only one folder are passed through.
    """
    if not isinstance(root, str | Path):
        return None
    path = Path(root)
    while path.is_dir():
        used = None if labels is None else os.path.abspath(path / labels)
        shown = [each for each in path.iterdir() if not each.name.startswith(".")]
        files = [each for each in shown if os.path.abspath(each) != used and (each.is_dir() or is_array(each.name))]
        samples = [each for each in files if each.is_dir() or not names_labels(each.name)]
        if len(samples or files) != 1:
            return None
        (path,) = samples or files
    return path if path.is_file() and path.suffix.lower() in ARRAY_SUFFIXES else None


def find_arrays(root: Any, val_root: str | None = None, labels: str | None = None, masks: bool = False) -> FoundImages:
    """Return the files of single samples under one or several roots; those of `val_root` are for validation only.

    Files of `labels`, or files at the top whose names say that they hold labels, are not samples, nor are masks of
    other files unless `masks` is true. Raises FileNotFoundError for a missing folder, and ValueError without arrays,
    for roots with the same files, and if one file has all samples of a split.
    """
    roots = [root] if root is None or isinstance(root, str | Path) else list(root)
    check_overlap([None if each is None else str(each) for each in roots], val_root)
    parts = [_find_in(each, "data.root", masks, val_root) for each in roots or [None]]
    found = join(parts, None if val_root is None else _find_in(val_root, "data.val_root", masks))
    if labels is not None:
        label_files = [Path(os.path.relpath(each / labels, each)).as_posix() for each in found.roots]
        samples = [name != label_files[k] for k, name in zip(found.which, found.names, strict=True)]
        found = found.keep(samples, "with labels").without_used([each / labels for each in found.roots])
    elif any(samples := [not names_labels(name) for name in found.names]):
        found = found.keep(samples, "with labels, for data.source.labels")
    found = without_linked(found)
    _check_one_sample_per_file(found)
    return found


def _find_in(root: Any, name: str, masks: bool, val_root: str | None = None) -> FoundImages:
    fix = f"set {name} to a .npy or .npz file, or to a folder, zip or tar file of .npy, .wav or .nii.gz files"
    return find_in(root, name, fix, val_root, is_array, "array", masks)


def _check_one_sample_per_file(found: FoundImages) -> None:
    """Raise ValueError if a split seems to be one file: train.npy and test.npy, or only one training file."""
    files = [PurePosixPath(name) for name in found.names]
    if any(file.suffix.lower() not in ARRAY_SUFFIXES for file in files):
        return
    splits = [SPLITS.get(file.stem.lower().rpartition("_")[2]) for file in files]
    held_out = np.zeros(len(files), bool) if found.val_mask is None else found.val_mask
    if "train" in splits and len(set(splits)) > 1 and None not in splits:
        train = splits.index("train")
    elif held_out.sum() == len(files) - 1:
        train = int(np.flatnonzero(~held_out)[0])
    else:
        return
    raise ValueError(
        f"{format_override('data.root', str(found.root))} must have one file per sample, but one file seems to hold a "
        f"whole split ({first_names(found.names, 3)}); set {format_override('data.root', str(found.path(train)))} for "
        "a file with all training samples"
    )


# Labels


def read_labels(path: Path, count: int, key: str | None = None) -> list[str]:
    """Return the class of each of `count` samples, from the array `key` of an .npz file, a .npy file, or a table.

    Raises ValueError for another number of labels, or empty ones.
    """
    if path.suffix.lower() in ARRAY_SUFFIXES:
        array = open_numpy(path, key, "data.source.labels", kinds="buifU")
        array = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
        if array.ndim != 1 or array.dtype.kind not in "buiU":
            fix = "save argmax(axis=1) of one-hot codes" if array.ndim == 2 else "save integers (N,)"
            raise ValueError(f"data.source.labels={path} has shape {array.shape} of {array.dtype}; {fix}")
        names = [str(value) if array.dtype.kind == "U" else str(int(value)) for value in array]
    else:
        table = read_table(path, "data.source.labels")
        names = table.column(table.one_of(("label",), "data.source.labels"))
    if len(names) != count:
        raise ValueError(f"data.source.labels={path} has {len(names)} labels for {count} samples; give one each")
    if "" in names:
        raise ValueError(f"data.source.labels={path} has no label for sample {names.index('')}; fill it in")
    return names


def labels_of_files(labels: str, found: FoundImages) -> list[str]:
    """Return the class of each file, from the table or the .npy file `labels`, or from that of each root."""
    tables = find_tables(labels, found)
    if Path(labels).suffix.lower() != ".npy":
        return read_classes(tables, found, FILE_COLUMNS, ("label",))
    if len(tables) == 1:
        return read_labels(next(iter(tables)), len(found))
    counts = np.bincount(found.which, minlength=len(found.roots)).tolist()  # files are in the order of their roots
    return [name for root, count in zip(found.roots, counts, strict=True) for name in read_labels(root / labels, count)]
