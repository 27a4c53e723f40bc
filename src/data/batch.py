"""The batch that flows through everything, the endless stream of batches, and the maps between ranges."""

import getpass
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NotRequired, Protocol, TypedDict

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from src.draws import Draws, key
from src.ranks import local_rank

if TYPE_CHECKING:
    from src.data.conditions import Condition

VALIDATION = -1
"""The step that validation's draws belong to: always the same, so that equal weights give equal figures."""


class Batch(TypedDict):
    """x (B, *data), and the position of its first sample among the `total` of the global batch (or validation set).

    `cond` (B, ...) is what each is asked to be, where the network is told.
    """

    x: Tensor
    start: int
    total: int
    cond: NotRequired[Tensor]


class Places(NamedTuple):
    """What a sampler asks of a dataset: the samples `indices`, the first at position `start` of `total` of a step."""

    start: int
    total: int
    indices: list[int]
    step: int = VALIDATION


class Labels(NamedTuple):
    """What kind each sample of a source is: `numbers` (N,) int64, which count through `names`."""

    numbers: Tensor
    names: Sequence[str]


class Given(NamedTuple):
    """What was measured beside each sample of a source: `values` (N, K) float32 of so many `names`."""

    values: Tensor
    names: Sequence[str]


class Source(Protocol):
    """Where samples come from, and what is known of them: their kinds, measurements, or texts that describe each."""

    labels: Labels | None
    given: Given | None
    captions: Sequence[Sequence[str]] | None

    def __len__(self) -> int: ...

    def fetch(self, indices: Sequence[int]) -> Tensor:
        """The samples as (N, *data)."""
        ...


class InMemory:
    """Samples (N, *data) in one tensor."""

    def __init__(
        self,
        samples: Tensor,
        labels: Labels | None = None,
        given: Given | None = None,
        captions: Sequence[Sequence[str]] | None = None,
    ) -> None:
        self.samples = samples
        self.labels = labels
        self.given = given
        self.captions = captions

    def __len__(self) -> int:
        return len(self.samples)

    def fetch(self, indices: Sequence[int]) -> Tensor:
        return self.samples[torch.as_tensor(indices)]


class BatchDataset(torch.utils.data.Dataset[Batch]):
    """A source whose items are whole batches, indexed by `Places`: one indexing operation where it is in memory."""

    def __init__(self, source: Source, condition: "Condition | None" = None, seed: int = 0) -> None:
        self.source = source
        self.condition = condition
        self.seed = seed

    def __getitem__(self, places: Places) -> Batch:
        batch: Batch = {"x": self.source.fetch(places.indices), "start": places.start, "total": places.total}
        if self.condition is not None:
            asked = [
                # Which of several captions is random, and belongs to the step and the position as all randomness does.
                self.condition.of(self.source, index, key(self.seed, "caption", places.step, places.start + k))
                for k, index in enumerate(places.indices)
            ]
            batch["cond"] = self.condition(asked)
        return batch


class TrainingStream(Sampler[Places]):
    """The batches of a whole run: step k takes samples k B .. (k + 1) B - 1 of one shuffled epoch after another.

    A pure function of (seed, step), cut first into `accumulate` micro-batches and these over `world` processes,
    so that neither changes what the optimizer sees. `first_step` is where a resumed run goes on. With `repeat` the
    first so many batches of the data come again and again.
    """

    def __init__(
        self,
        indices: Sequence[int],
        batch_size: int,
        num_steps: int,
        seed: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
        first_step: int = 0,
        repeat: int = 0,
    ) -> None:
        if accumulate < 1:
            raise ValueError(f"trainer.accumulate_grad_batches must be at least 1, got {accumulate}")
        if batch_size > len(indices):
            raise ValueError(
                f"data.batch_size {batch_size} is larger than the training data ({len(indices)} samples): lower it"
            )
        if batch_size % (accumulate * world):
            raise ValueError(
                f"data.batch_size {batch_size} is the global batch, and does not split over {world} processes with "
                f"{accumulate} accumulated batches each: make it a multiple of {accumulate * world}"
            )
        self.indices = torch.as_tensor(indices)
        self.batch_size = batch_size
        self.num_steps = num_steps
        self.seed = seed
        self.accumulate = accumulate
        self.rank = rank
        self.world = world
        self.first_step = first_step
        self.repeat = repeat

    def __len__(self) -> int:
        """The batches of the whole run, also when it was resumed: Lightning counts on from where it stopped."""
        return self.num_steps * self.accumulate

    def __iter__(self) -> Iterator[Places]:
        micro = self.batch_size // (self.accumulate * self.world)
        for step in range(self.first_step, self.num_steps):
            batch = self.batch(step)
            for part in range(self.accumulate):
                start = (part * self.world + self.rank) * micro
                yield Places(start, self.batch_size, batch[start : start + micro], step)

    def batch(self, step: int) -> list[int]:
        """The dataset indices of the global batch of `step`."""
        step = step % self.repeat if self.repeat else step
        epoch, offset = divmod(step * self.batch_size, len(self.indices))
        taken = self._epoch(epoch)[offset : offset + self.batch_size]
        if len(taken) < self.batch_size:
            taken = torch.cat([taken, self._epoch(epoch + 1)[: self.batch_size - len(taken)]])
        return taken.tolist()

    @lru_cache(maxsize=2)  # noqa: B019 - one stream lives as long as its run
    def _epoch(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(key(self.seed, "order", epoch))
        return self.indices[torch.randperm(len(self.indices), generator=generator)]


class ValidationStream(Sampler[Places]):
    """All `indices` once and in order, in batches of `batch_size` to twice that, dealt out over `world`.

    Every process has as many batches as every other, of which sharded weights are gathered together. `limit` is a
    number of them, or a share: the samples in these alone count as the validation set.
    """

    def __init__(
        self, indices: Sequence[int], batch_size: int, rank: int = 0, world: int = 1, limit: int | float = 1.0
    ) -> None:
        self.indices = list(indices)
        self.rounds = max(1, len(self.indices) // (world * batch_size))
        count = self.rounds * world
        edges = [k * len(self.indices) // count for k in range(count + 1)]
        kept = min(limit, self.rounds) if isinstance(limit, int) else int(limit * self.rounds)
        if kept == 0 < limit:
            raise ValueError(
                f"trainer.limit_val_batches={limit} (or trainer.overfit_batches) leaves none of {self.rounds} "
                f"validation batches: use at least {math.ceil(100 / self.rounds) / 100}, or a whole number"
            )
        self.total = edges[kept * world]
        self.spans = list(pairwise(edges))[rank : kept * world : world]

    def __len__(self) -> int:
        """The batches without a limit, of which Lightning takes the same share."""
        return self.rounds

    def __iter__(self) -> Iterator[Places]:
        for start, stop in self.spans:
            yield Places(start, self.total, self.indices[start:stop])


class StreamDataModule(L.LightningDataModule):
    """Training and validation batches from the source that `open_source` opens, split by seed.

    `shape` is that of one sample as the network sees it, known before any data are. `batch_size` is what the
    optimizer sees per step, whatever the number of devices and accumulation. `val_fraction` of the samples are
    held out; which ones depends on `split_seed` and never on the run's seed. `levels` is the number of values that
    the data can take, evenly over [-1, 1]; None if they are continuous. `micro_batch`, the samples in one forward pass
    on one device, is for what builds the Trainer: here it only has to be possible. With a `condition` batches say what
    each sample is asked to be.
    """

    levels: int | None = None
    deviation: Tensor | None = None
    """(D,) of samples in units of their own, as `to_display` gives them, by which figures make them comparable."""
    columns: Sequence[str] | None = None
    """(D,) names of what samples of numbers consist of."""
    condition: "Condition | None" = None
    overfit_batches: int | float = 0
    """The number of batches that are trained on again and again, or their share of the data; 0 for all data."""
    limit_val_batches: int | float = 1.0
    """The number of validation batches, or their share."""

    def __init__(
        self,
        open_source: Callable[[], Source],
        shape: tuple[int, ...],
        batch_size: int,
        val_fraction: float,
        split_seed: int,
        seed: int,
        num_workers: int,
        micro_batch: int | Literal["auto"] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(micro_batch, int) and not 1 <= micro_batch <= batch_size:
            raise ValueError(
                f"data.micro_batch must lie in [1, data.batch_size = {batch_size}], got {micro_batch}: auto finds one"
            )
        if batch_size < 1 or num_workers < 0 or not 0 < val_fraction < 1:
            raise ValueError(
                "needs data.batch_size >= 1, data.num_workers >= 0 and data.val_fraction in (0, 1), got "
                f"{batch_size}, {num_workers}, {val_fraction}"
            )
        self.open_source = open_source
        self.shape = shape
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.seed = seed
        self.num_workers = num_workers
        self.source: Source | None = None
        self.train_indices: list[int] = []
        self.val_indices: list[int] = []

    @property
    def found(self) -> Mapping[str, Any]:
        """Settings of its own that only the data tell, for the run's configuration, so that it needs no data later."""
        return {}

    def to_model(self, x: Tensor) -> Tensor:
        """Samples as the source has them -> float32 as the network sees them."""
        return x

    def to_display(self, x: Tensor) -> Tensor:
        """Samples as the network gives them -> what pictures and files show."""
        return x

    def augment(self, x: Tensor, draws: Draws) -> Tensor:
        """Random changes to training samples (B, *data), already as the network sees them."""
        return x

    def setup(self, stage: str | None = None) -> None:
        if self.source is not None:
            return
        source = self.open_source()
        num_val = round(self.val_fraction * len(source))
        if not 0 < num_val < len(source):
            raise ValueError(
                f"{len(source)} samples do not split into training and validation at data.val_fraction="
                f"{self.val_fraction}: use more data, or a fraction such as 0.2"
            )
        generator = torch.Generator().manual_seed(key(self.split_seed, "split"))
        order = torch.randperm(len(source), generator=generator).tolist()
        if self.condition is not None:
            self.condition.check(source)
        self.source, self.val_indices, self.train_indices = source, order[:num_val], order[num_val:]

    def stream(self, trainer: L.Trainer) -> TrainingStream:
        """The training batches of this process. Raises ValueError if the data do not go round the processes."""
        if len(self.val_indices) < trainer.world_size:
            raise ValueError(
                f"{len(self.val_indices)} held-out samples do not go round {trainer.world_size} processes: lower "
                "trainer.devices, or raise data.val_fraction"
            )
        repeat = self.overfit_batches
        if isinstance(repeat, float):
            repeat = int(share := repeat * len(self.train_indices) / self.batch_size)
            if repeat == 0 < share:
                raise ValueError(
                    f"trainer.overfit_batches={self.overfit_batches} of {len(self.train_indices)} samples is less than "
                    f"one batch: use a whole number, or lower data.batch_size ({self.batch_size})"
                )
        return TrainingStream(
            self.train_indices,
            self.batch_size,
            trainer.max_steps,
            self.seed,
            trainer.accumulate_grad_batches,
            trainer.global_rank,
            trainer.world_size,
            first_step=trainer.global_step,
            repeat=repeat,
        )

    def validation_stream(self, trainer: L.Trainer) -> ValidationStream:
        """The validation batches of this process. Raises ValueError if `limit_val_batches` leaves none."""
        size, limit = self.at_once(trainer), self.limit_val_batches
        return ValidationStream(self.val_indices, size, trainer.global_rank, trainer.world_size, limit)

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.stream(self._trainer()))

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.validation_stream(self._trainer()))

    def at_once(self, trainer: L.Trainer) -> int:
        """The samples in one forward pass of one process in training, for which its device has room."""
        return max(1, self.batch_size // (trainer.world_size * trainer.accumulate_grad_batches))

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        x = self.to_model(batch["x"])
        trainer = self._trainer()
        if trainer.training:
            x = self.augment(x, Draws(self.seed, trainer.global_step, batch["start"], len(x), x.device))
        return {**batch, "x": x}

    def examples(self, count: int) -> Tensor:
        """The first `count` held-out samples, as the network sees them: (N, *data)."""
        self.setup()
        return self.to_model(self._source().fetch(self.val_indices[:count]))

    def prepare_together(self) -> None:
        """Prepare and open the data before processes know of each other: the first of each machine prepares them.

        The others open what is there, or else wait for it.
        """
        from filelock import FileLock

        user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()  # a container's may have no name
        lock = FileLock(Path(tempfile.gettempdir()) / f"diffusion-data-{user}-{key(*self.shape):x}.lock")
        if local_rank() > 0:
            try:
                self.setup()
            except (FileNotFoundError, ValueError):  # not there yet, if it will ever be
                pass
            else:
                return
        with lock:
            self.prepare_data()
        self.setup()

    def titles(self, count: int) -> list[str] | None:
        """What the first samples show that are drawn when no one says what they should; None without a condition."""
        if self.condition is None:
            return None
        examples = self.condition.examples or [None]
        return [self.condition.title(examples[k % len(examples)]) for k in range(count)]

    def training_places(self, numbers: Sequence[int], seed: int) -> list[int]:
        """For samples to draw, number k among them, any training sample that they are to be like, by (seed, k)."""
        return [self.train_indices[key(seed, "condition", k) % len(self.train_indices)] for k in numbers]

    def _loader(self, stream: Sampler[Places]) -> DataLoader[Batch]:
        return DataLoader(
            BatchDataset(self._source(), self.condition, self.seed),
            sampler=stream,
            batch_size=None,  # the stream's items are batches already
            num_workers=self.num_workers,
            pin_memory=self._trainer().strategy.root_device.type == "cuda",
            persistent_workers=self.num_workers > 0,
        )

    def _source(self) -> Source:
        if self.source is None:
            raise RuntimeError("call setup() first")
        return self.source

    def _trainer(self) -> L.Trainer:
        if self.trainer is None:
            raise RuntimeError("loaders exist only inside a Trainer: they depend on its devices and steps")
        return self.trainer


def to_signed(x: Tensor, levels: int = 256) -> Tensor:
    """Integers 0..levels - 1 -> float32 in [-1, 1]."""
    return x.float() * (2 / (levels - 1)) - 1


def to_uint8(x: Tensor, levels: int = 256) -> Tensor:
    """Floats in [-1, 1] (clipped) -> the nearest of `levels` values, as uint8 0..255 for showing and saving."""
    index = ((x.float().clamp(-1, 1) + 1) * ((levels - 1) / 2)).round()
    return (index * (255 / (levels - 1))).round().to(torch.uint8)
