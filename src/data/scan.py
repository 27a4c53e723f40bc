"""Find the images under a folder or in an archive, their splits and classes, and what is left out."""

import io
import os
import re
import tarfile
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from src.data.decode import image_suffixes, looks_like_image
from src.data.encoded import EncodedImages, Names
from src.data.layout import SPLITS, Depth, class_levels, outer_folders
from src.data.overlap import lies_in
from src.errors import first_names

SIDECARS = {
    *(".csv", ".db", ".htm", ".html", ".ini", ".json", ".jsonl", ".log", ".md", ".parquet", ".pdf", ".py", ".rst"),
    *(".svg", ".toml", ".tsv", ".txt", ".url", ".xls", ".xlsx", ".xml", ".yaml", ".yml"),
    *(".7z", ".gz", ".rar", ".tar", ".zip"),
}
"""Suffixes of files that are never images."""

MAX_STRAYS = 0.05
"""Largest share of files outside of all class folders that does not remove the classes."""


@dataclass(frozen=True)
class FoundImages:
    """The images of a dataset, in order of their names.

    `names` are paths with slashes relative to one of `roots`, the one with number `which` (N,). `sizes` (N,) are bytes,
    `times` (N,) nanoseconds of the last change, `val_mask` (N,) whether the folder is one of validation images, or None
    without such folders. `left_out` has the names of other files by reason.
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
        """Return the paths of an image in tables."""
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
        return Names(unicodedata.normalize("NFC", f"{prefixes[k]}{name}") for k, name in named)

    def keep(self, chosen: Sequence[bool] | npt.NDArray[np.bool_], reason: str) -> "FoundImages":
        """Return the chosen images; the others are left out for `reason`."""
        mask = np.asarray(chosen, bool)
        out = [self.names[int(k)] for k in np.flatnonzero(~mask)]
        if not out:
            return self
        return replace(
            self,
            which=self.which[mask],
            names=Names(self.names[int(k)] for k in np.flatnonzero(mask)),
            sizes=self.sizes[mask],
            times=self.times[mask],
            val_mask=None if self.val_mask is None else self.val_mask[mask],
            left_out={**self.left_out, reason: [*self.left_out.get(reason, []), *out]},
        )

    def without_used(self, names: Sequence[str]) -> "FoundImages":
        """Return the images without files among those left out that were read after all, such as captions."""
        used = {os.path.abspath(self.root / name) for name in names}
        left = {
            reason: [name for name in out if os.path.abspath(self.root / name) not in used]
            for reason, out in self.left_out.items()
        }
        return replace(self, left_out={reason: out for reason, out in left.items() if out})


class _File(NamedTuple):
    name: str
    size: int
    time: int


def find_images(
    root: Path, accepts: Callable[[str], bool] | None = None, noun: str = "image", val_root: Path | None = None
) -> FoundImages:
    """Return every image under a folder, or in a zip or tar file, except hidden files.

    `accepts` chooses other files by their names, which are called `noun` in messages. Those in `val_root` are left out.

    Links to folders are followed. If the top, or the only folder there, has a folder for training (`SPLITS`), alone or
    beside one of another split, only it and the one for validation are used. Raises FileNotFoundError without the
    folder, and ValueError without images.
    """
    left_out: dict[str, list[str]] = {}
    if root.is_dir():
        files = list(_walk(root, left_out))
    elif root.is_file() and (zipfile.is_zipfile(root) or tarfile.is_tarfile(root)):
        files = list(_members(root))
    else:
        raise FileNotFoundError(f"{root} is neither a folder nor a zip or tar file")
    known = image_suffixes()

    def is_image(name: str, suffix: str) -> bool:
        return suffix in known or (suffix not in SIDECARS and root.is_dir() and looks_like_image(root / name))

    for_validation = lies_in(root, val_root) if val_root is not None and root.is_dir() else None
    kept = []
    for file in sorted(files):
        suffix = PurePosixPath(file.name).suffix.lower()
        if any(part.startswith((".", "__MACOSX")) for part in file.name.split("/")):
            if suffix in known and not PurePosixPath(file.name).name.startswith("._"):
                left_out.setdefault("hidden", []).append(file.name)
        elif accepts(file.name) if accepts else is_image(file.name, suffix):
            if for_validation is not None and for_validation(file.name):
                left_out.setdefault("used for validation", []).append(file.name)
            else:
                kept.append(file)
        else:
            left_out.setdefault(f"{suffix or 'no ending'}: not an {noun}", []).append(file.name)
    level = outer_folders(file.name for file in kept) if kept else 0
    tops = {"".join(file.name.split("/")[level:-1][:1]) for file in kept} - {""}
    split_of = {top: SPLITS.get(top.lower(), "outside of the splits") for top in tops}
    kinds = set(split_of.values())
    val_mask = None
    # Beside other folders and without another split, "train" is the name of a class, like "bus".
    if "train" in kinds and (kinds == {"train"} or kinds & {"validation", "test"}):
        splits = [split_of.get(file.name.split("/")[level], "outside of the splits") for file in kept]
        for file, split in zip(kept, splits, strict=True):
            if split not in ("train", "validation"):
                reason = "test images" if split == "test" else split
                left_out.setdefault(reason, []).append(file.name)
        used = [(file, split) for file, split in zip(kept, splits, strict=True) if split in ("train", "validation")]
        kept = [file for file, _ in used]
        if any(split == "validation" for _, split in used):
            val_mask = np.array([split == "validation" for _, split in used])
    if not kept:
        others = ", ".join(f"{len(names)} {reason}" for reason, names in left_out.items())
        examples = ".npy, .wav or .nii.gz" if accepts else ".png, .jpg or .npy"
        raise ValueError(f"{root} has no {noun}s, such as {examples} files" + (f" ({others})" if others else ""))
    sizes, times = (np.array([file[k] for file in kept], np.int64) for k in (1, 2))
    which = np.zeros(len(kept), np.int64)
    return FoundImages((root,), which, Names(file.name for file in kept), sizes, times, val_mask, left_out)


def join(parts: Sequence[FoundImages], val: FoundImages | None) -> FoundImages:
    """Return the images of several roots as one dataset; those of `val` are the validation set."""
    several = [*parts, *([] if val is None else [val])]
    if len(several) == 1:
        return several[0]
    masks = [np.zeros(len(part), bool) if part.val_mask is None else part.val_mask for part in parts]
    given = val is not None or any(part.val_mask is not None for part in parts)
    left_out: dict[str, list[str]] = {}
    for part in several:
        for reason, names in part.left_out.items():
            left_out[reason] = [*left_out.get(reason, []), *names]
    return FoundImages(
        tuple(part.root for part in several),
        np.repeat(np.arange(len(several)), [len(part) for part in several]),
        Names(name for part in several for name in part.names),
        np.concatenate([part.sizes for part in several]),
        np.concatenate([part.times for part in several]),
        np.concatenate([*masks, *([] if val is None else [np.ones(len(val), bool)])]) if given else None,
        left_out,
    )


def open_member(root: Path, name: str) -> BinaryIO:
    """Open a file under a folder or in a zip or tar file. Raises OSError."""
    if root.is_dir():
        return (root / name).open("rb")
    try:
        if (places := _tar_index(root)) is not None:
            return io.BytesIO(read_at(root, *places[name]))
        archive = _open_archive(root, os.getpid())
        if isinstance(archive, zipfile.ZipFile):
            return io.BytesIO(archive.read(name))
        member = archive.extractfile(_tar_members(root, os.getpid())[name])
        if member is None:
            raise OSError(f"{name} is not a file")
        return io.BytesIO(member.read())
    except (KeyError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise OSError(f"{name} cannot be read from {root} ({error})") from error


def read_at(path: Path, offset: int, size: int) -> bytes:
    """Return a part of a file. Raises OSError if the file ends before it."""
    with path.open("rb") as file:
        file.seek(offset)
        contents = file.read(size)
    if len(contents) < size:
        raise OSError(f"{path} is truncated")
    return contents


def tar_places(path: Path) -> dict[str, tuple[int, int]] | None:
    """Return (offset, size) in bytes of each file in a tar file, in their order; None for other and compressed files.

    Raises ValueError if the file is cut off.
    """
    try:
        archive = tarfile.open(path, "r:")  # noqa: SIM115 - closed below
    except tarfile.TarError:
        return None
    places, end = {}, 0
    with archive:
        try:
            for member in archive:
                if member.isreg() and not member.issparse():
                    places[member.name.removeprefix("./")] = (member.offset_data, member.size)
                end = archive.offset
        except tarfile.TarError as error:
            raise ValueError(f"{path} is cut off or damaged ({error})") from error
    with path.open("rb") as file:  # tarfile accepts a file that ends after a member or in a header
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(f"{path} is cut off: it does not have the mark at the end of a tar file")
    return places


def _tar_index(path: Path) -> dict[str, tuple[int, int]] | None:
    """Return `tar_places` of an archive, read once per process."""
    status = path.stat()
    return _tar_index_of(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=8)
def _tar_index_of(path: Path, size: int, time: int) -> dict[str, tuple[int, int]] | None:
    return None if zipfile.is_zipfile(path) else tar_places(path)


@lru_cache(maxsize=8)
def _tar_members(path: Path, process: int) -> dict[str, tarfile.TarInfo]:
    archive = _open_archive(path, process)
    assert isinstance(archive, tarfile.TarFile)
    return {member.name.removeprefix("./"): member for member in archive.getmembers()}


@lru_cache(maxsize=8)
def _open_archive(path: Path, process: int) -> zipfile.ZipFile | tarfile.TarFile:
    """Open an archive once per process: processes must not share the position in a file."""
    return zipfile.ZipFile(path) if zipfile.is_zipfile(path) else tarfile.open(path)


def _members(path: Path) -> Iterator[_File]:
    time = path.stat().st_mtime_ns
    if (places := _tar_index(path)) is not None:
        for name, (_, size) in places.items():
            yield _File(name, size, time)
        return
    try:
        archive = _open_archive(path, os.getpid())
        if isinstance(archive, zipfile.ZipFile):
            files = [_File(info.filename, info.file_size, time) for info in archive.infolist() if not info.is_dir()]
        else:
            members = _tar_members(path, os.getpid())
            files = [_File(name, member.size, time) for name, member in members.items() if member.isfile()]
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is cut off or damaged ({error})") from error
    yield from files


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
                    if not entry.is_dir():
                        status = entry.stat()
                        yield _File(name, status.st_size, status.st_mtime_ns)
                    elif not entry.name.startswith("."):
                        status = entry.stat()
                        place = (status.st_dev, status.st_ino)
                        if place in parents:
                            left_out.setdefault("links to a parent folder", []).append(name)
                        else:
                            folders.append((f"{name}/", entry.path, (*parents, place)))
                except OSError:
                    left_out.setdefault("broken links", []).append(name)


def class_folders(found: FoundImages, depth: Depth = 1) -> tuple[FoundImages, list[str] | None]:
    """Return images and their classes: the folder at the top, below a folder of a split; None unless two or more.

    A class consists of the names of up to `depth` folders, such as "animals/cat". A few files outside of all class
    folders (`MAX_STRAYS`) are left out. Raises ValueError for an invalid depth.
    """
    if depth != "all" and (isinstance(depth, str) or depth < 1):
        raise ValueError(f"data.source.class_depth={depth} must be a number of folders, at least 1, or all")
    paths = list(map("/".join, class_paths(found, depth)))
    inside = [path != "" for path in paths]
    if len({path for path in paths if path}) < 2 or inside.count(False) > MAX_STRAYS * len(paths):
        return found, None
    return found.keep(inside, "outside of the class folders"), [path for path in paths if path]


def class_paths(found: FoundImages, depth: Depth, whole: bool = False) -> list[list[str]]:
    """Return the first `depth` folders of each image, or all if `whole`, that are not of a split or around all."""
    names: list[list[str]] = [[] for _ in found.roots]
    for k, name in zip(found.which, found.names, strict=True):
        names[k].append(name)
    levels, end = class_levels(names, depth), None if depth == "all" or whole else depth
    return [name.split("/")[levels[k] : -1][:end] for k, name in zip(found.which, found.names, strict=True)]


def describe_depth(found: FoundImages, depth: Depth) -> str:
    """Return the part of the summary about folders within those at the top, which are not classes."""
    nested = {tuple(path) for path in class_paths(found, depth, whole=True) if path}
    tops = {path[0] for path in nested}
    text = f"; {len(nested)} subfolders in {len(tops)} folders at the top are not classes (data.source.class_depth)"
    return text if depth == 1 and len(nested) > max(1, len(tops)) else ""


def compile_pattern(setting: str, pattern: str, example: str) -> re.Pattern[str]:
    """Return a regular expression with one group. Raises ValueError, with an `example`, for any other pattern."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{setting}={pattern!r} is not a regular expression ({error}); correct it") from error
    if compiled.groups != 1:
        raise ValueError(f"{setting}={pattern!r} needs one group in parentheses, such as {example}")
    return compiled


def class_by_pattern(found: FoundImages, pattern: str) -> list[str]:
    """Return the class of each image: what the group of a regular expression matches in its name.

    Raises ValueError for an invalid pattern, one without a group, and names that it does not match.
    """
    compiled = compile_pattern("data.source.class_pattern", pattern, "'(cat|dog)_'")
    matches = [compiled.search(name) for name in found.names]
    missing = [name for name, match in zip(found.names, matches, strict=True) if match is None or match[1] is None]
    if missing:
        raise ValueError(
            f"data.source.class_pattern={pattern!r} does not match {len(missing)} of {len(found)} names, such as "
            f"{missing[0]}; change the pattern, or move these files away"
        )
    return [match[1] for match in matches if match is not None]


def describe(found: EncodedImages, classes: Sequence[str] | None, nouns: str = "images") -> str:
    """Return one line about a dataset: files by type, classes with counts, and what was left out and why."""
    suffixes = Counter(PurePosixPath(name).suffix.lower().lstrip(".") or "no ending" for name in found.names)
    roots = len(found.roots) if isinstance(found, FoundImages) else 1
    text = f"{len(found):,} {nouns} ({_counts(suffixes)})" + f" in {roots} folders" * (roots > 1)
    if found.val_mask is not None:
        text += f", {int(found.val_mask.sum()):,} of them for validation"
    if classes is not None:
        text += f", {len(set(classes))} classes ({_counts(Counter(classes))})"
        if unseen := untrained_classes(classes, found.val_mask):
            text += f", {len(unseen)} of them only in validation ({first_names(unseen)})"
    if found.left_out:
        parts = (
            f"{len(names):,} {reason} ({names[0]}{', ...' * (len(names) > 1)})"
            for reason, names in found.left_out.items()
        )
        text += f"; left out: {', '.join(parts)}"
    return text


def untrained_classes(classes: Sequence[str], val_mask: npt.NDArray[np.bool_] | None) -> list[str]:
    """Return the classes of which all images are for validation; none without such a split."""
    held_out = np.zeros(len(classes), bool) if val_mask is None else val_mask
    trained = {name for name, out in zip(classes, held_out, strict=True) if not out}
    return sorted(set(classes) - trained)


def _counts(counter: Counter[str], limit: int = 10) -> str:
    parts = [f"{count:,} {name}" for name, count in counter.most_common(limit)]
    return ", ".join(parts) + (", ..." if len(counter) > limit else "")
