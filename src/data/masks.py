"""Recognize masks, depth maps and degraded versions beside images, which are not to train on."""

import re
import warnings
from collections import defaultdict
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from src.data.archives import open_member
from src.data.decode import decode
from src.data.fit import ImageSpec, load_image
from src.data.layout import SPLITS, outer_folders, words_of
from src.errors import format_override

T = TypeVar("T")
MASKS = {
    *("anno", "annot", "annotation", "annotations", "depth", "depths", "disp", "disparity", "groundtruth", "gt"),
    *("instance", "label", "labels", "manual", "mask", "masks", "matte", "panoptic", "seg", "segmentation"),
    *("segmentations", "semantic", "trimap", "trimaps", "truth"),
}
"""Words in the names of masks and of their folders."""
IMAGES = {
    *("color", "colour", "frame", "frames", "image", "images", "img", "imgs", "input", "inputs", "jpeg", "photo"),
    *("photos", "picture", "pictures", "rgb"),
}
"""Words in the names of the images beside them and of their folders."""
DEGRADED = {
    *("bicubic", "blur", "blurred", "blurry", "degraded", "foggy", "gamma", "haze", "hazy", "input", "inputs", "low"),
    *("lowres", "lq", "lr", "noise", "noisy", "rain", "rainy", "raw", "unknown"),
}
"""Words in the paths of degraded versions of images."""
CLEAN = {
    *("clean", "clear", "groundtruth", "gt", "high", "highres", "hq", "hr", "norain", "original", "reference", "sharp"),
    *("target", "targets"),
}
"""Words in the paths of the images beside them."""
QUALITY = re.compile(rf"(?:(?<![a-zA-Z])|(?<=[a-z])(?=[A-Z]))(?i:{'|'.join(DEGRADED | CLEAN)})(?![a-z])")
MIN_PAIRED = 0.95
"""Smallest share of the masks, or degraded versions, of one kind with an image of the same name."""
MIN_ALIKE = 0.7
"""Smallest correlation of the thumbnails of an image and its degraded version."""
MAX_COLORS = 256
"""Largest number of colors in a mask that is not gray, such as a depth map in the colors of a palette."""


class Masks(NamedTuple):
    """The masks with one word in their names: all files, those with an image, and the folder of these images."""

    files: list[str]
    paired: list[str]
    images: str | None

    def is_paired(self) -> bool:
        return len(self.paired) >= MIN_PAIRED * len(self.files)


def find_masks(root: Path, names: Sequence[str]) -> tuple[set[str], list[Masks]]:
    """Return the files that are masks of others, and folders of files that may be.

    Masks are in masks/ beside images/, or as cat_mask.png beside cat.png. Of each kind, nearly all must have an image,
    and those that can be decoded must be gray or have few colors. Masks of other names than the images beside their
    folder are doubtful.
    """
    text = "\n".join(names).lower()  # much faster than looking at each of a million names
    words = [word for word in MASKS if word in text]
    if not words and not (".png" in text and ".jp" in text):
        return set(), []
    in_folders = [kind for kind in _in_folders(names) if not _are_photos(root, kind.files)]
    masks = {name for kind in in_folders if kind.is_paired() for name in kind.files}
    for kind in _by_name([name for name in names if name not in masks], words):
        if kind.is_paired() and not _are_photos(root, kind.files):
            masks.update(kind.files)
    return masks, [kind for kind in in_folders if not kind.is_paired()]


def find_degraded(root: Path, names: Sequence[str]) -> set[str]:
    """Return the files that are degraded versions of others, such as LR/1x4.png beside HR/1.png.

    Of those with the same words, nearly all must differ from a better image by such words only, and five look like it.
    """
    parts = {*re.findall("[a-zA-Z]+", "\n".join(names))}  # much faster than looking at each of a million names
    present = {word for part in parts for word in words_of(part)}
    if present.isdisjoint(DEGRADED) or present.isdisjoint(CLEAN):
        return set()
    better: dict[tuple[str, ...], str] = {}
    kinds: dict[str, list[str]] = defaultdict(list)
    level = outer_folders(names)
    for name in names:
        if words := {word.lower() for word in QUALITY.findall("/".join(name.split("/")[level:]))}:
            if words <= DEGRADED:
                kinds[" ".join(sorted(words))].append(name)
            elif words <= CLEAN:
                better[_without_quality(name)] = name
    degraded: set[str] = set()
    for files in kinds.values() if better else ():
        pairs = [(name, better[place]) for name in files if (place := _without_quality(name)) in better]
        if len(pairs) >= MIN_PAIRED * len(files) and all(_are_alike(root, pair) for pair in _some(pairs)):
            degraded.update(files)
    return degraded


def _without_quality(name: str) -> tuple[str, ...]:
    """Return the parts of a path without its ending, scale factors such as X2, and words of image quality."""
    *folders, file = re.sub(r"(?<![a-zA-Z])[xX]\d(?!\w)", "", name.rpartition(".")[0]).split("/")
    folders = [re.sub(r"\d", "", each) if QUALITY.search(each) else each for each in folders]  # HR_128
    parts = (re.sub(r"[ _.-]+", "_", QUALITY.sub("", each)).strip("_") for each in (*folders, file))
    return tuple(filter(None, parts))


def _are_alike(root: Path, names: Iterable[str]) -> bool:
    thumbnails = []
    try:
        for name in names:
            with open_member(root, name) as stream:
                thumbnails.append(load_image(stream, ImageSpec((8, 8), 1, "stretch")).pixels.ravel())
    except Exception:  # decoders raise almost anything; reading all files reports it
        return False
    with np.errstate(invalid="ignore"):
        return bool(np.corrcoef(thumbnails)[0, 1] >= MIN_ALIKE)


def _some(values: Sequence[T]) -> Sequence[T]:
    """Return at most five evenly spaced values."""
    return values[:: max(1, -(-len(values) // 5))]


def warn_of_masks(root: Path, doubtful: Sequence[Masks], used: Container[str]) -> None:
    """Warn if files that may be masks are used as images."""
    for kind in doubtful:
        if (count := sum(name in used for name in kind.files)) and kind.images:
            alone = len(kind.files) - len(kind.paired)
            warnings.warn(
                f"{root}: {count:,} files such as {kind.files[0]} seem to be masks, but {alone:,} of "
                f"{len(kind.files):,} have no image of the same name, so they are used as images; set "
                f"{format_override('data.root', str(root / kind.images))} to leave them out",
                stacklevel=2,
            )


def _in_folders(names: Sequence[str]) -> Iterable[Masks]:
    """Return the files in folders of masks, by the names of these folders."""
    beside = _mask_folders({name.rpartition("/")[0] for name in names})
    if not beside:
        return []
    stems: dict[str, set[str]] = defaultdict(set)
    """The names of the images below each folder beside one of masks."""
    image_folders, files = {each for images in beside.values() for each in images}, []
    for name in names:
        parents = _parents(name)
        if folder := next((each for each in parents if each in beside), None):
            files.append((name, folder))
        else:
            for each in image_folders.intersection(parents):
                stems[each].add(_stem(name))
    known = {folder: set().union(*(stems[each] for each in images)) for folder, images in beside.items()}
    shorter = {folder: {*map(_shorter, each)} for folder, each in known.items()}
    kinds: dict[str, Masks] = {}
    for name, folder in files:
        kind = kinds.setdefault(folder.rpartition("/")[2], Masks([], [], beside[folder][0]))
        kind.files.append(name)
        if len(known[folder]) == 1 or (stem := _stem(name)) in known[folder] or stem in shorter[folder]:
            kind.paired.append(name)
    return kinds.values()


def _mask_folders(folders: Iterable[str]) -> dict[str, list[str]]:
    """Return the folders of masks, with the folders of images beside them."""
    children: dict[str, set[str]] = defaultdict(set)
    words: dict[str, set[str]] = defaultdict(set)
    """The words in the names of each folder and of all below it."""
    for folder in folders:
        parts = folder.split("/")
        for k, path in enumerate(_parents(f"{folder}/")):
            children[path.rpartition("/")[0]].add(path)
            words[path].update(*map(words_of, parts[k:]))

    def has_images(folder: str, mask_words: set[str]) -> bool:
        own = set(words_of(folder.rpartition("/")[2]))
        other = own - mask_words
        if MASKS.isdisjoint(mask_words - own) or not MASKS.isdisjoint(other):
            return False
        return bool(IMAGES & (words[folder] - mask_words)) or (bool(own) and not other)  # train, beside train_masks

    beside = {}
    for siblings in children.values():
        for folder in siblings:
            mask_words = set(words_of(folder.rpartition("/")[2]))
            if not MASKS.isdisjoint(mask_words):
                beside[folder] = sorted(each for each in siblings - {folder} if has_images(each, mask_words))
    return {folder: images for folder, images in beside.items() if images}


def _by_name(names: Sequence[str], words: Sequence[str]) -> Iterable[Masks]:
    """Return the files whose names have `words` of masks, and PNG files that have the names of JPEG files.

    At least half of the images in their folders must have one.
    """
    named: dict[str, list[str]] = defaultdict(list)
    pattern = re.compile("|".join(words), re.IGNORECASE)
    for name in names if words else ():
        if pattern.search(file := name.rpartition("/")[2]) and (own := MASKS.intersection(words_of(file))):
            named[" ".join(sorted(own))].append(name)
    masks = {name for files in named.values() for name in files}
    images = [name for name in names if name not in masks]
    jpegs = {name.rpartition(".")[0] for name in images if name.lower().endswith((".jpg", ".jpeg"))}
    folders = {each.rpartition("/")[0] for each in jpegs}
    if jpegs and (pngs := [n for n in images if n.lower().endswith(".png") and n.rpartition("/")[0] in folders]):
        yield Masks(pngs, [name for name in pngs if name.rpartition(".")[0] in jpegs], None)
    for files in named.values():
        folders = {name.rpartition("/")[0] for name in files}
        stems = [_place(name) for name in images if name.rpartition("/")[0] in folders]
        of_masks = {_place(name) for name in files}
        known = {*stems, *((folder, _shorter(stem)) for folder, stem in stems)}
        covered = sum((folder, stem) in of_masks or (folder, _shorter(stem)) in of_masks for folder, stem in stems)
        if 2 * covered >= len(stems):
            yield Masks(files, [name for name in files if _place(name) in known], None)


def _place(name: str) -> tuple[str, str]:
    return name.rpartition("/")[0], _stem(name)


def _parents(name: str) -> list[str]:
    """Return the folders around a file, from the top."""
    return [name[: match.start()] for match in re.finditer("/", name)]


def _stem(name: str) -> str:
    """Return the name of a file without its ending and without the words that tell masks from images."""
    parts = re.split(r"[ _.-]+", re.sub(r"(\.nii)?\.\w+$", "", name.rpartition("/")[2]))
    return "_".join(part.lower() for part in parts if _ROLES.isdisjoint(words_of(part)))


def _shorter(stem: str) -> str:
    """Return a name without its last part, which is the channel in the names of many medical images."""
    return stem.rpartition("_")[0] or stem


_ROLES = MASKS | IMAGES | SPLITS.keys() | {"sync"}


def _are_photos(root: Path, names: Sequence[str]) -> bool:
    """Return whether some of the files, of at most five, have many colors."""
    return any(_is_photo(root, name) for name in _some(names))


def _is_photo(root: Path, name: str) -> bool:
    try:
        with open_member(root, name) as stream:
            pixels = decode(stream).pixels
    except Exception:  # decoders raise almost anything; reading all files reports it
        return False
    colors = pixels.reshape(-1, pixels.shape[-1])
    colors = colors[:: -(-len(colors) // 10_000)]
    gray = bool((colors == colors[:, :1]).all())
    return not gray and len(np.unique(colors, axis=0)) > min(MAX_COLORS, len(colors) / 4)
