"""The splits and the classes of images, from their folders and names."""

import re
from collections.abc import Iterable, Sequence, Set
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from src.data.found_images import FoundImages
from src.errors import counted, first_names

Depth = int | Literal["all"]
SPLITS = {
    **dict.fromkeys(("train", "training", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""The split that a folder holds, by a word of its name in lower case: the convention of Hugging Face's datasets."""
FILLERS = {"set", "split", "data", "dataset", "image", "images", "img", "imgs", "photo", "photos", "seg", "folder"}
"""Other words in the names of such folders, such as train_images, seg_test and test-set."""

MAX_STRAYS = 0.05
"""Largest share of files outside of all class folders that does not remove the classes."""

_KNOWN = "|".join(sorted({*SPLITS, *FILLERS, "mask", "masks"}, key=len, reverse=True))
_WORD = rf"[A-Z]{{2,}}(?=(?:{_KNOWN})(?![a-z]))|[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_a-zA-Z]+"
"""An acronym, also directly before a known word, as in VOCtest; a word; or one in another script."""


def words_of(name: str) -> list[str]:
    """Return the words in a name, in lower case, without numbers: [jpeg, images] of JPEGImages_2012."""
    return [word.lower() for word in re.findall(_WORD, name)]


class _Folder(NamedTuple):
    """What the name of a folder says: its `split`, or None, and the `rest` of its words, such as A of trainA."""

    split: str | None
    rest: str


@cache
def _parse(folder: str) -> _Folder:
    if re.fullmatch(r"images?T[rs]", folder):  # imagesTr and imagesTs of the Medical Segmentation Decathlon
        return _Folder("train" if folder.endswith("r") else "test", "")
    splits: set[str] = set()

    def other(match: re.Match[str]) -> str:
        word = re.sub(r"(?<=.)(set|images?|imgs?|data)$", "", match[1].lower())
        splits.update({SPLITS[word]} if word in SPLITS else ())
        return "" if word in SPLITS or word in FILLERS else match[0]

    rest = re.sub(r"[ _.-]+", "_", re.sub(rf"({_WORD})\d*", other, folder)).strip("_")
    return _Folder(splits.pop() if len(splits) == 1 else None, rest if words_of(rest) else "")


def split_of(folder: str) -> str | None:
    """Return the split that a folder seems to hold, by its name, such as train2017 or TEST_images; else None.

    Names with other words, such as train_masks, hold no split by themselves.
    """
    split, rest = _parse(folder)
    return None if rest else split


def splits_of(names: Sequence[str]) -> list[str | None] | None:
    """Return the split of each file, or None for files outside of the folders of splits.

    These folders are at the top, in the only folder there, or in each of the folders there, which are classes. Returns
    None for all without such folders. Raises ValueError if all files are in folders for validation and test.
    """
    found = _split_folders(names)
    return None if found is None else found[1]


def _split_folders(names: Sequence[str]) -> tuple[int, list[str | None]] | None:
    """Return the position in the paths of the folders of splits, and the split of each file; see `splits_of`."""
    level = outer_folders(names) if names else 0
    folders = [name.split("/")[level:-1] for name in names]
    below = [split_of(parts[1]) if len(parts) > 1 else None for parts in folders]
    tops = {parts[0] for parts in folders if parts}
    trained = {parts[0] for parts, split in zip(folders, below, strict=True) if split == "train"}
    if trained == tops and ({*below} & {"validation", "test"} or ({*below} == {"train"} and len(tops) > 1)):
        return level + 1, below
    splits = _splits_at_top(tops, all(folders))
    if splits is None:
        return None
    loose = "train" if {*splits} == tops and "train" not in {_parse(top).split for top in tops} else None
    return level, [splits.get(parts[0]) if parts else loose for parts in folders]


def _splits_at_top(tops: Set[str], complete: bool) -> dict[str, str] | None:
    """Return the split of the folders in one place; None without splits. `complete` says that they hold all files.

    Beside other folders and without another split, "train" is the name of a class, like "bus". Names with other words
    are for splits if these are the same, as in cars_train and cars_test, or letters, as in trainA and trainB. Without
    a folder for training, it is all folders that are not for validation or test. A folder trainval beside one of train
    is not used, since it has the images for validation.
    """
    if any(_parse(top).split == "train" and "trainval" not in words_of(top) for top in tops):
        tops = {top for top in tops if "trainval" not in words_of(top)}
    plain = {top: split for top in tops if (split := split_of(top))}
    if "train" in plain.values():
        return plain if {*plain} == tops or {*plain.values()} != {"train"} else None
    by_rest: dict[str, dict[str, str]] = {}
    for top in tops - plain.keys():
        if split := _parse(top).split:
            by_rest.setdefault(_parse(top).rest, {})[top] = split
    named = {rest: each for rest, each in by_rest.items() if "train" in each.values()}
    if named and (max(map(len, named)) == 1 or any({*each.values()} != {"train"} for each in named.values())):
        return plain | {top: split for each in named.values() for top, split in each.items()}
    if plain and complete and {*plain} == tops:
        raise ValueError(f"it has no folder for training beside {' and '.join(sorted(tops))}; name one train")
    return plain | dict.fromkeys(tops - plain.keys(), "train") if plain else None


def class_folders(found: FoundImages, depth: Depth = 1) -> tuple[FoundImages, list[str] | None]:
    """Return images and their classes: the folder at the top, below a folder of a split; None unless two or more.

    A class consists of the names of up to `depth` folders, such as "animals/cat". A few files outside of all class
    folders (`MAX_STRAYS`) are left out. Raises ValueError for an invalid depth.
    """
    if depth != "all" and (isinstance(depth, str) or depth < 1):
        raise ValueError(f"data.source.class_depth={depth} must be a number of folders, at least 1, or all")
    paths = list(map("/".join, _class_paths(found, depth)))
    inside = np.array([path != "" for path in paths])
    if len({path for path in paths if path}) < 2 or _has_strays(found, inside):
        return found, None
    return found.keep(inside, "outside of the class folders"), [path for path in paths if path]


def _has_strays(found: FoundImages, inside: npt.NDArray[np.bool_]) -> bool:
    """Return whether more than `MAX_STRAYS` of the images for training, or of those for validation, lie outside."""
    is_val = np.zeros(len(found), bool) if found.val_mask is None else found.val_mask
    return any(np.mean(~inside[part]) > MAX_STRAYS for part in (is_val, ~is_val) if part.any())


def describe_folders(found: FoundImages, classes: Sequence[str] | None, depth: Depth = 1) -> str:
    """Return the part of the summary about folders that are not classes; empty without."""
    paths = [tuple(path) for path in _class_paths(found, depth, complete=True)]
    different = set(paths) - {()}
    tops = {path[0] for path in different}
    if classes is None and len(tops) > 1:
        outside = [name for name, path in zip(found.names, paths, strict=True) if not path]
        return (
            f"; no classes, since {len(outside):,} are outside of the {len(tops)} folders ({first_names(outside, 1)})"
        )
    if depth != 1 or len(different) == len(tops):
        return ""
    nested = {path for path in different if len(path) > 1}
    folders = counted(len({path[0] for path in nested}), "folder")
    return (
        f"; {counted(len(nested), 'subfolder')} of {folders} without a class "
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
    """Return the class folders of each image: the first `depth`, or all if `complete`, without those of splits.

    A folder that holds all files of a root is a class only beside those of other roots.
    """
    names: list[list[str]] = [[] for _ in found.roots]
    for k, name in zip(found.which, found.names, strict=True):
        names[k].append(name)
    folders, outer = zip(*map(_without_splits, names), strict=True)
    end = None if depth == "all" else depth
    some = {tuple(parts[:end]) for each in folders for parts in each} - {()}
    skipped = outer if len(some) < 2 else [0] * len(outer)
    each_root = [iter(each) for each in folders]
    end = None if complete else end
    return [next(each_root[k])[skipped[k] :][:end] for k in found.which]


def _without_splits(names: Sequence[str]) -> tuple[list[list[str]], int]:
    """Return the folders of each file without those of splits, and the number of those at the top that hold all."""
    folders = [name.split("/")[:-1] for name in names]
    outer = outer_folders(names) if names else 0
    found = _split_folders(names)
    if found is None:
        return folders, outer
    level, splits = found
    if level > outer:
        return [[*parts[:level], *parts[level + 1 :]] for parts in folders], outer
    folders = [parts[level:] for parts in folders]
    rests = {_parse(parts[0]).rest for parts in folders if parts}
    inner: list[list[str]] = []
    for parts, split in zip(folders, splits, strict=True):
        top, below = "".join(parts[:1]), parts[1:]
        if split == _parse(top).split:
            top = _parse(top).rest if len(rests) > 1 else ""
        while below and split_of(below[0]) == split:  # seg_train/seg_train
            below = below[1:]
        inner.append([top, *below] if top else below)
    firsts: dict[str | None, set[str]] = {}
    for parts, split in zip(inner, splits, strict=True):
        firsts.setdefault(split, set()).add(parts[0] if parts else "")
    plain = {split for split, names in firsts.items() if len(names) == 1 and {*words_of(*names)} <= FILLERS}
    return [parts[split in plain :] for parts, split in zip(inner, splits, strict=True)], 0  # train/images


def outer_folders(names: Iterable[str]) -> int:
    """Return the number of folders, from the top, that hold all files of these names, above any of a split."""
    first, last = min(names := list(names)), max(names)  # what these share, all share
    shared = 0
    for a, b in zip(first.split("/")[:-1], last.split("/")[:-1], strict=False):
        if a != b or split_of(a):
            break
        shared += 1
    return shared
