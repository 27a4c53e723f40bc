"""Find the image files under a folder or in an archive."""

import os
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from src.data.archives import is_archive, member_sizes, replaced_members
from src.data.decode import ARRAY_SUFFIXES, image_suffixes, looks_like_image
from src.data.encoded import Names
from src.data.found_images import FoundImages, suffix_of
from src.data.layout import split_of, splits_of
from src.data.masks import find_masks, warn_of_masks
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

    `accepts` chooses other files than images by their names; messages call them `noun`. Masks of images are left out
    unless `masks` is true.

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
    of_images, doubtful = (set(), []) if masks else find_masks(root, [file.name for file in used])
    if of_images:
        left_out["masks beside images, for data.source.masks=true"] = sorted(of_images)
        used = [file for file in used if file.name not in of_images]
    used, splits = _without_test_images(used, left_out)
    warn_of_masks(root, doubtful, {file.name for file in used} if doubtful else ())
    _warn_of_held_out(root, [file.name for file, split in zip(used, splits, strict=True) if split != "validation"])
    if not used:
        others = ", ".join(f"{len(names)} {reason}" for reason, names in left_out.items())
        examples = ".png, .jpg or .npy" if noun == "image" else ".npy, .wav or .nii.gz"
        kept = {suffix_of(name) for names in left_out.values() for name in names} | {suffix_of(root.name)}
        fix = "; save the arrays in it by numpy.save" if kept & CONTAINERS else ""
        if noun == "image" and ".tar" in kept and root.is_dir():
            fix = f"; for shards type data=webdataset {format_override('data.urls', str(root / '*.tar'))}"
        raise ValueError(f"{root} has no {noun}s, such as {examples} files" + (f" ({others})" if others else "") + fix)
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
        raise ValueError(f"{root} is damaged or incomplete: it cannot be read as an archive")
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
    setting = format_override(name, str(path.absolute()) if root else root)
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


def _without_test_images(
    files: list[_File], left_out: dict[str, list[str]]
) -> tuple[list[_File], Sequence[str | None]]:
    """Return the files for training and validation, and their splits; without folders of splits all files."""
    splits = splits_of([file.name for file in files])
    if splits is None:
        return files, [None] * len(files)
    used = []
    for file, split in zip(files, splits, strict=True):
        if split in ("train", "validation"):
            used.append((file, split))
        else:
            reason = "for testing" if split == "test" else "outside of the splits"
            left_out.setdefault(reason, []).append(file.name)
    return [file for file, _ in used], [split for _, split in used]


def _warn_of_held_out(root: Path, names: Sequence[str]) -> None:
    """Warn if images for training are in folders whose names say validation or test."""
    folders = dict.fromkeys(name.rpartition("/")[0] for name in names)
    held_out = [each for each in folders if any(split_of(part) in ("validation", "test") for part in each.split("/"))]
    if held_out:
        warnings.warn(
            f"{root}: the images in {first_names(held_out, 3)} are used for training, since other folders have no such "
            "splits; set data.root to the folder with those of training, and data.val_root to that of validation",
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
