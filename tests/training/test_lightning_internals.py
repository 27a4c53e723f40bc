"""Lightning still has each undocumented attribute that the project uses, and it means what it did."""

from __future__ import annotations

import csv
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SRC = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not at collection."""
    global L, CSVLogger, TQDMProgressBar, DDPStrategy, SLURMEnvironment, internals, Linear
    import lightning as L
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.pytorch.callbacks import TQDMProgressBar
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.strategies import DDPStrategy

    from src.training import lightning_internals as internals

    class Linear(L.LightningModule):
        """One weight; logs the number of steps before each step, and validates on it."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def training_step(self, batch, batch_idx):
            self.log("train", float(self.global_step))
            return self.weight * batch.sum()

        def validation_step(self, batch, batch_idx):
            self.log("val", float(self.global_step))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, *callbacks, ckpt_path: Path | None = None, **settings) -> L.Trainer:
    """Train for `max_steps` of one number each, with a validation of two batches."""
    trainer = L.Trainer(
        accelerator="cpu", logger=CSVLogger(folder, name=""), default_root_dir=folder, callbacks=[*callbacks],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        **{"max_steps": 4, "log_every_n_steps": 1, "num_sanity_val_steps": 0, "min_epochs": 0, **settings},
    )  # fmt: skip
    loaders = [torch.utils.data.DataLoader(torch.ones(count, 1)) for count in (100, 2)]
    trainer.fit(Linear(), *loaders, ckpt_path=ckpt_path)
    return trainer


def logged(folder: Path, name: str) -> list[tuple[int, float]]:
    """Return (step, value) of a metric over all starts."""
    rows = [r for log in sorted(folder.glob("version_*/metrics.csv")) for r in csv.DictReader(log.open())]
    return [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]


def test_undocumented_attributes_occur_in_one_file_only():
    """By the names that this project has used, in code that imports lightning."""
    private = "results batches_that_stepped broadcast_sigterm accelerator_connector start_method train_progress_bar"
    names = "|".join([rf"\._({'|'.join(private.split())})", "child-process-observer", "fit_loop"])
    users = {p.name for p in SRC.rglob("*.py") if re.search(names, p.read_text())}
    assert users == {"lightning_internals.py"}


def test_cleared_metrics_are_not_logged_again(tmp_path):
    class Clear(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            internals.clear_logged_metrics(trainer)
            assert not trainer.callback_metrics.get("train", torch.zeros(())).isnan()

        def on_train_batch_end(self, trainer, *_):
            assert trainer._results

    fit(tmp_path, Clear())
    assert logged(tmp_path, "train") == [(k, float(k)) for k in range(4)]


@pytest.fixture
def saved(tmp_path):
    """Return a checkpoint saved at the start of the third step."""

    class Stop(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 2:
                internals.mark_step_completed(trainer)
                trainer.save_checkpoint(tmp_path / "a.ckpt")
                raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        fit(tmp_path, Stop())
    return tmp_path / "a.ckpt"


def test_counted_step_resumes_at_the_next_one(saved):
    class Correct(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            internals.correct_logged_step(trainer)

    assert fit(saved.parent, Correct(), ckpt_path=saved).global_step == 4
    assert logged(saved.parent, "train") == [(k, float(k)) for k in range(4)]


def test_extra_validation_is_logged_at_the_last_step(saved):
    class Validate(L.Callback):
        def on_train_start(self, trainer, pl_module):
            internals.run_validation(trainer)
            assert trainer.training

        def on_validation_epoch_end(self, trainer, pl_module):
            assert internals.logged_step(trainer) == 1

    fit(saved.parent, Validate(), ckpt_path=saved, val_check_interval=100)
    assert logged(saved.parent, "val") == [(1, 2.0)]


def test_training_stops_before_min_steps(tmp_path):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            internals.stop_training(trainer)

    assert fit(tmp_path, Stop(), min_steps=3).global_step == 1


def test_training_ends_at_a_lowered_number_of_steps(tmp_path):
    class Lower(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            internals.set_max_steps(trainer, 3)

    trainer = fit(tmp_path, Lower())
    assert trainer.global_step == trainer.max_steps == 3


def test_sigterm_broadcast_is_disabled(tmp_path, monkeypatch):
    trainer = L.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    loop = trainer.fit_loop.epoch_loop
    assert callable(loop._broadcast_sigterm_tensor)
    internals.disable_sigterm_broadcast(trainer)
    assert loop._broadcast_sigterm_tensor() is None


def test_slurm_does_not_requeue():
    environment = SLURMEnvironment()
    assert environment.auto_requeue
    internals.disable_slurm_requeue(
        SimpleNamespace(_accelerator_connector=SimpleNamespace(cluster_environment=environment))
    )
    assert not environment.auto_requeue
    assert hasattr(L.Trainer(accelerator="cpu", logger=False)._accelerator_connector, "cluster_environment")


def test_child_process_observer_is_stopped():
    """Lightning's thread would kill this process when a child ends with an error."""
    from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver

    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    observer = _ChildProcessObserver(main_pid=0, child_processes=[child])
    observer.start()
    try:
        internals.wait_for_children()
        assert observer._child_processes == []
    finally:
        child.kill()
        child.wait()


def test_copied_processes_are_recognized():
    assert internals.copies_this_process(DDPStrategy(start_method="fork"))
    assert not internals.copies_this_process(DDPStrategy())


def test_progress_bars_are_closed():
    progress = TQDMProgressBar()
    progress.train_progress_bar = progress.init_train_tqdm()
    internals.close_progress_bars(progress)
    assert progress.train_progress_bar.disable and progress._val_progress_bar is None
    assert math.isfinite(progress.refresh_rate)
