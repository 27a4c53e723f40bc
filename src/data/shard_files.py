"""Provide shards as uncompressed local tar files: download and decompress each one once."""

import http.client
import logging
import os
import re
import shutil
import tarfile
import urllib.request
import zlib
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from src.data.pixel_store import fill_cache
from src.errors import format_override

COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ")
"""The first bytes of files compressed by gzip, bzip2 and xz."""
TIMEOUT = 60
"""Seconds without a response after which a download fails."""

logger = logging.getLogger(__name__)


def cached_shard(url: str, store: Path, setting: str) -> Path:
    """Return the path of an uncompressed shard; download and decompress it into `store` if necessary.

    Raises ValueError, which names `setting`, if the shard cannot be downloaded or decompressed.
    """
    path = Path(url)
    if re.match(r"https?://", url):
        name = Path(url.partition("?")[0]).name or "shard.tar"
        path = store / sha256(url.encode()).hexdigest()[:16] / name
        try:
            _store_once(path, partial(_download, url))
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ValueError(
                f"{format_override(setting, url)} cannot be downloaded ({' '.join(str(error).split()):.200}); check "
                "the URL and the network"
            ) from error
    with path.open("rb") as file:
        compressed = file.read(6).startswith(COMPRESSED)
    if not compressed:
        return path
    status = path.stat()
    key = sha256(repr((str(path.resolve()), status.st_size, status.st_mtime_ns)).encode()).hexdigest()[:16]
    target = store / key / f"{path.name.partition('.')[0]}.tar"
    try:
        _store_once(target, partial(_decompress, path))
    except (EOFError, tarfile.TarError, zlib.error, OSError) as error:
        raise damaged_shard(path, error) from error
    return target


def _store_once(target: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write the file `target`, alone in its folder, by `write` unless it exists; it appears only when complete."""

    def fill(folder: Path) -> None:
        with (folder / target.name).open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())

    if not target.exists():
        fill_cache(target.parent, lambda _: target if target.exists() else None, fill)


def _download(url: str, file: BinaryIO) -> None:
    logger.info("Downloading %s", url)
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
        shutil.copyfileobj(response, file)
        expected = response.headers.get("Content-Length")
    if expected is not None and file.tell() != int(expected):
        raise OSError(f"{file.tell()} of {expected} bytes arrived")


def _decompress(path: Path, file: BinaryIO) -> None:
    with tarfile.open(path) as archive:
        contents: Any = archive.fileobj  # the decompressed file
        contents.seek(0)
        shutil.copyfileobj(contents, file)


def damaged_shard(path: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()).removeprefix(f"{path} ") or type(error).__name__
    return ValueError(f"the shard {path} cannot be read ({reason}); write it again, or leave it out of data.urls")
