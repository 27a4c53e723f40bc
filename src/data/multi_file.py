"""Images whose channels are in several files, such as the bands of a satellite."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt

from src.data.decode import decode
from src.data.decoded import Decoded, Pages
from src.data.encoded import Names
from src.data.found_images import FoundImages
from src.data.layout import compile_pattern
from src.errors import counted, first_names


@dataclass(frozen=True)
class CombinedImages(FoundImages):
    """Images of several files each, in order of their names: the path of the files without the name of the channel.

    `members` (N, K) are the indices in `files` of the channels `channel_names`, or -1 where a file is missing.
    """

    files: FoundImages
    members: npt.NDArray[np.int64]
    channel_names: tuple[str, ...]

    def identity(self) -> str:
        return sha256(f"{self.files.identity()} {self.members.tolist()}".encode()).hexdigest()

    def paths_of(self, index: int) -> list[str]:
        """Return the paths by which a table may name an image: its name, or one of its files."""
        return [*super().paths_of(index), *(str(self.files.path(k)) for k in self.members[index].tolist() if k >= 0)]

    def decode(self, index: int, pages: Pages) -> Decoded:
        """Return the channels of all files (H, W, C). Raises ValueError for a missing file and unequal ones."""
        members = self.members[index].tolist()
        if missing := [name for name, k in zip(self.channel_names, members, strict=True) if k < 0]:
            raise ValueError(f"it has no file of channel {first_names(missing)}; see data.source.channel_names")
        parts = []
        for k in members:
            with self.files.open(k) as stream:
                parts.append(decode(stream, pages))
        for what, values in (
            ("sizes", [f"{part.pixels.shape[1]}x{part.pixels.shape[0]}" for part in parts]),
            ("types", [str(part.pixels.dtype) for part in parts]),
        ):
            if len(set(values)) > 1:
                pairs = zip(self.channel_names, values, strict=True)
                listed = first_names([f"{name} {value}" for name, value in pairs])
                raise ValueError(f"its files have different {what} ({listed}); convert them to one")
        pixels = np.concatenate([part.pixels for part in parts], axis=-1)
        return Decoded(pixels, False, False, parts[0].size, max(part.frames for part in parts))


def combine(found: FoundImages, pattern: str, channel_names: Sequence[str] | None) -> CombinedImages:
    """Return the files that differ in a part of their path as one image each.

    `pattern` is a regular expression of this part, whose group is the name of the channel. `channel_names` are those
    to use, in their order; None takes all, sorted. Other files are left out. Raises ValueError for an invalid pattern
    or no files.
    """
    setting = f"data.source.channel_pattern={pattern!r}"
    compiled = compile_pattern("data.source.channel_pattern", pattern, "'_(B[0-9]+)' or '(red|green|blue)/'")
    parts = [_split_name(compiled, name) for name in found.names]
    channels = _choose_channels({channel for channel, _ in parts if channel is not None}, channel_names, setting)
    members: dict[tuple[int, str], list[int]] = {}
    left_out = {reason: [*names] for reason, names in found.left_out.items()}
    for k, (channel, rest) in enumerate(parts):
        if channel not in channels:
            reason = "without a channel in the name" if channel is None else "of channels that are not used"
            left_out.setdefault(reason, []).append(found.names[k])
            continue
        row = members.setdefault((int(found.which[k]), rest), [-1] * len(channels))
        column = channels.index(channel)
        if row[column] >= 0:
            names = f"{found.names[row[column]]} and {found.names[k]}"
            raise ValueError(f"{setting} takes {names} for one file; change it")
        row[column] = k
    keys = sorted(members)
    rows = np.array([members[key] for key in keys], np.int64)
    some_file = rows.max(1)
    return CombinedImages(
        found.roots,
        np.array([which for which, _ in keys], np.int64),
        Names(rest for _, rest in keys),
        (found.sizes[rows] * (rows >= 0)).sum(1),
        found.times[some_file],
        None if found.val_mask is None else found.val_mask[some_file],
        left_out,
        found,
        rows,
        channels,
    )


def _split_name(pattern: re.Pattern[str], name: str) -> tuple[str | None, str]:
    """Return the channel in the name of a file, or None, and the name of its image: the rest, with the suffix."""
    match = pattern.search(name)
    if match is None or match[1] is None:
        return None, name
    rest = re.sub("/+", "/", name[: match.start()] + name[match.end() :]).strip("/")
    suffix = PurePosixPath(name).suffix
    return match[1], rest if rest.endswith(suffix) else rest + suffix


def _choose_channels(present: set[str], chosen: Sequence[str] | None, setting: str) -> tuple[str, ...]:
    """Return the channels of an image, in order. Raises ValueError unless each of them is present, and once."""
    known = sorted(present, key=_by_numbers)
    channels = tuple(known if chosen is None else map(str, chosen))
    if not present or len({*channels}) < len(channels) or {*channels} - present:
        fix = f"their channels are {first_names(known, 20)}" if present else "change the pattern"
        listed = "" if chosen is None else f" data.source.channel_names=[{','.join(channels)}]"
        raise ValueError(f"{setting}{listed} must match files, each channel once; {fix}")
    return channels


def describe_channels(found: FoundImages) -> str:
    """Return the part of the summary about images of several files; empty for others."""
    if not isinstance(found, CombinedImages):
        return ""
    return f"; each of {counted(len(found.channel_names), 'file')}: channels {', '.join(found.channel_names)}"


def _by_numbers(name: str) -> list[tuple[int, int, str]]:
    """Return a key that sorts B2 before B10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name)]
