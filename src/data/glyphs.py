"""Sets of pictures that their captions identify, some of them held out to measure generalization."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, PackagePath, files, version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from src.cache import cached, digest
from src.data.sources import InMemory

MIN_OTHERS = 3
"""How often each part of a held-out glyph must remain, so that some are left after the split for validation."""


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
    """

    def __init__(self, glyphs: Glyphs, held_out: int, setting: str = "data.source.held_out") -> None:
        self.glyphs = glyphs
        self.held_out = choose_held_out(glyphs, held_out)
        if len(self.held_out) < held_out:
            raise ValueError(f"{setting}={held_out} must be at most {len(self.held_out)}, the number of combinations")
        self.seen = sorted(set(range(len(glyphs.ids))) - set(self.held_out))
        super().__init__(
            glyphs.images[self.seen],
            captions=[[glyphs.captions[i]] for i in self.seen],
            ids=[glyphs.ids[i] for i in self.seen],
        )


def choose_held_out(glyphs: Glyphs, count: int) -> list[int]:
    """Return the indices of up to `count` combinations, in the order of a hash of their ids.

    Each has a caption of its own, and all of its parts occur in at least `MIN_OTHERS` glyphs that are not held out.
    """
    remaining: Counter[Hashable] = Counter(part for parts in glyphs.parts for part in set(parts))
    captions = Counter(glyphs.captions)
    order = sorted(range(len(glyphs.ids)), key=lambda i: hashlib.blake2b(f"held out/{glyphs.ids[i]}".encode()).digest())
    chosen: list[int] = []
    for i in order:
        parts = set(glyphs.parts[i])
        if len(chosen) == count:
            break
        if parts and captions[glyphs.captions[i]] == 1 and all(remaining[part] > MIN_OTHERS for part in parts):
            chosen.append(i)
            remaining.subtract(parts)
    return chosen


def load_glyphs(root: str | None, key: Sequence[str | float], draw: Callable[[], Glyphs]) -> Glyphs:
    """Return the glyphs stored in the folder `root` under `key`, or those of `draw` after storing them.

    With root=None they are drawn each time.
    """
    if root is None:
        return draw()

    def compute() -> Mapping[str, Tensor]:
        images, *texts = draw()
        text = np.frombuffer(json.dumps(texts).encode(), np.uint8)
        return {"images": images, "texts": torch.from_numpy(text.copy())}

    stored = cached(Path(root), f"glyphs_{digest(*key)}", lambda: dict(compute()))
    return Glyphs(stored["images"], *json.loads(stored["texts"].numpy().tobytes()))


def package_files(package: str, data: str) -> tuple[str, list[PackagePath]]:
    """Return the version and the files of an installed package. Raises ValueError if it is missing."""
    try:
        return version(package), files(package) or []
    except PackageNotFoundError as error:
        raise ValueError(f"data={data} needs the package {package}; pip install {package}") from error
