"""Files deleted or damaged during a run: a one-line error, the last step saved, and equal results after resuming."""

import errno
import json
import math
import os
import pickle
import shutil
import signal
import warnings
from collections.abc import Callable
from multiprocessing import active_children
from pathlib import Path
from typing import ClassVar

import lightning as L
import pytest
import torch
from PIL import Image

from src.config.search_path import CONF
from src.data import read_errors
from src.data.batches import BatchDataset, fetch_batch
from src.data.conditions import Classes
from src.data.fit import ImageSpec
from src.data.folder import folder
from src.data.image_source import ImageSource
from src.data.images import ImageFiles
from src.data.samplers import BatchIndices
from src.errors import DataReadError, UsageError, data_errors
from src.evaluate import evaluate
from src.runs.nodes import instantiate_node
from src.training.checkpoints import read_checkpoint
from tests.conftest import LOSS_BY_NOISE, TINY, compose, once, train_tiny
from tests.data.test_split import write_images
from tests.fork_server import run_ranks
from tests.integration.test_stopping import assert_same_results
from tests.runs.test_runs import assert_equal_bits, weights

SETTINGS = [
    *("data=folder", "data.image_size=8", "data.batch_size=4", "data.val_fraction=0.3", "data.num_workers=0"),
    "data.cache=false",
    LOSS_BY_NOISE,
    *("trainer.max_steps=8", "validate_every=4", "trainer.accumulate_grad_batches=2", "model.dropout=0.2"),
]


class Act(L.Callback):
    """Calls `action` after `step` with the files of the batch `ahead` steps later, or of validation (ahead=0)."""

    action: ClassVar[Callable[[L.Trainer, list[Path]], object]]

    def __init__(self, step: int, ahead: int = 1) -> None:
        self.step = step
        self.ahead = ahead
        self.done = False

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step and not self.done:
            self.done = True
            data = trainer.datamodule
            indices = trainer.train_dataloader.sampler.batch(self.step + self.ahead - 1)
            type(self).action(trainer, [file_of(data.source, i) for i in (indices if self.ahead else data.val_indices)])


class RemoveOn(L.Callback):
    """On rank 1, removes a file of the next micro-batch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 5 and (batch_idx + 1) % 2 == 0 and trainer.global_rank == 1:
            # Rank 1's part of the second micro-batch.
            file = file_of(trainer.datamodule.source, trainer.train_dataloader.sampler.batch(5)[3])
            file.rename(file.with_suffix(".deleted"))


def act(step: int, ahead: int = 1) -> list[str]:
    """Return overrides that add the callback `Act`."""
    node = f"{{_target_: {__name__}.Act, step: {step}, ahead: {ahead}}}"
    return [f"+callbacks.act={node}"]


def root_of(path: Path) -> list[str]:
    return [*SETTINGS, f"data.root='{path}'"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Images that no test changes."""
    root = tmp_path_factory.mktemp("photos")
    write_images(root)
    return root


@pytest.fixture(scope="module")
def undisturbed(photos, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    train_tiny(run, *root_of(photos))
    return run


@pytest.fixture
def copied(photos, tmp_path) -> Path:
    return Path(shutil.copytree(photos, tmp_path / "copied"))


def restore(photos: Path, copied: Path) -> None:
    """Restore all images."""
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(photos, copied)


def deleted(path: Path) -> None:
    path.unlink()


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("not found")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def file_of(source: ImageSource, index: int) -> Path:
    return source.found.root / source.found.names[index]


DAMAGES = [deleted, truncated, empty, text, a_folder, a_loop]


def test_every_damage_raises_and_names_the_file(copied):
    """Other files stay readable, including those of another size and mode."""
    source = folder(str(copied), 8, 3, cache=False)
    before = source.fetch([0])
    for k, damage in enumerate(DAMAGES, 1):
        damage(file_of(source, k))
        with pytest.raises(DataReadError) as error:
            source.fetch([0, k, 7])
        assert str(error.value).startswith(f"{file_of(source, k)} cannot be read (") and "\n" not in str(error.value)
        assert error.value.name == str(file_of(source, k))
        again = pickle.loads(pickle.dumps(error.value))
        assert (str(again), again.name, again.everywhere) == (str(error.value), error.value.name, False)
    jpeg = file_of(source, 8).with_suffix(".jpg")
    Image.new("RGB", (64, 64), "red").save(jpeg, quality=95)
    jpeg.write_bytes(jpeg.read_bytes()[:-200])
    jpeg.rename(file_of(source, 8))
    with pytest.raises(DataReadError, match=str(file_of(source, 8))):
        source.fetch([8])
    Image.new("LA", (30, 20), (10, 255)).save(file_of(source, 9))
    assert source.fetch([9]).unique().tolist() == [10]
    assert torch.equal(source.fetch([0]), before)
    with pytest.raises(UsageError, match="restore or remove it"), data_errors():
        source.fetch([1])


def test_transient_errors_are_retried(monkeypatch):
    """Two transient errors lead to the image, more to an error; permanent errors are not retried."""
    monkeypatch.setattr(read_errors, "RETRY_DELAYS", (0.0, 0.0, 0.0))
    for number, transient in ((errno.ETIMEDOUT, True), (errno.ESTALE, True), (errno.EIO, True), (errno.EACCES, False)):
        calls: list[int] = []

        def opened(i: int, number: int = number, calls: list[int] = calls) -> Image.Image:
            calls.append(i)
            if i == 1 or (i == 0 and len(calls) <= 2):
                raise OSError(number, os.strerror(number), "a.png")
            return Image.new("L", (8, 8), 77)

        source = ImageFiles(opened, 3, ImageSpec((8, 8), 1))
        if transient:
            assert source.fetch([0, 2]).unique().tolist() == [77]
            assert calls == [0, 0, 0, 2]
        calls.clear()
        with pytest.raises(DataReadError, match=rf"image 1 cannot be read \({os.strerror(number)}\)"):
            source.fetch([1])
        assert len(calls) == (4 if transient else 1)


def test_unreadable_samples_are_replaced(copied):
    """Replacements depend only on (seed, step, position); the other samples do not change."""
    source = folder(str(copied), 8, 3, cache=False)
    replacements = list(range(4, 12))
    whole = source.fetch(range(24))
    for k in (1, 5, 6):
        deleted(file_of(source, k))
    wanted = BatchIndices(8, 16, [0, 1, 2, 5, 6], 3)
    x, used, skipped = fetch_batch(source, wanted, 7, replacements)
    assert torch.equal(x, whole[used])
    assert used[0] == 0 and used[2] == 2 and {used[1], used[3], used[4]} <= {*replacements} - {5, 6}
    assert {str(file_of(source, k)) for k in (1, 5, 6)} == {*skipped}
    assert fetch_batch(source, BatchIndices(9, 16, [1], 3), 7, replacements)[1] == [
        used[1]
    ]  # independent of the micro-batch
    drawn = [
        fetch_batch(source, BatchIndices(0, 1, [1], step), seed, replacements)[1][0]
        for step in range(9)
        for seed in range(9)
    ]
    assert len({*drawn}) > 3
    for k in replacements:
        file_of(source, k).unlink(missing_ok=True)
    with pytest.raises(DataReadError, match="nor can 10 other samples"):
        fetch_batch(source, wanted, 7, replacements)
    batch = BatchDataset(source, None, 7, replacements)[wanted]
    assert "nor can 10 other samples" in batch["failure"] and "\n" not in batch["failure"]


def test_a_failing_condition_fails_the_batch(copied):
    """Such as a pretrained encoder whose cache and files were deleted."""

    class Broken(Classes):
        def __call__(self, values):
            raise OSError(errno.ENOENT, "No such file or directory", "model.safetensors")

    source = folder(str(copied), 8, 3, cache=False)
    batch = BatchDataset(source, Broken(["cats", "dogs"]))[BatchIndices(0, 2, [0, 1])]
    assert "model.safetensors" in batch["failure"] and "\n" not in batch["failure"]
    assert "failure" not in BatchDataset(source, Classes(["cats", "dogs"]))[BatchIndices(0, 2, [0, 1])]


def quietly(run: Path, *overrides: str) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train_tiny(run, *overrides)


def refused(run: Path, *overrides: str) -> str:
    with pytest.raises(UsageError) as error:
        quietly(run, *overrides)
    message = str(error.value)
    assert "\n" not in message and f"python -m src.train resume={run}" in message, message
    assert not (run / "metrics.json").exists()
    return message


def saved_step(run: Path) -> int:
    checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt")
    return int(checkpoint["global_step"])


def test_a_run_with_failing_data_saves_and_resumes(photos, copied, undisturbed, tmp_path):
    """In the second micro-batch, at the last step, in validation, with and without workers."""
    cases = {
        "part": (5, 1, 0, lambda files: truncated(files[3]), 5),
        "last": (7, 1, 0, lambda files: empty(files[1]), 7),
        "validation": (4, 0, 0, lambda files: a_folder(files[-1]), 4),
        "all": (2, 1, 0, lambda files: shutil.rmtree(copied), 2),
        "workers": (1, 6, 2, lambda files: deleted(files[2]), None),
    }
    for name, (step, ahead, workers, damage, wanted) in cases.items():
        restore(photos, copied)
        run = tmp_path / name
        named: list[Path] = []

        def action(_, files, damage=damage, named=named):
            named += files
            damage(files)

        Act.action = staticmethod(action)
        settings = [*root_of(copied), f"data.num_workers={workers}"]
        message = refused(run, *settings, *act(step, ahead))
        assert any(str(file) in message for file in named), name
        saved = saved_step(run)
        # Batches that workers read before the damage are used; the file is in the batch of step 7.
        assert saved == wanted if wanted is not None else 1 < saved <= 6, name
        assert f"saved at step {saved}" in message
        restore(photos, copied)
        quietly(run, *settings, f"resume='{run}'")
        assert_same_results(run, undisturbed)
        table = "loss_by_noise.csv"
        assert (run / table).read_text() == (undisturbed / table).read_text(), name


def test_a_killed_worker_ends_the_run_saved(photos, undisturbed, tmp_path):
    """The run stops between steps, whenever the worker dies."""

    def kill(trainer, files):
        os.kill(active_children()[0].pid, signal.SIGKILL)

    Act.action = staticmethod(kill)
    run, settings = tmp_path / "run", [*root_of(photos), "data.num_workers=2"]
    message = refused(run, *settings, *act(2))
    assert "a process that loads data died" in message and "data.num_workers=2" in message
    assert 2 <= saved_step(run) < 8
    quietly(run, *settings, f"resume='{run}'")
    assert_same_results(run, undisturbed)


def test_failing_final_images_are_saved_on_resume(photos, copied, undisturbed, tmp_path):
    """The last step is saved before the images."""

    class Remove(L.Callback):
        def on_fit_end(self, trainer, pl_module):
            shutil.rmtree(copied)

    globals()["Remove"] = Remove
    run = tmp_path / "run"
    message = refused(run, *root_of(copied), f"+callbacks.act._target_={__name__}.Remove")
    assert "cannot be read" in message and "saved at step 8" in message
    restore(photos, copied)
    assert quietly(run, *root_of(copied), f"resume='{run}'")["steps"] == 8
    assert_equal_bits(weights(run, "state_dict"), weights(undisturbed, "state_dict"))
    assert (run / "samples" / "neighbors.png").exists() and (run / "metrics.json").exists()


def test_skip_unreadable_continues_and_counts(photos, copied, undisturbed, tmp_path):
    """It is deterministic, warns once per file, and changes nothing if all files are readable."""
    skipping = [*root_of(copied), "data.skip_unreadable=true"]
    metrics = train_tiny(tmp_path / "whole", *skipping)
    assert metrics["unreadable_files"] == 0
    assert_same_results(tmp_path / "whole", undisturbed)

    names: list[str] = []

    def action(trainer, files):
        validation = [file_of(trainer.datamodule.source, i) for i in trainer.datamodule.val_indices]
        for file in (files[0], files[1], validation[0]):
            names.append(str(file))
            deleted(file)

    for name in ("alone", "again"):
        restore(photos, copied)
        names.clear()
        Act.action = staticmethod(action)
        with pytest.warns(UserWarning, match="it is replaced by another sample") as warned:
            metrics = train_tiny(tmp_path / name, *skipping, *act(2))
        message = [str(w.message) for w in warned if "it is replaced by another sample" in str(w.message)]
        assert sorted(line.split(" cannot")[0] for line in message) == sorted(names)
        kept = json.loads((tmp_path / name / "metrics.json").read_text())
        assert metrics["unreadable_files"] == kept["unreadable_files"] == 3
    assert_same_results(tmp_path / "again", tmp_path / "alone")
    # Images unreadable from the start, with workers.
    for file in names:
        Path(file).write_text("damaged")
    cached = [*root_of(copied), "data.skip_unreadable=0.5", "data.cache=true"]
    with pytest.warns(UserWarning, match="3 of 24 images .*; they are left out"):
        metrics = train_tiny(tmp_path / "workers", *cached, "data.num_workers=2", "trainer.max_steps=6")
    assert metrics["unreadable_files"] == 3
    with pytest.raises(UsageError, match=r"3 of 24 images .* cannot be read .*data.skip_unreadable=true"):
        train_tiny(tmp_path / "strict", *root_of(copied), "data.cache=true")
    # The likelihood needs all validation samples; unreadable training samples do not matter.
    arguments = [
        f"run='{tmp_path / 'alone'}'",
        f"run_dir='{tmp_path / 'e'}'",
        "device=cpu",
        "quality=false",
        "num_terms=2",
    ]
    restore(photos, copied)
    data = instantiate_node(compose("train", *skipping, "run_dir=x").data)
    data.setup()
    for index in data.train_indices[:3]:
        (copied / data.source.ids[index]).write_text("damaged")
    assert math.isfinite(evaluate(compose("evaluate", *arguments))["bits_per_dim"])
    for file in copied.rglob("*.png"):
        file.write_text("damaged")
    with pytest.raises(UsageError, match="cannot be read"):
        evaluate(compose("evaluate", *arguments))


def test_failing_data_of_one_rank_end_all_ranks(photos, copied, undisturbed, tmp_path):
    """One error line, status 2, the last step saved; one process resumes to about the same weights."""
    run = tmp_path / "run"
    settings = [*TINY, *root_of(copied), "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    settings += ["checkpoint_every=100", f"hydra.run.dir='{run}'", f"+callbacks.act._target_={__name__}.RemoveOn"]
    ranks = run_ranks(2, "-m", "src.train", *once(*settings), cwd=CONF.parent)
    output = "".join(done.stdout + done.stderr for done in ranks)
    assert [done.returncode for done in ranks] == [2, 2] and "Traceback" not in output, output[-3000:]
    errors = [line for line in output.splitlines() if line.startswith("error")]
    (deleted_file,) = copied.rglob("*.deleted")
    assert len(errors) == 1 and str(deleted_file.with_suffix(".png")) in errors[0], output
    assert "saved at step 5" in errors[0] and f"resume={run}" in errors[0]
    deleted_file.rename(deleted_file.with_suffix(".png"))
    quietly(run, *root_of(copied), f"resume='{run}'")
    ours, theirs = weights(run, "current_model_state"), weights(undisturbed, "current_model_state")
    apart = torch.cat([(ours[name] - theirs[name]).abs().flatten() for name in ours])
    # A different order of sums may flip Adam's step where a gradient is almost 0; a missing step would move all weights
    # by about 1e-3.
    assert apart.mean() < 1e-4
