"""The splits and the classes of images, from their folders and names."""

import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Literal

from src.data.found_images import FoundImages
from src.errors import counted

Depth = int | Literal["all"]
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""The split that a folder holds, by a word of its name in lower case: the convention of Hugging Face's datasets."""
FILLERS = {"set", "split", "data", "dataset", "image", "images", "img", "imgs", "photo", "photos", "seg", "folder"}
"""Other words in the names of such folders, such as train_images, seg_test and test-set."""

MAX_STRAYS = 0.05
"""Largest share of files outside of all class folders that does not remove the classes."""


@cache
def split_of(folder: str) -> str | None:
    """Return the split that a folder seems to hold, by its name, such as train2017, TEST_images or trainA; else None.

    Names with other words, such as train_masks, hold no split.
    """
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+|[^\W\d_a-zA-Z]+", folder)
    named = [each.lower().removesuffix("set") or "set" for each in words if len(each) > 1 or not each.isascii()]
    splits = {SPLITS.get(word, "" if word in FILLERS else "other") for word in named} - {""}
    return splits.pop() if len(splits) == 1 and splits <= {*SPLITS.values()} else None


def splits_of(names: Sequence[str]) -> list[str | None] | None:
    """Return the split of each file, or None for files outside of the folders of splits.

    These folders are at the top, in the only folder there, or in each of the folders there, which are classes. Returns
    None for all without a folder for training. Beside other folders and without another split, "train" is the name of
    a class, like "bus". Raises ValueError if all files are in folders for validation and test.
    """
    level = _outer_folders(names) if names else 0
    folders = [name.split("/")[level:-1] for name in names]
    below = [split_of(parts[1]) if len(parts) > 1 else None for parts in folders]
    trained = {parts[0] for parts, split in zip(folders, below, strict=True) if split == "train"}
    if {*below} & {"validation", "test"} and trained == {parts[0] for parts in folders if parts}:
        return below
    splits = [split_of(parts[0]) if parts else None for parts in folders]
    present = {split for split, parts in zip(splits, folders, strict=True) if parts}
    if present and present <= {"validation", "test"} and all(folders):
        tops = sorted({parts[0] for parts in folders})
        raise ValueError(f"it has no folder for training beside {' and '.join(tops)}; name one train")
    has_splits = "train" in present and (present == {"train"} or present & {"validation", "test"})
    return splits if has_splits else None


def class_folders(found: FoundImages, depth: Depth = 1) -> tuple[FoundImages, list[str] | None]:
    """Return images and their classes: the folder at the top, below a folder of a split; None unless two or more.

    A class consists of the names of up to `depth` folders, such as "animals/cat". A few files outside of all class
    folders (`MAX_STRAYS`) are left out. Raises ValueError for an invalid depth.
    """
    if depth != "all" and (isinstance(depth, str) or depth < 1):
        raise ValueError(f"data.source.class_depth={depth} must be a number of folders, at least 1, or all")
    paths = list(map("/".join, _class_paths(found, depth)))
    inside = [path != "" for path in paths]
    if len({path for path in paths if path}) < 2 or inside.count(False) > MAX_STRAYS * len(paths):
        return found, None
    return found.keep(inside, "outside of the class folders"), [path for path in paths if path]


def describe_depth(found: FoundImages, depth: Depth) -> str:
    """Return the part of the summary about folders within those at the top, which are not classes; empty without."""
    if depth != 1:
        return ""
    paths = {tuple(path) for path in _class_paths(found, depth, complete=True) if path}
    if len(paths) == len({path[0] for path in paths}):
        return ""
    nested = [path for path in paths if len(path) > 1]
    tops = {path[0] for path in nested}
    return (
        f"; {counted(len(nested), 'subfolder')} of {counted(len(tops), 'folder')} without a class "
        "(data.source.class_depth=2 makes one of each)"
    )


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


def _class_paths(found: FoundImages, depth: Depth, complete: bool = False) -> list[list[str]]:
    """Return the class folders of each image: the first `depth`, or all if `complete`, below those of a split."""
    names: list[list[str]] = [[] for _ in found.roots]
    for k, name in zip(found.which, found.names, strict=True):
        names[k].append(name)
    levels, end = _class_levels(names, depth), None if depth == "all" or complete else depth
    return [name.split("/")[levels[k] : -1][:end] for k, name in zip(found.which, found.names, strict=True)]


def _class_levels(names: Sequence[Sequence[str]], depth: Depth) -> list[int]:
    """Return the number of folders, from the top, that are not classes, for the files `names` of each root.

    These are folders of splits and those around them. A folder that holds everything is a class only beside those of
    other roots.
    """
    outer = [_outer_folders(each) if each else 0 for each in names]
    levels = []
    for each, level in zip(names, outer, strict=True):
        splits = {split_of(name.split("/")[level]) for name in each}
        levels.append(level + 1 if splits <= {"train", "validation"} and "train" in splits else 0)
    end = None if depth == "all" else depth
    some = {tuple(name.split("/")[k:-1][:end]) for each, k in zip(names, levels, strict=True) for name in each}
    if len(some - {()}) < 2:
        return [level or around for level, around in zip(levels, outer, strict=True)]
    return levels


def _outer_folders(names: Iterable[str]) -> int:
    """Return the number of folders, from the top, that hold all files of these names, above any of a split."""
    first, last = min(names := list(names)), max(names)  # what these share, all share
    shared = 0
    for a, b in zip(first.split("/")[:-1], last.split("/")[:-1], strict=False):
        if a != b or split_of(a):
            break
        shared += 1
    return shared
