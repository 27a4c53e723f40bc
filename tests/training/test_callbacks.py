"""The records of a run, read back from W&B's offline files, TensorBoard's events and CSV files."""

from __future__ import annotations

import csv
import json
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from src import dashboard
from src.diffusion import schedules
from src.diffusion.noise import NoiseSchedule
from src.errors import UsageError
from src.runs.build import build
from src.runs.open import open_run
from src.training.checkpoints import read_checkpoint
from src.training.provenance import code_version
from src.viz import line_plots
from tests.conftest import LOSS_BY_NOISE, TINY, compose, cut_network, train_tiny
from tests.wandb_file import Offline, read_offline


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not at collection."""
    global ReadsByStep
    global L, EventAccumulator, bounds, log_comparison, DiffusionModule, Progress, log_snr_range, nearest_training
    import lightning as L
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from src.evaluation.likelihood import bounds
    from src.training.callbacks.loss_by_noise import log_snr_range
    from src.training.callbacks.monitor import Progress
    from src.training.loggers import log_comparison
    from src.training.module import DiffusionModule
    from src.training.pictures import nearest_training

    class ReadsByStep(L.Callback):
        """Counts reads from each batch to the next, callbacks and loggers included, for batches 2 to `last`."""

        def __init__(self, last):
            self.last, self.mode, self.counts = last, Reads(), []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 1:
                self.mode.__enter__()
            elif batch_idx > 1:
                self.counts.append(self.mode.count)
                self.mode.count = 0
            if batch_idx == self.last:
                self.mode.__exit__(None, None, None)


STEPS, VALIDATED = 7, [3, 6]
LOGGED = [step - 1 for step in VALIDATED]
"""Lightning logs a validation at the index of the last step."""
PICTURES = {"samples": LOGGED, "loss_by_noise": [*LOGGED, STEPS], "schedule": [0]}
LAST = ("samples/final", "samples/trajectory", "samples/neighbors", "curves")
EVERY_STEP = ("train/loss", "train/mse", "train/grad_norm", "lr", "memory/gib")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train seven steps with every logger, as the job of a sweep."""
    sweep = tmp_path_factory.mktemp("sweeps") / "of_two"
    folder = sweep / "1"
    (folder / ".hydra").mkdir(parents=True)
    (sweep / "multirun.yaml").write_text("hydra: {overrides: {task: ['seed=0,3', 'trainer.max_steps=7']}}\n")
    (folder / ".hydra" / "overrides.yaml").write_text("[seed=3, trainer.max_steps=7]\n")
    with pytest.MonkeyPatch.context() as patch:
        cut_network(patch)
        patch.setenv("NETRC", str(sweep / "no-netrc"))
        patch.setenv("HOME", str(sweep / "home"))
        for name in ("WANDB_API_KEY", "WANDB_DATA_DIR"):
            patch.delenv(name, raising=False)
        train_tiny(folder, "logger=[csv,tensorboard,wandb]", LOSS_BY_NOISE, "seed=3", f"trainer.max_steps={STEPS}",
                   "callbacks.bits_per_dim.every_validation=true", "callbacks.bits_per_dim.num_samples=512",
                   "neighbors.num_samples=16", curves=True)  # fmt: skip
    assert not (sweep / "home").exists() or not [*(sweep / "home").rglob("staging/*")]
    return folder


@pytest.fixture(scope="module")
def offline(watched: Path) -> Offline:
    return read_offline(watched)


@pytest.fixture(scope="module")
def events(watched: Path) -> EventAccumulator:
    return EventAccumulator(
        str(watched / "tensorboard" / "version_0"), size_guidance={"images": 0, "scalars": 0}
    ).Reload()


def test_pictures_have_the_step_of_their_validation(offline):
    assert offline.steps("val/loss")[:2] == offline.steps("samples") == offline.steps("loss_by_noise")[:2] == LOGGED


def test_wandb_has_every_scalar_and_picture_at_its_step(offline):
    for key in EVERY_STEP:
        assert offline.steps(key) == [*range(STEPS)], key
    for key, steps in PICTURES.items():
        assert offline.steps(key) == steps, key
    for key in LAST:
        assert offline.steps(key) == [STEPS], key
    for key in (*PICTURES, *LAST):
        for picture in offline.values(key):
            (name,) = picture["filenames"]
            assert Image.open(offline.directory / "files" / name).size == (picture["width"], picture["height"])


def test_tensorboard_has_the_same_scalars_and_pictures(offline, events):
    scalars = {key for row in offline.history for key, value in row.items() if isinstance(value, float | int)}
    scalars -= {"_step", "_runtime", "_timestamp", "trainer/global_step"}
    tags = events.Tags()
    assert scalars <= set(tags["scalars"]) and {"val/loss", "val/bits_per_dim", *EVERY_STEP} <= scalars
    for key in scalars:
        shown = events.Scalars(key)
        assert [e.step for e in shown] == offline.steps(key)
        assert [e.value for e in shown] == pytest.approx(offline.values(key), rel=1e-6)
    assert set(tags["images"]) == {*PICTURES, *LAST}
    for key in tags["images"]:
        assert [e.step for e in events.Images(key)] == offline.steps(key)
        for event, shown in zip(events.Images(key), offline.values(key), strict=True):
            assert (event.width, event.height) == (shown["width"], shown["height"])
    text = events.Tensors("environment/text_summary")[0].tensor_proto.string_val[0].decode()
    assert torch.__version__.split("+")[0] in text


def test_csv_log_has_the_same_scalars(watched, offline):
    with next((watched / "logs").glob("version_*/metrics.csv")).open() as file:
        rows = [*csv.DictReader(file)]
    for key in ("speed/steps_per_second", "speed/samples_per_second", "val/bits_per_dim", *EVERY_STEP):
        assert [float(row[key]) for row in rows if row.get(key)] == pytest.approx(offline.values(key), rel=1e-6), key


def test_hparams_tab_shows_settings_and_val_loss(events):
    """And neither paths nor `hp_metric`."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    def content(tag: str) -> HParamsPluginData:
        return HParamsPluginData.FromString(events.SummaryMetadata(tag).plugin_data.content)

    started = content("_hparams_/session_start_info").session_start_info.hparams
    assert started["schedule"].string_value == "cosine" and started["batch_size"].number_value == 64
    assert started["lr"].number_value > 0 and not any("/" in value.string_value for value in started.values())
    metrics = content("_hparams_/experiment").experiment.metric_infos
    assert [metric.name.tag for metric in metrics] == ["val/loss"]
    assert "val/loss" in events.Tags()["scalars"] and "hp_metric" not in events.Tags()["scalars"]


def test_speed_counts_the_global_batch(offline):
    steps, samples = (np.array(offline.values(f"speed/{key}_per_second")) for key in ("steps", "samples"))
    assert samples == pytest.approx(steps * offline.config["data"]["batch_size"], rel=1e-5)
    assert 0.05 < offline.values("memory/gib")[-1] < 100


def test_run_names_its_sweep_settings_and_environment(watched, offline):
    assert (offline.run.run_group, offline.run.job_type, offline.run.display_name) == ("of_two", "train", "seed=3")
    assert offline.config["seed"] == 3 and offline.config["schedule"]["_target_"] == "src.diffusion.schedules.cosine"
    (start,) = json.loads((watched / "environment.json").read_text())["starts"]
    assert offline.config["environment"] == start
    assert start["step"] == 0 and start["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    for word in (str(watched), str(Path.home())):
        assert word not in (watched / "environment.json").read_text()


def test_table_has_each_sample_with_its_nearest_neighbor(watched, offline):
    (table,) = offline.values("samples/table")
    contents = json.loads((offline.directory / "files" / table["path"]).read_text())
    assert contents["columns"] == ["index", "condition", "sample", "nearest", "rms_difference", "num_candidates"]
    (pictures,) = [a for a in offline.artifacts if a.type == "run_table"]
    entries = [e for e in pictures.manifest.contents if e.path.endswith(".png")]
    assert entries and all(Path(e.local_path).is_relative_to(offline.directory) for e in entries)
    assert all(Image.open(e.local_path).size == (64, 64) for e in entries)
    # The distances again, from the saved run and by plain differences.
    opened = open_run(str(watched))
    opened.data.setup()
    *_, x = opened.module.sample(range(64), seed=3)
    train = opened.data.preprocess(opened.data.source.fetch(opened.data.train_indices))
    expected = [(image - train).square().mean((1, 2, 3)).sqrt().min().item() for image in x[:16]]
    assert [row[4] for row in contents["data"]] == pytest.approx(expected, abs=1e-3)
    assert {row[5] for row in contents["data"]} == {len(train)}


def test_artifact_is_the_average_of_the_best_checkpoint(watched, offline):
    (model,) = [a for a in offline.artifacts if a.type == "model"]
    (entry,) = model.manifest.contents
    assert Path(entry.local_path) == watched / "best.safetensors" and "best" in model.aliases
    best = read_checkpoint(watched / "checkpoints" / "best.ckpt")
    metadata = json.loads(model.metadata)
    assert metadata["step"] == best["global_step"] in (*VALIDATED, STEPS) and metadata["averaged"]
    assert metadata["val/loss"] == pytest.approx(min(offline.values("val/loss")), rel=1e-6)
    with safe_open(entry.local_path, "pt") as file:
        for name in file.keys():
            assert_close(file.get_tensor(name), best["state_dict"][name], rtol=0, atol=0)
    assert str(watched) not in Path(entry.local_path).read_bytes().decode("latin1")


def test_loss_by_noise_sums_to_the_logged_losses(watched, offline):
    """And the bins lie where the schedule's formula says."""
    with (watched / "loss_by_noise.csv").open() as file:
        rows = [{k: float(v or "nan") for k, v in row.items()} for row in csv.DictReader(file)]
    assert [row["step"] for row in rows] == [s for s in (*VALIDATED, STEPS) for _ in range(20)]
    batch = offline.config["data"]["batch_size"]
    for end, start in zip((*VALIDATED, STEPS), (0, *VALIDATED), strict=True):
        span = [row for row in rows if row["step"] == end]
        assert sum(row["samples"] for row in span) == batch * (end - start)
        total = sum(row["loss"] * row["samples"] for row in span if row["samples"])
        assert total / batch == pytest.approx(sum(offline.values("train/loss")[start:end]), rel=1e-4)
    # Cosine's noisiest level is below -15; the cleanest follows from Nichol & Dhariwal 2021, eq. 17.
    f = [math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (0, 1 / 1000)]
    top = math.log(f[1] / f[0] / (1 - f[1] / f[0]))
    width = (top + 15) / 20
    assert [row["log_snr"] for row in rows[:20]] == pytest.approx(
        [-15 + (k + 0.5) * width for k in range(20)], abs=1e-3
    )


def test_zero_terminal_snr_counts_as_log_snr_minus_15():
    table = NoiseSchedule(schedules.zero_terminal_snr(schedules.linear(100)))
    low, high = log_snr_range(table)
    alpha_bar = 1 - table.betas[0].item()
    assert low == -15 and high == pytest.approx(math.log(alpha_bar / (1 - alpha_bar)), abs=1e-6)


def test_bits_per_dim_use_the_averaged_weights(watched, offline):
    opened = open_run(str(watched))  # with the average of the last step
    x = opened.data.examples(512)
    (one,) = bounds(opened.module, [range(len(x))], lambda _: (x, None), 3, 4, "optimal")
    expected = one.total.mean().item()
    metrics = json.loads((watched / "metrics.json").read_text())
    assert metrics["val/bits_per_dim"] == pytest.approx(expected, rel=1e-4)
    assert offline.steps("val/bits_per_dim")[:2] == LOGGED


def test_resumed_run_continues_its_records(tmp_path, monkeypatch):
    """Stopped between validations and resumed, it leaves the same files as an uninterrupted run."""
    from tests.runs.test_runs import runs_until

    train_tiny(tmp_path / "whole", LOSS_BY_NOISE)
    runs_until(monkeypatch, stop_after=4)
    with pytest.raises(SystemExit):
        train_tiny(tmp_path / "cut", LOSS_BY_NOISE)
    monkeypatch.undo()
    train_tiny(tmp_path / "cut", LOSS_BY_NOISE, f"resume='{tmp_path / 'cut'}'")
    whole, cut = ((tmp_path / name / "loss_by_noise.csv").read_text() for name in ("whole", "cut"))
    assert whole == cut and len(whole.splitlines()) == 1 + 2 * 20
    starts = json.loads((tmp_path / "cut" / "environment.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 4]
    whole, cut = (sorted(f.name for f in (tmp_path / name / "samples").iterdir()) for name in ("whole", "cut"))
    assert whole == cut
    logs = [sorted((tmp_path / name / "logs").glob("*/metrics.csv")) for name in ("whole", "cut")]
    whole, cut = ([row["step"] for path in paths for row in csv.DictReader(path.open())] for paths in logs)
    assert whole == cut


def test_nearest_training_sample_of_a_copy_is_itself(trained):
    data = open_run(str(trained)).data
    data.setup()
    copies = data.preprocess(data.source.fetch(data.train_indices[1200:1204]))
    near, distances = nearest_training(data, copies, limit=10_000)
    assert_close(near, copies, rtol=0, atol=0)
    assert distances.abs().max() == 0
    assert (nearest_training(data, copies, limit=1000)[1] > 0).all()


def test_code_version_is_that_of_git(tmp_path):
    assert code_version(tmp_path) == {"commit": None, "dirty": None}

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=x", "-c", "user.email=x@y"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *who, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "first")
    assert code_version(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "file").write_text("2")
    assert code_version(tmp_path)["dirty"]
    (tmp_path / "below").mkdir()
    assert code_version(tmp_path / "below")["commit"] is None  # inside another repository


def test_heat_map_of_one_or_empty_rows_is_drawn(tmp_path):
    path = tmp_path / "loss_by_noise.csv"
    for lines in (["3,1.0,0.5,4"], ["3,1.0,,0", "3,2.0,,0"], ["3,1.0,-0.5,4", "3,2.0,0.5,4", "6,1.0,1,1", "6,2.0,1,1"]):
        path.write_text("\n".join(["step,log_snr,loss,samples", *lines]))
        assert line_plots.loss_by_noise(path).width > 500


def test_comparison_is_a_table_in_the_sweeps_group(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    rows = [{"run": "seed=0", "fid": 3.5}, {"run": "seed=1", "bits": 2.0}]
    name = log_comparison(rows, "project", "of_two", tmp_path)
    offline = read_offline(tmp_path)
    assert (offline.run.run_group, offline.run.job_type, offline.run.run_id) == ("of_two", "comparison", name)
    table = json.loads((offline.directory / "files" / offline.values("comparison")[0]["path"]).read_text())
    assert table == {"columns": ["run", "fid", "bits"], "data": [["seed=0", 3.5, None], ["seed=1", None, 2.0]]}


def test_dashboard_panels_show_logged_keys(offline):
    pytest.importorskip("wandb_workspaces")
    logged = {key for row in offline.history for key in row}
    wanted = set()
    for panels in dashboard.sections().values():
        for panel in panels:
            names = [getattr(panel, "x", None), getattr(panel, "table_name", None)]
            wanted |= {n for n in [*names, *getattr(panel, "y", []), *getattr(panel, "media_keys", [])] if n}
    assert len(wanted) > 15 and wanted <= logged
    sent = dashboard.workspace("me", "p", "n")._to_model().model_dump_json()
    assert all(f'"{key}"' in sent for key in wanted - {"samples/table"})
    # The request for a report needs an account.
    shown = [panel for block in dashboard.report("me", "p", "n").blocks for panel in getattr(block, "panels", [])]
    assert [type(panel) for panel in shown] == [type(panel) for part in dashboard.sections().values() for panel in part]


def test_dashboard_without_account_names_the_fix(monkeypatch, no_network, tmp_path):
    pytest.importorskip("wandb_workspaces")
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UsageError, match=r"entity=null"):
        dashboard.show_dashboard(compose("dashboard"))
    with pytest.raises(UsageError, match="wandb login"):
        dashboard.show_dashboard(compose("dashboard", "entity=me"))


class Reads(TorchDispatchMode):
    """Count operations that read a tensor's value; a GPU would finish all queued work there."""

    NAMES = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::bincount", "aten::equal")
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func.name().startswith("aten::index") and any(
            index is not None and index.dtype == torch.bool for index in (args[1] if isinstance(args[1], list) else [])
        )
        self.count += func.name() in self.NAMES or by_mask
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "setting", ["schedule=cosine", "timestep_sampler=importance", "schedule=edm_lognormal", "loss=vlb"]
)
def test_steps_synchronize_only_for_output(setting, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    watch = ReadsByStep(last=8)
    own = [
        "trainer.max_steps=9",
        "validate_every=9",
        "trainer.log_every_n_steps=6",
        "callbacks.progress.refresh_rate=4",
    ]
    run = build(compose("train", *TINY, *own, setting, f"run_dir='{tmp_path}'"))
    run.trainer.callbacks.insert(0, watch)
    run.trainer.fit(run.module, datamodule=run.data)
    assert [bool(count) for count in watch.counts] == [number in (4, 6, 8) for number in range(2, 9)]


def train_with_progress(folder: Path, *own: str):
    run = build(compose("train", *TINY, "trainer.max_steps=4", "validate_every=4", *own, f"run_dir='{folder}'"))
    run.trainer.fit(run.module, datamodule=run.data)
    return run


def test_progress_bar_shows_the_loss_of_the_last_batch(tmp_path, monkeypatch, capsys):
    losses, shown = [], []
    step, metrics = DiffusionModule.training_step, Progress.get_metrics

    def keep_loss(module, batch, batch_idx):
        losses.append((out := step(module, batch, batch_idx))["loss"].item())
        return out

    def keep_metrics(bar, trainer, module):
        shown.append((len(losses), (out := metrics(bar, trainer, module)).get("train/loss")))
        assert "v_num" not in out
        return out

    monkeypatch.setattr(DiffusionModule, "training_step", keep_loss)
    monkeypatch.setattr(Progress, "get_metrics", keep_metrics)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    own = ["data.batch_size=16", "trainer.accumulate_grad_batches=2", "callbacks.progress.refresh_rate=3"]
    run = train_with_progress(tmp_path, *own)
    assert [count for count, _ in shown] == [3, 6, 8, 8, 8]  # updates, end of validation, end of training
    assert run.trainer.progress_bar_callback.train_progress_bar.total == 8
    assert all(loss == pytest.approx(losses[count - 1], rel=1e-6) for count, loss in shown)
    said = capsys.readouterr().out
    assert "Training" in said and "Epoch" not in said


def test_progress_prints_few_lines_without_terminal(tmp_path, monkeypatch, capsys):
    train_with_progress(tmp_path / "a", "callbacks.progress.refresh_rate=10")
    (line,) = capsys.readouterr().out.splitlines()  # 4 steps take less than 10 s
    assert line.startswith("step 4 of 4: train/loss ") and line.endswith("steps/s")
    monkeypatch.setattr("src.training.callbacks.monitor.SECONDS_PER_LINE", 0.0)
    train_with_progress(tmp_path / "b", "callbacks.progress.refresh_rate=10")
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["1", "2", "3", "4"]
    train_with_progress(tmp_path / "c", "callbacks.progress.refresh_rate=0")
    assert capsys.readouterr().out == ""
