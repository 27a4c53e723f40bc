"""The base data module."""

import getpass
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from src.data.batches import Batch, BatchDataset, Loader, _remedy, fetch
from src.data.samplers import BatchIndices, EvalBatchSampler, InfiniteBatchSampler
from src.data.sources import InMemory, Source
from src.data.split import Record, bound_of, hash_ids, ids_of, split
from src.distributed.ranks import local_rank, rank
from src.errors import DataReadError
from src.rng import StepRng, key

if TYPE_CHECKING:
    from src.data.conditions import Condition


class BaseDataModule(L.LightningDataModule):
    """Training and validation batches from the source that `open_source` opens, split by seed.

    `shape` is that of one sample as the network sees it, known before any data are. `batch_size` is what the
    optimizer sees per step, whatever the number of devices and accumulation. About `val_fraction` of the samples are
    held out; which ones depends on `split_seed` and on what each is known by (`src.data.split`), never on the run's
    seed. `num_values` is the number of values that the data can take, evenly over [-1, 1]; None if they are continuous.
    `microbatch_size`, the samples in one forward pass on one device, is for what builds the Trainer: here it only has to be
    possible. With a `condition` batches say what each sample is asked to be.
    """

    num_values: int | None = None
    std: Tensor | None = None
    """(D,) of samples in units of their own, as `postprocess` gives them, by which figures make them comparable."""
    columns: Sequence[str] | None = None
    """(D,) names of what samples of numbers consist of."""
    condition: "Condition | None" = None
    overfit_batches: int | float = 0
    """The number of batches that are trained on again and again, or their share of the data; 0 for all data."""
    record_path: Path | None = None
    """Where a run that goes on, or is opened, has the record of the data that it began with."""
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
        microbatch_size: int | Literal["auto"] | None = None,
        skip_unreadable: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(microbatch_size, int) and not 1 <= microbatch_size <= batch_size:
            raise ValueError(
                f"data.microbatch_size must lie in [1, data.batch_size = {batch_size}], got {microbatch_size}: auto finds one"
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
        self.skip_unreadable = skip_unreadable
        self.unreadable: set[str] = set()
        """Names of samples that could not be read so far and had others in their place."""
        self._skipped: dict[str, str] = {}
        """Those of which the other processes have not been told, and what was said of them."""
        self._talk: Any = None
        """The group of processes in which they tell each other, without waiting for their devices."""
        self.source: Source | None = None
        self.train_indices: list[int] = []
        self.val_indices: list[int] = []

    @property
    def found(self) -> Mapping[str, Any]:
        """Settings of its own that only the data tell, for the run's configuration, so that it needs no data later."""
        return {}

    def preprocess(self, x: Tensor) -> Tensor:
        """Samples as the source has them -> float32 as the network sees them."""
        return x

    def postprocess(self, x: Tensor) -> Tensor:
        """Samples as the network gives them -> what pictures and files show."""
        return x

    def augment(self, x: Tensor, rng: StepRng) -> Tensor:
        """Random changes to training samples (B, *data), already as the network sees them."""
        return x

    def setup(self, stage: str | None = None) -> None:
        if self.source is not None:
            return
        source = self.open_source()
        record = Record.read(self.record_path) if self.record_path else None
        bound = bound_of(self.val_fraction)
        if record and (record.split_seed, record.val_fraction) == (self.split_seed, self.val_fraction):
            bound = record.bound
        try:
            val, train, self.bound = split(hash_ids(ids_of(source), self.split_seed), bound)
        except ValueError as error:
            raise ValueError(
                f"{len(source)} samples do not split into training and validation at data.val_fraction="
                f"{self.val_fraction} ({error}): use more data"
            ) from error
        if self.condition is not None:
            self.condition.check(source)
        if record and rank() == 0 and (changes := record.changes(source, val)):
            warnings.warn(changes, stacklevel=2)
        self.source, self.val_indices, self.train_indices = source, val, train

    def write_record(self, path: Path) -> None:
        """Write down which samples there are and which are held out, against which a resumed run sees changes."""
        Record.of(self._source(), self.split_seed, self.val_fraction, self.bound).write(path)

    def stream(self, trainer: L.Trainer) -> InfiniteBatchSampler:
        """The training batches of this process. Raises ValueError if there are too few validation samples."""
        if len(self.val_indices) < trainer.world_size:
            raise ValueError(
                f"{trainer.world_size} processes need at least {trainer.world_size} validation samples, found "
                f"{len(self.val_indices)}: lower "
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
        return InfiniteBatchSampler(
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

    def validation_stream(self, trainer: L.Trainer) -> EvalBatchSampler:
        """The validation batches of this process. Raises ValueError if `limit_val_batches` leaves none."""
        size, limit = self.microbatch_size(trainer), self.limit_val_batches
        return EvalBatchSampler(self.val_indices, size, trainer.global_rank, trainer.world_size, limit)

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.stream(self._trainer()), self.train_indices)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.validation_stream(self._trainer()), self.val_indices)

    def microbatch_size(self, trainer: L.Trainer) -> int:
        """The samples in one forward pass of one process in training, for which its device has room."""
        return max(1, self.batch_size // (trainer.world_size * trainer.accumulate_grad_batches))

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        self._skipped |= batch.pop("skipped", {})
        self.agree(batch.pop("failure", ""))
        x = self.preprocess(batch["x"])
        trainer = self._trainer()
        if trainer.training:
            x = self.augment(x, StepRng(self.seed, trainer.global_step, batch["start"], len(x), x.device))
        return {**batch, "x": x}

    def agree(self, failure: str = "") -> None:
        """Raise DataReadError in all processes if there was a `failure` in any; else warn of what each has skipped.

        Of several processes all must take part.
        """
        count = self.trainer.world_size if self.trainer else 1
        in_memory = self.num_workers == 0 and isinstance(self.source, InMemory) and self.condition is None
        # Data in memory do not fail.
        told = [(failure, self._skipped)] if count == 1 or in_memory else self._tell(failure, count)
        if failure := next((each for each, _ in told if each), ""):
            raise DataReadError(failure, everywhere=True)
        for _, skipped in told:
            self._skipped = self._skipped | skipped
        self.warn_of_skipped()

    def warn_of_skipped(self) -> None:
        """Once of each sample that has another in its place."""
        new = {name: said for name, said in self._skipped.items() if name not in self.unreadable}
        self.unreadable |= new.keys()
        self._skipped = {}
        for said in new.values():
            warnings.warn(f"{said}: another sample takes its place", stacklevel=2)

    def _tell(self, failure: str, count: int) -> list[tuple[str, dict[str, str]]]:
        """What each of `count` processes has to tell; what is passed on each time is only whether any has something."""
        from torch import distributed

        if self._talk is None:
            self._talk = distributed.new_group(backend="gloo")
        any_news = torch.tensor(int(bool(failure or self._skipped)))
        distributed.all_reduce(any_news, distributed.ReduceOp.MAX, self._talk)
        told: list[Any] = [("", {})] * count
        if any_news:
            distributed.all_gather_object(told, (failure, self._skipped), self._talk)
        return told

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within this some processes read data by themselves: if one cannot, all raise. All must take part."""
        failure = ""
        try:
            yield
        except DataReadError as error:
            failure = f"{error}: {_remedy(self.skip_unreadable)}"
        self.agree(failure)

    def state_dict(self) -> dict[str, Any]:
        return {"unreadable": sorted(self.unreadable)} if self.unreadable else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.unreadable |= {*state_dict["unreadable"]}

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Samples of one side of the split as the source has them, (N, *data), and which ones these are.

        With `skip_unreadable` others of that side take the place of those that cannot be read.
        """
        spare = None
        if self.skip_unreadable and len(indices):
            spare = self.val_indices if indices[0] in self.val_indices else self.train_indices
        places = BatchIndices(0, len(indices), list(indices))
        x, used, skipped = fetch(self._source(), places, self.seed, spare)
        self._skipped |= skipped
        return x, used

    def held_out(self, count: int) -> tuple[Tensor, list[int]]:
        """The first `count` held-out samples, as the network sees them: (N, *data), and which ones these are."""
        self.setup()
        x, indices = self.fetch(self.val_indices[:count])
        return self.preprocess(x), indices

    def examples(self, count: int) -> Tensor:
        """The first `count` held-out samples, as the network sees them: (N, *data)."""
        return self.held_out(count)[0]

    def prepare_once_per_node(self) -> None:
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

    def _loader(self, stream: Sampler[BatchIndices], spare: Sequence[int]) -> DataLoader[Batch]:
        return Loader(
            BatchDataset(self._source(), self.condition, self.seed, spare if self.skip_unreadable else None),
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
