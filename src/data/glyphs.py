"""Sets of pictures that their captions identify, some of them held out to measure generalization."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, PackagePath, files, version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from src.cache import cached, digest
from src.data.fit import height_and_width
from src.data.sources import InMemory


class Glyphs(NamedTuple):
    """N pictures with their ids and captions; `parts` are what a caption combines, empty if it is not a combination."""

    images: Tensor
    """(N, C, S, S) uint8."""
    ids: list[str]
    captions: list[str]
    parts: list[list[str]]


class GlyphSource(InMemory):
    """The glyphs that are not held out, as a source with one caption each.

    `glyphs` are all of them and `held_out` the indices of those that are in neither training nor validation.

    Args:
        held_out: the number of glyphs to hold out.
        min_others: in how many glyphs each of their parts must occur that are not held out.

    Raises ValueError if `held_out` is negative or exceeds what `min_others` allows.
    """

    def __init__(self, glyphs: Glyphs, held_out: int, min_others: int) -> None:
        self.glyphs = glyphs
        self.held_out = choose_held_out(glyphs, held_out, min_others)
        if held_out != len(self.held_out):
            raise ValueError(
                f"data.source.held_out={held_out} must be in [0, {len(choose_held_out(glyphs, None, min_others))}]: "
                "the parts of what is held out must occur elsewhere"
            )
        self.seen = sorted(set(range(len(glyphs.ids))) - set(self.held_out))
        super().__init__(
            glyphs.images[self.seen],
            captions=[[glyphs.captions[i]] for i in self.seen],
            ids=[glyphs.ids[i] for i in self.seen],
        )


def choose_held_out(glyphs: Glyphs, count: int | None, min_others: int) -> list[int]:
    """Return the indices of up to `count` combinations (None: all possible), in the order of a hash of their ids.

    Each has a caption of its own, and each of its parts occurs in at least `min_others` glyphs that are not held out.
    """
    remaining = Counter(part for parts in glyphs.parts for part in set(parts))
    captions = Counter(glyphs.captions)
    hashes = [hashlib.blake2b(f"held out/{each}".encode(), digest_size=8).digest() for each in glyphs.ids]
    chosen: list[int] = []
    for i in sorted(range(len(hashes)), key=hashes.__getitem__):
        if count is not None and len(chosen) >= count:
            break
        parts = set(glyphs.parts[i])
        if parts and captions[glyphs.captions[i]] == 1 and all(remaining[part] > min_others for part in parts):
            chosen.append(i)
            remaining.subtract(parts)
    return chosen


def load_glyphs(root: str | None, key: Sequence[str | float], draw: Callable[[], Glyphs]) -> Glyphs:
    """Return the glyphs stored in the folder `root` under `key`, or those of `draw` after storing them.

    With root=None they are drawn each time.
    """
    if root is None:
        return draw()

    def compute() -> dict[str, Tensor]:
        images, *texts = draw()
        text = np.frombuffer(json.dumps(texts).encode(), np.uint8)
        return {"images": images, "texts": torch.from_numpy(text.copy())}

    stored = cached(Path(root), f"glyphs_{digest(*key)}", compute)
    return Glyphs(stored["images"], *json.loads(stored["texts"].numpy().tobytes()))


def square_size(image_size: int | Sequence[int], least: int, data: str) -> int:
    """Return the width of square images. Raises ValueError for other shapes, and for fewer than `least` pixels."""
    height, width = height_and_width(image_size)
    if height != width:
        raise ValueError(f"data.image_size=[{height},{width}] must be one number for data={data}, which is square")
    if width < least:
        raise ValueError(f"data.image_size={width} must be at least {least} for data={data}; smaller ones look alike")
    return width


def package_files(package: str, data: str) -> tuple[str, list[PackagePath]]:
    """Return the version and the files of an installed package. Raises ValueError if it is missing."""
    try:
        return version(package), files(package) or []
    except PackageNotFoundError as error:
        raise ValueError(f"data={data} needs the package {package}; pip install {package}") from error
