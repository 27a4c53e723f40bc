"""The frames of animations and the pages of TIFF files as images of their own."""

from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt

from src.data.decode import count_frames, decode_frames
from src.data.decoded import Decoded, Pages
from src.data.encoded import Names
from src.data.found_images import FoundImages
from src.errors import counted


@dataclass(frozen=True)
class FrameImages(FoundImages):
    """Each frame of the files as one image, with the name of its file; `frame` (N,) is its number in the file.

    The frames of a file have one id, so they are on the same side of the split.
    """

    frame: npt.NDArray[np.int64]

    def identity(self) -> str:
        return sha256(f"{super().identity()} frames".encode() + self.frame.tobytes()).hexdigest()

    def decode(self, index: int, pages: Pages) -> Decoded:
        """Return a frame of a file. Raises OSError or ValueError."""
        key = self.roots[int(self.which[index])], self.names[index], int(self.times[index])
        if key not in _last:
            with self.open(index) as stream:
                frames = list(decode_frames(stream))
            _last.clear()
            _last[key] = frames
        if len(_last[key]) <= self.frame[index]:
            raise ValueError(f"it has {len(_last[key])} frames, and frame {self.frame[index] + 1} is missing")
        return _last[key][int(self.frame[index])]


_last: dict[tuple[Any, ...], list[Decoded]] = {}
"""All frames of the last file, since they depend on those before them and are decoded in order."""


def split_frames(found: FoundImages) -> FrameImages:
    """Return the frames of all files as images; a file that cannot be read counts as one."""
    counts = np.array([_count(found, k) for k in range(len(found))], np.int64)
    files = np.repeat(np.arange(len(found)), counts)
    return FrameImages(
        found.roots,
        found.which[files],
        Names(found.names[int(k)] for k in files),
        found.sizes[files],
        found.times[files],
        None if found.val_mask is None else found.val_mask[files],
        found.left_out,
        np.concatenate([np.arange(count) for count in counts.tolist()]),
    )


def describe_frames(found: FoundImages) -> str:
    """Return the part of the summary about frames; empty for files of one image each."""
    if not isinstance(found, FrameImages):
        return ""
    files = int((found.frame == 0).sum())
    return f"; frames of {counted(files, 'file')}" if files < len(found) else ""


def _count(found: FoundImages, index: int) -> int:
    try:
        with found.open(index) as stream:
            return count_frames(stream)
    except Exception:  # decoders raise almost anything on corrupted bytes; decoding reports the reason
        return 1
