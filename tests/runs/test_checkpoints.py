"""Corrupted checkpoints, full disks, and checkpoints of other settings."""

import errno
import json
import os
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch

from src.compare import common_weights
from src.errors import UsageError
from src.runs.checkpoints import changed_settings, find_checkpoint
from src.training.checkpoints import newest_first
from tests.conftest import train_tiny


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not during collection."""
    global AtomicCheckpointIO
    from src.training.checkpoint_io import AtomicCheckpointIO


def test_newest_intact_checkpoint_is_loaded(trained, tmp_path):
    """A corrupted one gives a warning, and a folder without an intact one an error."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    last, best = run / "checkpoints" / "last.ckpt", run / "checkpoints" / "best.ckpt"
    os.utime(best, ns=(0, last.stat().st_mtime_ns - 10**9))
    assert newest_first(run) == [last, best]
    assert find_checkpoint(str(run), None) == last
    for path in (run, run / "checkpoints", last):
        assert find_checkpoint(str(path), None) == find_checkpoint(None, str(path)) == last
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=r"last\.ckpt is corrupted"):
        assert find_checkpoint(str(run), None) == best
    last.unlink()
    assert find_checkpoint(str(run), None) == best
    best.write_bytes(b"")
    with pytest.warns(UserWarning, match="corrupted"), pytest.raises(FileNotFoundError, match="no intact"):
        find_checkpoint(str(run), None)


def test_newest_checkpoint_has_the_latest_step(trained, tmp_path):
    """In every order of the file times, which copies do not keep."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    checkpoints = run / "checkpoints"
    last = torch.load(checkpoints / "last.ckpt", weights_only=True)
    paths = {}
    for step in (0, 3, 255, 256, 70_000):  # Pickle stores these in one, two and four bytes.
        paths[step] = checkpoints / f"a_{step}.ckpt"
        torch.save({**last, "global_step": step}, paths[step])
    for name in ("last.ckpt", "best.ckpt"):
        (checkpoints / name).unlink()
    for order in ([*paths], [*paths][::-1], [256, 0, 70_000, 255, 3]):
        for age, step in enumerate(order):
            os.utime(paths[step], ns=(age * 10**9, age * 10**9))
        assert newest_first(run) == [paths[step] for step in (70_000, 256, 255, 3, 0)]
    for broken in ({"global_step": "none"}, {"state": torch.ones(2)}):  # A foreign file without a step is no error.
        torch.save(broken, checkpoints / "other.ckpt")
        assert {*newest_first(run)} == {*paths.values(), checkpoints / "other.ckpt"}


def test_full_disk_leaves_the_last_checkpoint_intact(tmp_path, monkeypatch):
    """No partial file stays, no older checkpoint is removed, and the next save works again."""
    writer, path, older = AtomicCheckpointIO(), tmp_path / "last.ckpt", tmp_path / "step_1.ckpt"
    for target in (path, older):
        writer.save_checkpoint({"step": 1}, target)

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match=r"last\.ckpt could not be written"):
        writer.save_checkpoint({"step": 2}, path)
    writer.remove_checkpoint(older)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "step_1.ckpt"]
    assert torch.load(path) == {"step": 1}
    monkeypatch.undo()
    writer.save_checkpoint({"step": 3}, path)
    writer.remove_checkpoint(older)
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.load(path) == {"step": 3}


def test_failed_saves_leave_no_old_checkpoint(tmp_path, monkeypatch):
    """With two checkpoints kept, as Lightning requests it."""
    writer, sync, kept = AtomicCheckpointIO(), os.fsync, []

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for step in range(8):
        monkeypatch.setattr(os, "fsync", full if step in (2, 3, 5) else sync)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            writer.save_checkpoint({"global_step": step}, tmp_path / f"step_{step}.ckpt")
        kept.append(step)
        if len(kept) > 2:
            writer.remove_checkpoint(tmp_path / f"step_{kept.pop(0)}.ckpt")
        saved = sorted(p.name for p in tmp_path.iterdir())
        assert len(saved) == min(step + 1, 2), step
    assert saved == ["step_6.ckpt", "step_7.ckpt"]


@pytest.mark.filterwarnings("always")
def test_run_without_averages_opens_its_raw_weights(trained, tmp_path):
    from src.runs.open import open_run

    raw = tmp_path / "checkpoints" / "last.ckpt"
    raw.parent.mkdir()
    saved = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    saved["state_dict"] = saved.pop("current_model_state")
    torch.save(saved, raw)
    assert open_run(str(trained)).averaged
    with pytest.warns(UserWarning, match=r"no averaged weights.* ema=false"):
        opened = open_run(str(tmp_path))
    assert not opened.averaged
    assert all(torch.equal(value, saved["state_dict"][name]) for name, value in opened.module.state_dict().items())
    with pytest.raises(ValueError, match="ema=false"):
        open_run(str(tmp_path), ema=True)


def test_compared_runs_need_one_kind_of_weights():
    averaged, raw = (SimpleNamespace(record=SimpleNamespace(name="a"), averaged=each) for each in (True, False))
    assert common_weights([averaged, averaged]) and not common_weights([raw, raw])
    with pytest.raises(ValueError, match=r"ema=null .* ema=false"):
        common_weights([averaged, raw])


def test_changed_settings_leave_out_paths_and_recipe():
    before = {
        "recipe": {"max_steps": 6},
        "run_dir": "/a",
        "trainer": {"max_steps": 6},
        "seed": 1,
        "stop": {"path": "/a/last.ckpt"},
        "resume": None,
    }
    now = {
        "recipe": {"max_steps": 9},
        "run_dir": "/b",
        "trainer": {"max_steps": 9},
        "seed": 1,
        "stop": {"path": "/b/last.ckpt"},
        "resume": "/a",
    }
    assert changed_settings(before, now) == ["trainer.max_steps: 6 -> 9"]


@pytest.mark.parametrize(
    "other", ["schedule=linear", "diffusion.prediction=x0", "zero_terminal_snr=true", "data.num_values=256"]
)
def test_resume_with_another_model_is_refused(trained, tmp_path, other):
    with pytest.raises(UsageError, match=r"-> .* changes the model of a resumed run"):
        train_tiny(tmp_path / "run", f"resume='{trained}'", other)


def test_resume_auto_skips_resumes_or_refuses_jobs(trained, tmp_path, capsys):
    """It skips a finished job, resumes a started one, and refuses the folder of another job."""
    run = tmp_path / "0"
    shutil.copytree(trained, run)
    metrics = train_tiny(run, "resume=auto")
    assert metrics == json.loads((trained / "metrics.json").read_text())
    assert f"{run} is finished: skipped" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"belongs to another job \(seed: 0 -> 1\)"):
        train_tiny(run, "resume=auto", "seed=1")
    metrics["val/loss"] = None  # A diverged job is not skipped.
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert train_tiny(run, "resume=auto")["val/loss"] is not None
    (run / "metrics.json").unlink()
    assert train_tiny(run, "resume=auto")["steps"] == 6
    assert train_tiny(tmp_path / "1", "resume=auto")["steps"] == 6


def test_resumed_run_warns_of_changed_settings(trained, tmp_path):
    with pytest.warns(UserWarning, match=r"another setting: trainer\.max_steps: 6 -> 7"):
        metrics = train_tiny(tmp_path / "run", f"resume='{trained}'", "trainer.max_steps=7")
    assert metrics["steps"] == 7


def test_run_without_checkpoint_callbacks_saves_last_only(tmp_path):
    """Lightning would add a callback that writes beside the logs."""
    train_tiny(tmp_path / "run", "trainer.max_steps=2", "~callbacks.best", "~callbacks.checkpoint_every")
    assert [path.name for path in (tmp_path / "run").rglob("*.ckpt")] == ["last.ckpt"]
    assert [path.parent.name for path in (tmp_path / "run").rglob("*.ckpt")] == ["checkpoints"]


def test_unknown_run_names_the_newest_run(tmp_path, monkeypatch):
    saved = tmp_path / "outputs" / "train" / "2026-01-01" / "checkpoints" / "last.ckpt"
    saved.parent.mkdir(parents=True)
    saved.touch()
    monkeypatch.chdir(tmp_path)
    for run in ("nothing", "outputs/train"):
        with pytest.raises(FileNotFoundError, match=r"run=outputs/train/2026-01-01$"):
            find_checkpoint(run, None)
