"""The base data module.

A sample takes this path from a dataset to the training step:

source.fetch (loader process) -> BatchDataset -> transfer to the device -> preprocess -> augment -> training_step
"""

import getpass
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from src.data.batches import Batch, BatchDataset, BatchLoader, fetch_batch
from src.data.conditions import Condition
from src.data.read_errors import ReadErrors, read_error_hint
from src.data.samplers import BatchIndices, EvalBatchSampler, InfiniteBatchSampler
from src.data.sources import InMemory, Source
from src.data.split import DataFingerprint, hash_ids, hash_threshold, sample_ids, split, split_by_mask
from src.distributed.ranks import local_rank, rank
from src.errors import DataReadError, counted
from src.rng import StepRng, key

Coupling = Literal["independent", "ot"]
"""How training pairs samples with noise; see `src.training.coupling`."""


class BaseDataModule(L.LightningDataModule):
    """Training and validation batches from the source that `open_source` returns.

    Args:
        open_source: opens the dataset.
        shape: shape of one sample, as input of the network.
        batch_size: samples per optimizer step, over all devices and accumulated batches.
        val_fraction: approximate fraction of the samples held out for validation.
        split_seed: determines the split, together with the sample ids (`src.data.split`); the run's seed does not.
        seed: for shuffling and augmentation.
        num_workers: processes that load data.
        microbatch_size: samples per device and forward pass. The Trainer's builder applies it.
        skip_unreadable: replace samples that cannot be read by others, instead of failing.
    """

    num_values: int | None = None
    """The number of values, evenly spaced over [-1, 1], that the data can take; None if continuous."""
    std: Tensor | None = None
    """(D,) standard deviation of postprocessed samples, used to scale samples in metrics."""
    columns: Sequence[str] | None = None
    """(D,) names of the features of a sample."""
    condition: Condition | None = None
    overfit_batches: int | float = 0
    """The number of batches to repeat, or the fraction of the data; 0 trains on all data."""
    fingerprint_path: Path | None = None
    """The `DataFingerprint` of the run that is resumed or opened."""
    limit_val_batches: int | float = 1.0
    """The number of validation batches, or a fraction of them."""
    augment_labels: int = 0
    """The number of labels that `augment` returns; 0 for none."""
    balance_classes: bool = False
    """Whether each training sample comes from a class that is drawn uniformly."""
    coupling: Coupling = "independent"
    threshold: int | None = None
    """The hash that divides validation from training samples; None if the source defines the split."""
    inferred_settings: ClassVar[Sequence[str]] = ()
    """The names in `inferred`, which a resumed run takes from its checkpoint."""

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
        if batch_size < 1:
            raise ValueError(f"data.batch_size={batch_size} must be at least 1")
        if isinstance(microbatch_size, int) and not 1 <= microbatch_size <= batch_size:
            raise ValueError(
                f"data.microbatch_size={microbatch_size} must be in [1, {batch_size}], at most data.batch_size; "
                "auto finds the largest that fits"
            )
        if num_workers < 0:
            raise ValueError(f"data.num_workers={num_workers} must be at least 0")
        if not 0 < val_fraction < 1:
            raise ValueError(f"data.val_fraction={val_fraction} must be in (0, 1)")
        self.open_source = open_source
        self.shape = shape
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.seed = seed
        self.num_workers = num_workers
        self.skip_unreadable = skip_unreadable
        self.read_errors = ReadErrors()
        self.source: Source | None = None
        self.train_indices: list[int] = []
        self.val_indices: list[int] = []

    @property
    def inferred(self) -> Mapping[str, Any]:
        """Settings computed from the data. A run stores them, so that it does not need the data later."""
        return {}

    # From the source to a batch on the device

    def setup(self, stage: str | None = None) -> None:
        """Open and split the source, once."""
        if self.source is not None:
            return
        source = self.open_source()
        before = DataFingerprint.read(self.fingerprint_path) if self.fingerprint_path else None
        threshold = hash_threshold(self.val_fraction)
        settings = (self.split_seed, self.val_fraction)
        if before and before.bound is not None and (before.split_seed, before.val_fraction) == settings:
            threshold = before.bound
        hashes = hash_ids(sample_ids(source), self.split_seed)
        try:
            if (mask := getattr(source, "val_mask", None)) is None:
                val, train, self.threshold = split(hashes, threshold)
            else:
                val, train, self.threshold = *split_by_mask(hashes, mask), None
        except ValueError as error:
            raise ValueError(
                f"data.val_fraction={self.val_fraction} cannot split {counted(len(source), 'sample')} ({error}); "
                "use more data"
            ) from error
        if self.condition is not None:
            self.condition.check(source)
        if before and rank() == 0 and (changes := before.changes(source, val)):
            warnings.warn(changes, stacklevel=2)
        self.source, self.val_indices, self.train_indices = source, val, train

    def train_sampler(self, trainer: L.Trainer) -> InfiniteBatchSampler:
        """Return the training batches of this process. Raises ValueError if there are too few validation samples."""
        if len(self.val_indices) < trainer.world_size:
            raise ValueError(
                f"{trainer.world_size} processes need at least {trainer.world_size} validation samples, found "
                f"{len(self.val_indices)}; lower trainer.devices, or raise data.val_fraction"
            )
        repeat, indices = self.overfit_batches, self.training_indices()
        if isinstance(repeat, float):
            repeat = int(share := repeat * len(indices) / self.batch_size)
            if repeat == 0 < share:
                raise ValueError(
                    f"trainer.overfit_batches={self.overfit_batches} of {len(indices)} samples is less than "
                    f"one batch; use an integer, or lower data.batch_size ({self.batch_size})"
                )
        buckets = getattr(self._source(), "buckets", None)
        return InfiniteBatchSampler(
            indices,
            self.batch_size,
            trainer.max_steps,
            self.seed,
            trainer.accumulate_grad_batches,
            trainer.global_rank,
            trainer.world_size,
            first_step=trainer.global_step,
            repeat=repeat,
            classes=self._classes_of(indices) if self.balance_classes else None,
            buckets=None if buckets is None else buckets[indices],
        )

    def training_indices(self) -> list[int]:
        """Return the samples of one epoch of training, of which some may occur several times."""
        return self.train_indices

    def _classes_of(self, indices: Sequence[int]) -> Tensor:
        """Return the class of each of `indices` (N,). Raises ValueError for data without classes."""
        if (labels := self._source().labels) is None:
            raise ValueError(
                "data.balance_classes=true needs data with classes; leave it out, or add classes "
                "(data.label=... of a table)"
            )
        return labels.targets[indices]

    def val_sampler(self, trainer: L.Trainer) -> EvalBatchSampler:
        """Return the validation batches of this process. Raises ValueError if `limit_val_batches` leaves none."""
        size, limit = self.microbatch_size(trainer), self.limit_val_batches
        return EvalBatchSampler(self.val_indices, size, trainer.global_rank, trainer.world_size, limit)

    def microbatch_size(self, trainer: L.Trainer) -> int:
        """Return the number of samples in one forward pass of one process in training."""
        return max(1, self.batch_size // (trainer.world_size * trainer.accumulate_grad_batches))

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.train_sampler(self._trainer()), self.train_indices)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.val_sampler(self._trainer()), self.val_indices)

    def _loader(self, sampler: Sampler[BatchIndices], replacements: Sequence[int]) -> DataLoader[Batch]:
        return BatchLoader(
            BatchDataset(self._source(), self.condition, self.seed, replacements if self.skip_unreadable else None),
            sampler=sampler,
            batch_size=None,  # the sampler yields batches
            num_workers=self.num_workers,
            pin_memory=self._trainer().strategy.root_device.type == "cuda",
            persistent_workers=self.num_workers > 0,
        )

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        self.read_errors.skipped |= batch.pop("skipped", {})
        self.sync_read_errors(batch.pop("failure", ""))
        x = self.preprocess(batch["x"])
        trainer = self._trainer()
        if not trainer.training:
            return {**batch, "x": x}
        x, labels = self.augment(x, StepRng(self.seed, trainer.global_step, batch["start"], len(x), x.device))
        return {**batch, "x": x} if labels is None else {**batch, "x": x, "augment": labels}

    def preprocess(self, x: Tensor) -> Tensor:
        """Map samples of the source to float32 inputs of the network."""
        return x

    def augment(self, x: Tensor, rng: StepRng) -> tuple[Tensor, Tensor | None]:
        """Augment preprocessed training samples (B, *data) randomly; also return labels of changes for the network.

        Samples drawn with labels 0 (B, augment_labels) do not show these changes.
        """
        return x, None

    def postprocess(self, x: Tensor) -> Tensor:
        """Map samples of the network to the form that is displayed and saved."""
        return x

    def denormalize(self, x: Tensor) -> Tensor:
        """Map samples of the network to the range and units of the data, in which they are saved."""
        return self.postprocess(x)

    def display(self, samples: Tensor) -> Tensor:
        """Map samples from `denormalize` to the form that is displayed."""
        return samples

    # Samples of a network that are displayed in another space than its own, such as latents

    @property
    def displayed(self) -> "BaseDataModule":
        """The data in whose space samples are displayed and compared: this, or the images of latents."""
        return self

    def decode(self, x: Tensor) -> Tensor:
        """Map samples of the network to preprocessed samples of `displayed`."""
        return x

    def displayed_examples(self, count: int) -> Tensor:
        """Return the first `count` validation samples, postprocessed."""
        return self.postprocess(self.examples(count))

    # Samples outside the loaders

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Return samples of the source (N, *data) from one split, and their indices.

        With `skip_unreadable`, other samples of the same split replace those that cannot be read.
        """
        replacements = None
        if self.skip_unreadable and len(indices):
            replacements = self.val_indices if indices[0] in self.val_indices else self.train_indices
        wanted = BatchIndices(0, len(indices), list(indices))
        x, used, skipped = fetch_batch(self._source(), wanted, self.seed, replacements)
        self.read_errors.skipped |= skipped
        return x, used

    def examples(self, count: int) -> Tensor:
        """Return the first `count` validation samples, preprocessed (N, *data)."""
        self.setup()
        return self.preprocess(self.fetch(self.val_indices[:count])[0])

    def titles(self, count: int) -> list[str] | None:
        """Return titles of the first samples drawn with the condition's examples; None without a condition."""
        if self.condition is None:
            return None
        examples = self.condition.examples or [None]
        return [self.condition.title(examples[k % len(examples)]) for k in range(count)]

    def condition_indices(self, sample_numbers: Sequence[int], seed: int) -> list[int]:
        """Return a random training sample, keyed by (seed, number), to provide the condition of each sample to draw."""
        return [self.train_indices[key(seed, "condition", k) % len(self.train_indices)] for k in sample_numbers]

    # Preparation, and agreement between processes

    def prepare_once_per_node(self) -> None:
        """Prepare and open the data before processes can communicate. The first process of each machine prepares.

        The others open prepared data, or wait.
        """
        from filelock import FileLock

        user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()  # users in containers may have no name
        lock = FileLock(Path(tempfile.gettempdir()) / f"diffusion-data-{user}-{key(*self.shape):x}.lock")
        if local_rank() > 0:
            with suppress(FileNotFoundError, ValueError):  # not prepared yet, or wrong settings
                self.setup()
                return
        with lock:
            self.prepare_data()
        self.setup()

    def write_fingerprint(self, path: Path) -> None:
        """Write the `DataFingerprint` with which a resumed run detects changes of its data."""
        DataFingerprint.of(self._source(), self.split_seed, self.val_fraction, self.threshold).write(path)

    def sync_read_errors(self, failure: str = "") -> None:
        """Raise DataReadError in all processes if any has a `failure`; else warn about skipped samples.

        Every process of the run must call it.
        """
        world_size = self.trainer.world_size if self.trainer else 1
        in_memory = self.num_workers == 0 and isinstance(self.source, InMemory) and self.condition is None
        self.read_errors.sync(failure, 1 if in_memory else world_size)  # data in memory cannot fail

    @contextmanager
    def reading_on_one_rank(self) -> Iterator[None]:
        """Raise in all processes if data cannot be read in one of them within this block. All must enter it."""
        failure = ""
        try:
            yield
        except DataReadError as error:
            failure = f"{error}; {read_error_hint(self.skip_unreadable)}"
        self.sync_read_errors(failure)

    def state_dict(self) -> dict[str, Any]:
        return {"unreadable": sorted(self.read_errors.names)} if self.read_errors.names else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.read_errors.names |= {*state_dict["unreadable"]}

    def _source(self) -> Source:
        if self.source is None:
            raise RuntimeError("call setup() first")
        return self.source

    def _trainer(self) -> L.Trainer:
        if self.trainer is None:
            raise RuntimeError("loaders need a Trainer: they depend on its devices and steps")
        return self.trainer
