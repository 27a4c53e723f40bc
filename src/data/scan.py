"""Find the image files under a folder or in an archive."""

import os
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from src.data.archives import is_archive, member_sizes, replaced_members
from src.data.decode import ARRAY_SUFFIXES, foreign_format, image_suffixes, looks_like_image
from src.data.encoded import Names
from src.data.found_images import FoundImages, suffix_of
from src.data.layout import SPLITS, split_of, splits_of, words_of
from src.data.masks import Masks, find_degraded, find_masks, warn_of_masks
from src.data.overlap import lies_in
from src.errors import absence, first_names, format_override

SIDECARS = {
    *(".csv", ".db", ".htm", ".html", ".ini", ".json", ".jsonl", ".log", ".md", ".parquet", ".pdf", ".py", ".rst"),
    *(".svg", ".toml", ".tsv", ".txt", ".url", ".xls", ".xlsx", ".xml", ".yaml", ".yml"),
    *(".7z", ".gz", ".rar", ".tar", ".zip"),
}
"""Suffixes of files that are never images."""
CONTAINERS = {".h5", ".hdf5", ".mat", ".pkl", ".pt", ".pth", ".safetensors", ".zarr"}
"""Suffixes of files that other programs keep arrays in."""


HIDDEN = (".", "__MACOSX", "@eaDir", "$RECYCLE.BIN")
"""First characters of hidden files and folders, and folders that macOS, Synology and Windows add."""


class _File(NamedTuple):
    name: str
    size: int
    time: int


def find_images(
    root: Path,
    accepts: Callable[[str], bool] | None = None,
    noun: str = "image",
    val_root: Path | None = None,
    masks: bool = False,
) -> FoundImages:
    """Return every image under a folder, or in a zip or tar file, except hidden files and files in `val_root`.

    `accepts` chooses other files than images by their names; messages call them `noun`. Masks and degraded versions of
    images are left out unless `masks` is true.

    Links to folders are followed. If the top, or the only folder there, has a folder for training (`SPLITS`), alone or
    beside one of another split, only it and the one for validation are used. Raises FileNotFoundError without the
    folder, and ValueError without images.
    """
    left_out: dict[str, list[str]] = {}
    files = _list_files(root, left_out)
    if accepts is None:
        accepts = _image_test(root)
    in_val_root = lies_in(root, val_root) if val_root is not None and root.is_dir() else None
    used: list[_File] = []
    for file in sorted(files):
        if reason := _reason_to_leave_out(file.name, accepts, in_val_root):
            left_out.setdefault(reason, []).append(file.name)
        elif reason is None:
            used.append(file)
    doubtful: list[Masks] = []
    if not masks:
        of_images, doubtful = find_masks(root, [file.name for file in used])
        used = _without(of_images, "masks beside images", used, left_out)
        degraded = find_degraded(root, [file.name for file in used])
        used = _without(degraded, "degraded versions of images", used, left_out)
    if root.is_dir():
        left_out = {
            _named(root / names[0], reason) if reason.startswith(("of type", "without ending")) else reason: names
            for reason, names in left_out.items()
        }
    used, splits = _without_test_images(used, left_out)
    warn_of_masks(root, doubtful, {file.name for file in used} if doubtful else ())
    _warn_of_held_out(root, [file.name for file in used], splits)
    if not used:
        raise ValueError(_describe_absence(root, noun, left_out))
    sizes, times = (np.array([file[k] for file in used], np.int64) for k in (1, 2))
    return FoundImages(
        (root,),
        np.zeros(len(used), np.int64),
        Names(file.name for file in used),
        sizes,
        times,
        np.array([split == "validation" for split in splits]) if "validation" in splits else None,
        left_out,
    )


def _describe_absence(root: Path, noun: str, left_out: dict[str, list[str]]) -> str:
    """Return the message for a folder or archive without images, with the reasons and a fix."""
    others = ", ".join(f"{len(names)} {reason}" for reason, names in left_out.items())
    examples = ".png, .jpg or .npy" if noun == "image" else ".npy, .wav or .nii.gz"
    kept = {suffix_of(name) for names in left_out.values() for name in names} | {suffix_of(root.name)}
    fix = "; save the arrays in it by numpy.save" if kept & CONTAINERS else ""
    if noun == "image" and ".tar" in kept and root.is_dir():
        fix = f"; for shards type data=webdataset {format_override('data.urls', str(root / '*.tar'))}"
    return f"{root} has no {noun}s, such as {examples} files" + (f" ({others})" if others else "") + fix


def _list_files(root: Path, left_out: dict[str, list[str]]) -> list[_File]:
    """Return the files under a folder or in an archive. Raises as `find_images` does."""
    if root.is_dir():
        return list(_walk(root, left_out))
    if is_archive(root):
        time, sizes = root.stat().st_mtime_ns, member_sizes(root)
        if replaced := replaced_members(root):
            left_out["replaced by later files of the same names in the archive"] = list(replaced)
        return [_File(name, size, time) for name, size in sizes.items()]
    if root.suffix.lower() in (".zip", ".tar", ".tgz", ".gz"):
        reason = _named(root, "damaged or incomplete")
        raise ValueError(f"{root} is {reason}: it cannot be read as an archive")
    raise FileNotFoundError(f"{root} is neither a folder nor a zip or tar file")


def find_in(
    root: Any,
    name: str,
    fix: str,
    val_root: str | None = None,
    accepts: Callable[[str], bool] | None = None,
    noun: str = "image",
    masks: bool = False,
) -> FoundImages:
    """Return the files that `find_images` finds under the root in the setting `name`; errors name it and the fix."""
    path = Path(root or "")
    setting = format_override(name, str(path.resolve()) if root else root)
    if not root or not (path.is_file() or path.is_dir()):
        raise FileNotFoundError(f"{setting} {absence(path) if root else 'names no folder'}; {fix}")
    if accepts is None and path.is_file() and path.suffix.lower() in ARRAY_SUFFIXES:
        raise ValueError(f"{setting} is a file of arrays; type data=array {setting}")
    try:
        return find_images(path, accepts, noun, None if val_root is None else Path(val_root), masks)
    except PermissionError as error:
        raise ValueError(f"{setting}: {error.filename} may not be read; change its permissions, or {fix}") from error
    except (FileNotFoundError, ValueError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{setting}: {error}; {fix}") from error


def _image_test(root: Path) -> Callable[[str], bool]:
    """Return a function that tells whether a file is an image, by its ending or, in a folder, by its contents."""
    known = image_suffixes()

    def is_image(name: str) -> bool:
        suffix = suffix_of(name)
        return suffix in known or (suffix not in SIDECARS and root.is_dir() and looks_like_image(root / name))

    return is_image


def _reason_to_leave_out(
    name: str, accepts: Callable[[str], bool], in_val_root: Callable[[str], bool] | None
) -> str | None:
    """Return why a file is left out, or None if it is used; empty for hidden files that are not worth a line."""
    if any(part.startswith(HIDDEN) for part in name.split("/")):
        is_copy = PurePosixPath(name).name.startswith("._")  # macOS stores attributes of the file there
        return "hidden" if suffix_of(name) in image_suffixes() and not is_copy else ""
    if not accepts(name):
        return f"of type {suffix_of(name)}" if suffix_of(name) else "without ending"
    return "used for validation" if in_val_root is not None and in_val_root(name) else None


def _named(file: Path, reason: str) -> str:
    """Return why a file is not used, with its format if it is one that is not decoded."""
    with suppress(OSError), file.open("rb") as stream:
        if known := foreign_format(stream):
            return f"{reason}, {known[0]}: {known[1]}"
    return reason


def _without(names: set[str], what: str, files: list[_File], left_out: dict[str, list[str]]) -> list[_File]:
    if names:
        left_out[f"{what}, for data.source.masks=true"] = sorted(names)
    return [file for file in files if file.name not in names]


def _without_test_images(
    files: list[_File], left_out: dict[str, list[str]]
) -> tuple[list[_File], Sequence[str | None]]:
    """Return the files for training and validation, and their splits; without folders of splits all files."""
    splits = splits_of([file.name for file in files])
    if splits is None:
        return files, [None] * len(files)
    for file, split in zip(files, splits, strict=True):
        if split in ("test", None):
            left_out.setdefault("for testing" if split else "outside of the splits", []).append(file.name)
    used = [(file, split) for file, split in zip(files, splits, strict=True) if split in ("train", "validation")]
    return [file for file, _ in used], [split for _, split in used]


def _warn_of_held_out(root: Path, names: Sequence[str], splits: Sequence[str | None]) -> None:
    """Warn if images for training have names, or are in folders with names, that say validation or test."""
    trained = [name for name, split in zip(names, splits, strict=True) if split != "validation"]
    folders = dict.fromkeys(name.rpartition("/")[0] for name in trained)
    held_out = [each for each in folders if any(split_of(part) in ("validation", "test") for part in each.split("/"))]
    if not held_out and not any(splits):  # VOCtest_2007 beside VOCtrainval_2012, or test_1.png beside train_1.png
        said = list(takewhile(bool, ({SPLITS[w] for w in words_of(name) if w in SPLITS} for name in names)))
        if len(said) == len(names) and {"train"} in said:
            held_out = [name for name, each in zip(names, said, strict=True) if "train" not in each]
    if held_out:
        warnings.warn(
            f"{root}: {first_names(held_out, 3)} are used for training, since there are no folders of such splits "
            "beside them; set data.root to the folder with the images for training, and data.val_root to that of "
            "validation",
            stacklevel=2,
        )


def _walk(root: Path, left_out: dict[str, list[str]]) -> Iterator[_File]:
    """Yield the files under a folder. Links that lead to a parent folder, or nowhere, are left out."""
    top = os.stat(root)
    folders: list[tuple[str, str, tuple[tuple[int, int], ...]]] = [("", str(root), ((top.st_dev, top.st_ino),))]
    while folders:
        prefix, folder, parents = folders.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                name = prefix + entry.name
                try:
                    status = entry.stat()
                except OSError:
                    left_out.setdefault("linked to nothing", []).append(name)
                    continue
                place = (status.st_dev, status.st_ino)
                if stat.S_ISREG(status.st_mode):
                    yield _File(name, status.st_size, status.st_mtime_ns)
                elif not stat.S_ISDIR(status.st_mode):  # reading a pipe would wait forever
                    left_out.setdefault("neither file nor folder", []).append(name)
                elif entry.name.startswith("."):
                    continue
                elif place in parents:
                    left_out.setdefault("linked to a parent folder", []).append(name)
                else:
                    folders.append((f"{name}/", entry.path, (*parents, place)))
