"""The folders at the top of a dataset: those that hold everything, splits, and classes."""

from collections.abc import Iterable, Sequence
from typing import Literal

Depth = int | Literal["all"]
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""The split that a folder at the top holds, by its name in lower case: the convention of Hugging Face's datasets."""


def outer_folders(names: Iterable[str]) -> int:
    """Return the number of folders, from the top, that hold all files of these names, above any of a split."""
    first, last = min(names := list(names)), max(names)  # what these share, all share
    shared = 0
    for a, b in zip(first.split("/")[:-1], last.split("/")[:-1], strict=False):
        if a != b or a.lower() in SPLITS:
            break
        shared += 1
    return shared


def class_levels(names: Sequence[Sequence[str]], depth: Depth) -> list[int]:
    """Return the number of folders, from the top, that are not classes, for the files `names` of each root.

    These are folders of splits and those around them. A folder that holds everything is a class only beside those of
    other roots.
    """
    outer = [outer_folders(each) if each else 0 for each in names]
    levels = []
    for each, level in zip(names, outer, strict=True):
        splits = {SPLITS.get(name.split("/")[level].lower()) for name in each}
        levels.append(level + 1 if splits <= {"train", "validation"} and "train" in splits else 0)
    end = None if depth == "all" else depth
    some = {tuple(name.split("/")[k:-1][:end]) for each, k in zip(names, levels, strict=True) for name in each}
    if len(some - {()}) < 2:
        return [level or around for level, around in zip(levels, outer, strict=True)]
    return levels
