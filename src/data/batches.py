"""Batches, sources of samples, and the dataset that joins them."""

import signal
import threading
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from src.data.samplers import BatchIndices
from src.data.sources import Source
from src.errors import DataReadError
from src.rng import key

if TYPE_CHECKING:
    from src.data.conditions import Condition


TRIES = 10
"""Samples that are drawn in the place of one that cannot be read, before training is given up."""


class Batch(TypedDict):
    """x (B, *data), and the position of its first sample among the `total` of the global batch (or validation set).

    `cond` (B, ...) is what each is asked to be, where the network is told. Until it is on the device a batch also says
    which samples could not be read and have others in their place, by name, and of what went wrong in a process that
    loads data: then it has no samples.
    """

    x: Tensor
    start: int
    total: int
    cond: NotRequired[Tensor]
    skipped: NotRequired[dict[str, str]]
    failure: NotRequired[str]


class BatchDataset(torch.utils.data.Dataset[Batch]):
    """A source whose items are whole batches, indexed by `BatchIndices`: one indexing operation where it is in memory.

    Samples that cannot be read have others in their place, from among `spare`; without these the batch says so.
    """

    def __init__(
        self,
        source: Source,
        condition: "Condition | None" = None,
        seed: int = 0,
        spare: Sequence[int] | None = None,
    ) -> None:
        self.source = source
        self.condition = condition
        self.seed = seed
        self.spare = spare

    def __getitem__(self, places: BatchIndices) -> Batch:
        batch: Batch = {"x": torch.empty(0), "start": places.start, "total": places.total}
        try:
            batch["x"], indices, skipped = fetch(self.source, places, self.seed, self.spare)
            if skipped:
                batch["skipped"] = skipped
            if self.condition is not None:
                batch["cond"] = self._asked(self.condition, places, indices)
        except DataReadError as error:  # not raised: of several processes all have to be told
            batch["failure"] = f"{error}: {_remedy(self.spare is not None)}"
        return batch

    def _asked(self, condition: "Condition", places: BatchIndices, indices: Sequence[int]) -> Tensor:
        """What the samples show, as the network takes it. Raises DataReadError if that cannot be had any more."""
        asked = [
            # Which of several captions is random, and belongs to the step and the position as all randomness does.
            condition.of(self.source, index, key(self.seed, "caption", places.step, places.start + k))
            for k, index in enumerate(indices)
        ]
        try:
            return condition(asked)
        except (OSError, ValueError) as error:  # such as an encoder whose cache and files are gone
            raise DataReadError(f"what samples show cannot be read ({' '.join(str(error).split())})") from error


def fetch(
    source: Source, places: BatchIndices, seed: int, spare: Sequence[int] | None
) -> tuple[Tensor, list[int], dict[str, str]]:
    """The samples of a source at some places (N, *data), which ones these are, and what was said of unreadable ones.

    Of samples that cannot be read others are taken, any of `spare`, by (seed, step, position) alone. Raises
    DataReadError without `spare`, or if `TRIES` of them cannot be read either.
    """
    indices = list(places.indices)
    try:
        return source.fetch(indices), indices, {}
    except DataReadError:
        if not spare:
            raise
    skipped: dict[str, str] = {}
    samples = []
    for k, first in enumerate(indices):
        position = places.start + k
        others = (spare[key(seed, "spare", places.step, position, turn) % len(spare)] for turn in range(TRIES))
        for index in chain([first], others):
            try:
                samples.append(source.fetch([index]))
                indices[k] = index
                break
            except DataReadError as error:
                skipped[error.name] = str(error)
                last = error
        else:
            raise DataReadError(f"{last}, nor can {TRIES} others in its place", last.name)
    return torch.cat(samples), indices, skipped


def _remedy(skips: bool) -> str:
    return "see that the data are still there" if skips else "restore or remove it, or add data.skip_unreadable=true"


class Loader(DataLoader[Batch]):
    """A DataLoader that gives a batch which says so, as its last, when a process that loads data has died.

    Torch would raise an error as soon as that happens, be it in the midst of the optimizer's step.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        in_main_thread = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGCHLD) if in_main_thread and hasattr(signal, "SIGCHLD") else None
        batches = super().__iter__()
        if before is not None:
            signal.signal(signal.SIGCHLD, before)  # then it looks when a batch does not come
        return self._guarded(batches)

    def _guarded(self, batches: Any) -> Iterator[Batch]:
        try:
            yield from batches
        except (RuntimeError, OSError, EOFError) as error:
            workers = getattr(batches, "_workers", [])
            for worker in workers:  # the connection to one that dies breaks a moment before
                worker.join(timeout=1)
            if all(worker.is_alive() for worker in workers):
                raise
            what = " ".join(str(error).split()) or type(error).__name__
            died = f"a process that loads data died ({what}), often for lack of memory: lower data.num_workers "
            yield {"x": torch.empty(0), "start": 0, "total": 0, "failure": f"{died}({self.num_workers} now)"}
