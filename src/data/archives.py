"""Files in zip and tar archives, read in place."""

import io
import lzma
import os
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, UnicodeDecodeError)
"""What the standard library raises for damaged archives."""


class _Archive(NamedTuple):
    """The files in an archive: `sizes` in bytes by name, and `read`, which returns the contents of one.

    Of several files with one name, the last is the current one, as in an archive that was updated. `replaced` has the
    name of each other one.
    """

    sizes: Mapping[str, int]
    read: Callable[[str], bytes]
    replaced: Sequence[str]


def is_archive(path: Path) -> bool:
    return path.is_file() and (zipfile.is_zipfile(path) or tarfile.is_tarfile(path))


def member_sizes(path: Path) -> Mapping[str, int]:
    """Return the size in bytes of each file in an archive, by name. Raises ValueError for a damaged archive."""
    try:
        return _open(path).sizes
    except DAMAGE as error:
        raise ValueError(f"{path} is cut off or damaged ({error})") from error


def replaced_members(path: Path) -> Sequence[str]:
    """Return the name of each file in an archive that a later file of the same name replaces."""
    return _open(path).replaced


def open_member(root: Path, name: str) -> BinaryIO:
    """Open a file under a folder or in an archive. Raises OSError."""
    if root.is_dir():
        return (root / name).open("rb")
    try:
        return io.BytesIO(_open(root).read(name))
    except (KeyError, ValueError, RuntimeError, *DAMAGE) as error:  # RuntimeError: encrypted, or unknown compression
        raise OSError(f"{name} cannot be read from {root} ({error})") from error


def read_at(path: Path, offset: int, size: int) -> bytes:
    """Return a part of a file. Raises OSError if the file is too short."""
    with path.open("rb") as file:
        file.seek(offset)
        contents = file.read(size)
    if len(contents) < size:
        raise OSError(f"{path} is truncated")
    return contents


def tar_places(path: Path) -> list[tuple[str, tuple[int, int]]] | None:
    """Return name and (offset, size) in bytes of the files in a tar file, in order; None for other and compressed ones.

    Raises ValueError if the file is cut off.
    """
    try:
        archive = tarfile.open(path, "r:")  # noqa: SIM115 - closed below
    except tarfile.TarError:
        return None
    places, end = [], 0
    with archive:
        try:
            for member in archive:
                if member.isreg() and not member.issparse():
                    places.append((member.name.removeprefix("./"), (member.offset_data, member.size)))
                end = archive.offset
        except tarfile.TarError as error:
            raise ValueError(f"{path} is cut off or damaged ({error})") from error
    with path.open("rb") as file:  # tarfile accepts a file that ends after a member or in a header
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(f"{path} is cut off: it does not have the mark at the end of a tar file")
    return places


def _open(path: Path) -> _Archive:
    status = path.stat()
    return _open_once(path, status.st_size, status.st_mtime_ns, os.getpid())


@lru_cache(maxsize=8)
def _open_once(path: Path, size: int, time: int, process: int) -> _Archive:
    """Open an archive once per process: processes must not share the position in a file."""
    if zipfile.is_zipfile(path):
        zipped = zipfile.ZipFile(path)
        if all(each.flag_bits & 1 for each in zipped.infolist() if not each.is_dir()):  # the first bit: encrypted
            raise ValueError(f"{path} is encrypted or empty; unpack it into a folder")
        stored = [(each.filename.removeprefix("./"), each) for each in zipped.infolist() if not each.is_dir()]
        if not any("/" in name for name, _ in stored):  # some programs for Windows write backslashes between folders
            stored = [(name.replace("\\", "/"), each) for name, each in stored if not name.endswith("\\")]
        files = dict(stored)
        return _Archive(
            {name: each.file_size for name, each in files.items()},
            lambda name: zipped.read(files[name]),
            _repeated(name for name, _ in stored),
        )
    if (listed := _tar_places(path, size, time)) is not None:
        places = dict(listed)
        return _Archive(
            {name: size for name, (_, size) in places.items()},
            lambda name: read_at(path, *places[name]),
            _repeated(name for name, _ in listed),
        )
    packed = tarfile.open(path)  # noqa: SIM115 - stays open in this process
    members = [(each.name.removeprefix("./"), each) for each in packed.getmembers() if each.isfile()]
    last = dict(members)

    def read(name: str) -> bytes:
        member = packed.extractfile(last[name])
        assert member is not None
        return member.read()

    return _Archive({name: each.size for name, each in last.items()}, read, _repeated(name for name, _ in members))


def _repeated(names: Iterable[str]) -> list[str]:
    """Return each name as often as it occurs after its first time."""
    counts = Counter(names)
    return list((counts - Counter(counts.keys())).elements())


@lru_cache(maxsize=8)
def _tar_places(path: Path, size: int, time: int) -> list[tuple[str, tuple[int, int]]] | None:
    """Return `tar_places`, which processes that load data inherit instead of reading a large archive again."""
    return tar_places(path)
