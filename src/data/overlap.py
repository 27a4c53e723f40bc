"""Files that two of the folders of a dataset share."""

import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from src.errors import format_override


def check_overlap(roots: Sequence[str | None], val_root: str | None) -> None:
    """Raise ValueError if the same files would be used twice.

    A folder `val_root` inside of a root is allowed: `lies_in` finds its files.
    """
    given = [root for root in roots if root is not None]
    for k, first in enumerate(given):
        for second in given[k + 1 :]:
            if _contains(first, second) or _contains(second, first):
                raise ValueError(
                    f"{format_override('data.root', given)} has {first} and {second}, which share their files; leave "
                    "one out (data.repeats repeats the images of a folder)"
                )
        if val_root is not None and _contains(val_root, first):
            raise ValueError(
                f"{format_override('data.val_root', val_root)} holds all images of "
                f"{format_override('data.root', first)}, which leaves none for training; set data.val_root to another "
                "folder, or leave it out"
            )


def lies_in(root: Path, folder: Path) -> Callable[[str], bool]:
    """Return a function that tells whether a file, by its name below `root`, lies in `folder`; links are followed."""
    top = os.path.realpath(folder)
    resolved = cache(os.path.realpath)

    def inside(name: str) -> bool:
        path = os.path.join(root, name)
        place = os.path.realpath(path) if os.path.islink(path) else resolved(os.path.dirname(path))
        return _is_below(place, top)

    return inside


def _contains(outer: str, inner: str) -> bool:
    return _is_below(os.path.realpath(inner), os.path.realpath(outer))


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
