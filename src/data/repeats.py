"""How often an epoch of training has the images of each of several folders."""

from collections.abc import Sequence
from typing import Any

from src.data.found_images import FoundImages
from src.errors import format_override


def check_repeats(repeats: Sequence[int] | None, root: Any) -> list[int] | None:
    """Return `data.repeats`. Raises ValueError unless it has an integer of at least 1 for each root."""
    if repeats is None:
        return None
    roots = 1 if root is None or isinstance(root, str) else len(root)
    counts = list(repeats) if isinstance(repeats, Sequence) else [repeats]
    if len(counts) != roots or not all(isinstance(count, int) and count >= 1 for count in counts):
        raise ValueError(
            f"{format_override('data.repeats', repeats)} must have an integer of at least 1 for each of the "
            f"{roots} folders of data.root; change it, or leave it out"
        )
    return counts


def repeat_indices(indices: Sequence[int], found: object, repeats: Sequence[int]) -> list[int]:
    """Return each index as often as `repeats` says for its root. Raises ValueError for images without folders."""
    if not isinstance(found, FoundImages):
        raise ValueError("data.repeats is for folders of images; leave it out")
    which = found.which.tolist()
    return [index for index in indices for _ in range(repeats[which[index]])]
