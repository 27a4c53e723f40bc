"""Choose the samples and their labels among the arrays of an .npz file, such as those of MedMNIST and Keras."""

from collections.abc import Sequence
from typing import NamedTuple

from src.data.layout import SPLITS, words_of

LABELS = {"class", "classes", "label", "labels", "target", "targets", "y"}
SAMPLES = {
    *("data", "image", "images", "img", "imgs", "sample", "samples", "signal", "signals", "volume", "volumes", "x"),
}
"""Words in the names of arrays, such as train_labels, y_train, images and X."""


class ChosenArrays(NamedTuple):
    """The names of the `samples` for training and, in a second array, validation; the `labels` of each, or none."""

    samples: Sequence[str | None]
    labels: list[str]
    unused: list[str]


def choose_arrays(names: Sequence[str], key: str | None = None, labels: str | None = None) -> ChosenArrays | None:
    """Return the arrays to use, by their names; None if these do not tell.

    Samples for testing are not used. `key` names the only array of samples, and `labels` that of its labels.
    """
    arrays: dict[tuple[str, str], list[str]] = {}
    for name in names:
        words = words_of(name)
        split = next((SPLITS[word] for word in words if word in SPLITS), "train")
        others = set(words) - SPLITS.keys()
        role = "samples" if others <= SAMPLES else "labels" if others & LABELS else "other"
        arrays.setdefault((role, split), []).append(name)
    splits = ["train", *(["validation"] if ("samples", "validation") in arrays and labels is None else [])]
    if key is not None:
        splits = [split for (role, split), own in arrays.items() if role == "samples" and key in own]
    samples = [[key]] if key is not None else [arrays.get(("samples", split), []) for split in splits]
    if any(len(own) != 1 for own in samples):
        return None
    matching = [[labels]] if labels is not None else [arrays.get(("labels", split), []) for split in splits]
    complete = all(len(own) == 1 for own in matching)
    used = [own[0] for own in samples], [own[0] for own in matching if complete]
    return ChosenArrays(*used, [name for name in names if name not in {*used[0], *used[1]}])
