"""Comparison of runs: groups, tests and verdicts of synthetic records, and the report of four tiny runs."""

import csv
import json
import math
import shutil
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
import torch
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from src.compare import compare, with_runs
from src.comparison.grouping import RUNTIME_SETTINGS, RunRecord, group_by_settings, with_shared_paths, without_repeats
from src.comparison.measure import measure_run
from src.comparison.statistics import (
    Summary,
    format_summary,
    headline,
    holm,
    metrics_of,
    rank_groups,
    welch,
)
from src.comparison.survey import run_folders, survey
from src.config.search_path import CONF
from src.config.sweeps import CompareRuns
from src.errors import UsageError
from src.runs.trust import known_targets
from tests.conftest import TINY, compose, train_tiny
from tests.fork_server import run_python
from tests.wandb_file import read_offline


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not at collection."""
    global stats
    from scipy import stats


SCHEDULES, SEEDS = ("cosine", "linear"), (0, 1)
QUICK = [
    "n=24",
    "num_memorization=24",
    "num_val=16",
    "num_terms=2",
    "sampler.steps=3",
    "features=[pixels]",
    "device=cpu",
]


def record(
    seed: int, value: float, choices: dict[str, str] | None = None, typed_overrides: tuple[str, ...] = (), **settings
):
    """Return a run with one metric; `a__b` is the setting a.b."""
    named = {name.replace("__", "."): x for name, x in settings.items()}
    name = f"{settings}{seed}"
    values = {"fd_pixels_1k": value, "val/loss": value}
    return RunRecord(
        name, seed, {"seed": seed, "run_dir": f"/runs/{name}", **named}, values, choices or {}, typed_overrides
    )


def groups_of(**values: list[float]):
    """Return a group per name, with values of seeds 0, 1, ..."""
    return group_by_settings([record(k, x, lr=name) for name, own in values.items() for k, x in enumerate(own)])[0]


# Groups and their labels.


def test_seed_folder_and_runtime_settings_share_a_group():
    runs = [
        record(k, 0.0, data__seed=k, callbacks__nan_guard__directory=f"/runs/{{}}{k}", logger__csv__name=str(k))
        for k in range(3)
    ]
    runs = [
        RunRecord(
            r.name, r.seed, {**r.settings, "callbacks.nan_guard.directory": f"{r.settings['run_dir']}/x"}, r.values
        )
        for r in runs
    ]
    (group,), implied = group_by_settings(runs)
    assert [r.seed for r in group.records] == [0, 1, 2] and not implied and group.settings == {}


def test_callbacks_that_change_weights_separate_groups():
    files = [yaml.safe_load((CONF / "callbacks" / f"{name}.yaml").read_text()) for name in ("default", "quality")]
    names = {f"callbacks.{name}" for file in files for name in file}
    assert names - {*RUNTIME_SETTINGS} == {"callbacks.ema", "callbacks.nan_guard", "callbacks.time_budget"}


def test_other_seeds_separate_groups():
    groups, _ = group_by_settings([record(0, 0.0, data__split_seed=0), record(0, 0.0, data__split_seed=1)])
    assert [g.settings for g in groups] == [{"data.split_seed": 0}, {"data.split_seed": 1}]


def test_group_labels_use_few_typed_settings():
    runs = [
        record(0, 0.0, {"schedule": s}, ("schedule", "lr"), lr=lr, schedule__beta=beta, diffusion__prediction=p)
        for lr in (0.1, 0.2)
        for s, beta, p in (("cosine", 1, "x0"), ("edm", 2, "edm"))
    ]
    groups, implied = group_by_settings(runs)
    assert [g.label for g in groups] == ["cosine, lr 0.1", "edm, lr 0.1", "cosine, lr 0.2", "edm, lr 0.2"]
    assert implied == {"schedule.beta": [1, 2, 1, 2], "diffusion.prediction": ["x0", "edm", "x0", "edm"]}


def test_label_without_an_autoencoder_names_the_setting():
    groups, _ = group_by_settings([record(0, 0.0, autoencoder__path=path) for path in ("runs/a", None)])
    assert [g.label for g in groups] == ["runs/a", "autoencoder null"]


def test_moved_encoder_separates_no_groups():
    for node, path in (("autoencoder", "path"), ("conditioning__encode", "model")):
        places = ("a", "x"), ("b", "x"), ("b", "y")  # path and fingerprint
        names = (f"{node}__{path}", f"{node}__fingerprint")
        runs = [record(k, 0.0, **dict(zip(names, place, strict=True))) for k, place in enumerate(places)]
        groups, _ = group_by_settings(with_shared_paths(runs))
        assert [len(g.records) for g in groups] == [2, 1] and "a" in groups[0].label


def test_choice_differing_within_a_group_is_ignored():
    runs = [record(k, 0.0, {"trainer": t}, lr=lr) for k, t in enumerate(("cpu", "gpu")) for lr in (1, 2)]
    assert [set(g.settings) for g in group_by_settings(runs)[0]] == [{"lr"}, {"lr"}]


def test_repeated_run_counts_once():
    runs = [record(0, 1.0, lr=1), record(1, 2.0, lr=1), record(0, 3.0, lr=1)]
    kept, repeats = without_repeats(runs)
    assert kept == runs[1:] and repeats == [(runs[0], runs[2])]


# Statistics.


def test_welch_equals_its_formula():
    a, b = [3.1, 3.4, 2.9, 3.3], [4.0, 4.9, 4.1]
    va, vb = (stdev(x) ** 2 / len(x) for x in (a, b))
    t = (mean(a) - mean(b)) / math.sqrt(va + vb)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    reach = stats.t.ppf(0.975, freedom) * math.sqrt(va + vb)
    expected = 2 * stats.t.sf(abs(t), freedom), mean(a) - mean(b) - reach, mean(a) - mean(b) + reach
    assert welch(a, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("a", "b"), [([1.0], [2.0, 3.0]), ([1.0, 2.0], [2.0]), ([1.0], [1.0])])
def test_welch_is_nan_for_one_seed(a, b):
    assert all(map(math.isnan, welch(a, b)))


@pytest.mark.parametrize(("b", "p"), [(1.0, 1.0), (2.0, 0.0)])
def test_welch_without_variance(b, p):
    assert welch([1.0, 1.0], [b, b]) == (p, 1 - b, 1 - b)


def test_welch_of_nearly_equal_values_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p, low, high = welch([0.9833, 0.9833, 0.9833], [0.5, 0.6, 0.7])
    assert p < 0.05 and low < 0.9833 - 0.6 < high


def test_holm_rejects_step_by_step():
    """Compare with the procedure: the smallest of m with level / m, the next with level / (m - 1), and so on."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        p = (torch.rand(6, generator=generator, dtype=torch.float64) ** 4).tolist()
        adjusted = holm(p)
        for level in (0.01, 0.05, 0.2):
            rejected = set()
            for rank, k in enumerate(sorted(range(6), key=lambda k: p[k])):
                if p[k] >= level / (6 - rank):
                    break
                rejected.add(k)
            assert {k for k in range(6) if adjusted[k] < level} == rejected


def test_holm_ignores_nan():
    adjusted = holm([0.01, math.nan, 0.02])
    assert adjusted[0] == 0.02 and math.isnan(adjusted[1]) and adjusted[2] == 0.02


# Verdicts.


def test_verdicts_relative_to_the_best():
    groups = groups_of(a=[1.0, 1.1, 0.9], b=[1.05, 1.2, 1.0], c=[9.0, 9.1, 9.2], d=[5.0])
    ranking = rank_groups(groups, "fd_pixels_1k")
    assert [ranking.verdict(k) for k in range(4)] == [
        "best", "not significant", "significant", "single seed"
    ]  # fmt: skip
    assert len(ranking.pairs) == 6 and len(ranking.pairs_with_best) == 3
    text = headline(groups, [ranking])
    assert text.startswith("a is best") and "is significant from c" in text
    assert "not significant from b" in text and "the difference from d" in text


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        ([1.0, 1.1, 0.9], [9.0, 9.1, 9.2], "a is better than b"),
        ([1.0, 1.1, 0.9], [1.0, 1.2, 1.0], "a and b do not differ significantly"),
        ([1.0], [9.0], "single seed"),
    ],
)
def test_headline_of_two_groups(a, b, text):
    groups = groups_of(a=a, b=b)
    assert text in headline(groups, [rank_groups(groups, "fd_pixels_1k")])


def test_kernel_distance_leads_for_efficientnet():
    values = {"precision_efficientnet_1k": 0.5, "fd_efficientnet_1k": 1.0, "kd_efficientnet_1k": 1.0}
    groups, _ = group_by_settings([RunRecord("a", 0, {"seed": 0}, values)])
    assert metrics_of(groups) == ["kd_efficientnet_1k", "fd_efficientnet_1k", "precision_efficientnet_1k"]


def test_direction_depends_on_the_metric():
    runs = [
        RunRecord(f"{x}{k}", k, {"seed": k, "lr": x}, {"recall_pixels_1k": x + k / 100, "nearest_ratio_pixels_1k": x})
        for x in (0.2, 0.9)
        for k in range(2)
    ]
    groups, _ = group_by_settings(runs)
    recall, ratio = (rank_groups(groups, f"{name}_pixels_1k") for name in ("recall", "nearest_ratio"))
    assert recall.direction == "higher" and recall.best == 1
    assert ratio.best is None and ratio.reason


def test_loss_is_not_ranked_across_schedules():
    same = group_by_settings([record(k, x, lr=x) for x in (1, 2) for k in range(2)])[0]
    other = group_by_settings([record(k, x, schedule__beta=x) for x in (1, 2) for k in range(2)])[0]
    assert rank_groups(same, "val/loss").best == 0
    ranking = rank_groups(other, "val/loss")
    assert ranking.best is None and "schedule" in ranking.reason
    assert rank_groups(other, "fd_pixels_1k").best == 0


def test_bits_per_dim_is_ranked_across_schedules():
    runs = [record(k, 0.0, schedule__num_steps=steps) for steps in (10, 20) for k in (0, 1)]
    values = {"val/bits_per_dim": (1.0, 1.1, 2.0, 2.1), "val/loss": (1.0, 1.1, 2.0, 2.1)}
    runs = [replace(run, values={name: x[k] for name, x in values.items()}) for k, run in enumerate(runs)]
    groups, _ = group_by_settings(runs)
    assert rank_groups(groups, "val/bits_per_dim").best == 0
    assert rank_groups(groups, "val/loss").best is None


def test_non_finite_metrics_are_excluded():
    groups = groups_of(a=[1.0, math.nan, 3.0], b=[math.inf, math.nan])
    ranking = rank_groups(groups, "fd_pixels_1k")
    assert ranking.summaries == [Summary(2.0, pytest.approx(math.sqrt(2)), 2), None] and ranking.best is None


@pytest.mark.parametrize(
    ("summary", "shown"),
    [
        (Summary(3.14159, 0.0123, 3), "3.142 ± 0.012"),
        (Summary(1234.5, 56.0, 3), "1234 ± 56"),
        (Summary(2.5, math.nan, 1), "2.5"),
        (None, "-"),
    ],
)
def test_metrics_are_rounded_to_their_std(summary, shown):
    assert format_summary(summary) == shown


# Command line.


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["outputs/a", "n=10", "b c/d"], ["n=10", "runs=['outputs/a','b c/d']"]),
        (["it's/x"], [r"""runs=["it's/x"]"""]),
        (["a/lr=1/0"], ["runs=['a/lr=1/0']"]),
        (["--cfg", "job", "x"], ["--cfg", "job", "runs=['x']"]),
        (["runs=[x]"], ["runs=[x]"]),
        (["runs=[x]", "hydra/job_logging=none"], ["runs=[x]", "hydra/job_logging=none"]),  # of the processes it starts
    ],
)
def test_folders_need_no_key(arguments, expected):
    assert with_runs(arguments) == expected


def test_folders_and_runs_cannot_be_combined():
    with pytest.raises(UsageError, match="runs="):
        with_runs(["a", "runs=[b]"])


# Comparisons end to end.


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four tiny runs with the files that Hydra writes for a sweep, and an unfinished one."""
    folder = tmp_path_factory.mktemp("sweep")
    for number, (schedule, seed) in enumerate((c, s) for c in SCHEDULES for s in SEEDS):
        run = folder / str(number)
        train_tiny(run, f"schedule={schedule}", f"seed={seed}", "trainer.max_steps=4", "validate_every=2")
        (run / ".hydra").mkdir()
        (run / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump([f"schedule={schedule}", f"seed={seed}"]))
        saved = {"hydra": {"runtime": {"choices": {"schedule": schedule, "hydra/launcher": "basic"}}}}
        (run / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump(saved))
    (folder / "4" / "checkpoints").mkdir(parents=True)
    return folder


def compared(sweep: Path, folder: Path, *overrides: str, runs: str | None = None) -> dict[str, object]:
    cache = f"cache='{sweep}/cache'"
    return compare(compose("compare", f"runs=['{runs or sweep}']", f"run_dir='{folder}'", cache, *QUICK, *overrides))


@pytest.fixture(scope="module")
def results(sweep: Path) -> dict[str, object]:
    return compared(sweep, sweep / "comparison")


def test_metrics_of_four_runs(results, sweep):
    assert [row["group"] for row in results["groups"]] == list(SCHEDULES)
    assert len(results["runs"]) == 4 and {row["schedule"] for row in results["runs"]} == set(SCHEDULES)
    assert [Path(line.split(":")[0]).name for line in results["left_out"]] == ["4"]
    assert "unfinished" in results["left_out"][0]
    for row in results["groups"]:
        own = [run for run in results["runs"] if run["schedule"] == row["group"]]
        for metric in ("fd_pixels_24", "bits_per_dim", "val/loss"):
            values = [run[metric] for run in own]
            assert row[metric] == pytest.approx(mean(values)) and row[f"{metric} seeds"] == 2
            assert row[f"{metric} std"] == pytest.approx(stdev(values))
    metrics = json.loads((sweep / "2" / "metrics.json").read_text())
    assert results["runs"][2]["val/loss"] == metrics["val/loss"]
    assert results["runs"][2]["parameters"] == metrics["parameters"]
    assert results["runs"][0]["calls_per_image"] == 3
    assert results["metrics"]["val/loss"]["best"] is None
    assert results["metrics"]["fd_pixels_24"]["baseline"] is not None
    assert results["common_settings"]["trainer.max_steps"] == "4" and "seed" not in results["common_settings"]


def test_files_agree_with_the_results(results, sweep):
    folder = sweep / "comparison"
    assert json.loads((folder / "comparison.json").read_text())["headline"] == results["headline"]
    for name in ("runs", "groups"):
        with (folder / f"{name}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        for row, known in zip(rows, results[name], strict=True):
            for key, value in known.items():
                assert row[key] == ("" if value != value else str(value))
    text = (folder / "comparison.md").read_text()
    assert results["headline"] in text and "| cosine | 2 |" in text
    sizes = [Image.open(path).size for path in folder.glob("*.png")]
    assert len(sizes) > 8 and min(map(min, sizes)) > 50


class References(HTMLParser):
    """Collect the URLs that a page fetches, its text, and its unclosed tags."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.text = ""
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "img", "source"):
            self.open.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        assert tag != "script"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_is_self_contained(results, sweep):
    page = (sweep / "comparison" / "comparison.html").read_text()
    parsed = References()
    parsed.feed(page)
    assert not parsed.open
    assert len(parsed.fetched) > 10 and all(value.startswith("data:") for value in parsed.fetched)
    assert "url(" not in page and "@import" not in page
    assert results["headline"] in parsed.text
    for heading in ("Every seed", "Samples from the same noise", "Loss over log-SNR", "Training", "Cost"):
        assert heading in parsed.text


def test_samples_equal_src_sample(results, sweep):
    from src.sample import sample

    folder = sample(
        compose("sample", f"run='{sweep}/2'", "n=16", "sampler.steps=3", "device=cpu", f"run_dir='{sweep}/s'")
    )
    drawn = [torch.tensor(np.asarray(Image.open(folder / f"{k:05d}.png"))) for k in range(16)]
    runs, _ = survey([sweep / "2"])
    files = [torch_file(path)["samples"] for path in (sweep / "cache").glob("compare-*.safetensors")]
    assert runs and any(torch.equal(each[:, 0].long(), torch.stack(drawn).long()) for each in files)


def torch_file(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_measurements_are_cached(results, sweep, tmp_path, monkeypatch):
    calls = []
    real = measure_run
    monkeypatch.setattr("src.comparison.measure.measure_run", lambda *args: calls.append(1) or real(*args))
    monkeypatch.setattr("src.comparison.page.draw_charts", lambda _: {})  # slow
    again = compared(sweep, tmp_path / "again")
    assert not calls and again["groups"] == results["groups"]
    other = compared(sweep, tmp_path / "other", "num_terms=3")
    assert len(calls) == 4 and other["runs"][0]["bits_per_dim"] != results["runs"][0]["bits_per_dim"]


def test_runs_are_logged_to_wandb(results, sweep, tmp_path, monkeypatch):
    """The table equals runs.csv, in the project and group of the first logged run."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(UsageError, match="wandb=true"):
        compared(sweep, tmp_path, "wandb=true")
    logged = {"project": "of-runs", "group": "of-two"}
    monkeypatch.setattr("src.compare.find_wandb", lambda runs: logged)
    monkeypatch.setattr("src.comparison.page.draw_charts", lambda _: {})  # slow
    compared(sweep, tmp_path, "wandb=true")
    offline = read_offline(tmp_path)
    assert (offline.run.project, offline.run.run_group) == ("of-runs", "of-two")
    table = json.loads((offline.directory / "files" / offline.values("comparison")[0]["path"]).read_text())
    with (tmp_path / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    column = table["columns"].index("fd_pixels_24")
    assert [row[column] for row in table["data"]] == [pytest.approx(float(row["fd_pixels_24"])) for row in rows]


def test_corrupted_and_diverged_runs_are_skipped(sweep, tmp_path):
    for name in ("0", "1"):
        shutil.copytree(sweep / name, tmp_path / name)
    for path in (tmp_path / "0" / "checkpoints").glob("*.ckpt"):
        path.write_bytes(path.read_bytes()[:-100])
    metrics = json.loads((tmp_path / "1" / "metrics.json").read_text())
    (tmp_path / "1" / "metrics.json").write_text(json.dumps({**metrics, "val/loss": None}))
    with pytest.warns(UserWarning, match="corrupted"):
        runs, notes = survey([tmp_path / "0", tmp_path / "1"])
    assert not runs and "no intact checkpoint" in notes[0] and "diverged" in notes[1]
    with (
        pytest.warns(UserWarning, match="corrupted"),
        pytest.raises(UsageError, match=r"runs=.*got 0"),
    ):
        compared(sweep, tmp_path / "out", runs=str(tmp_path))


def test_runs_on_different_data_are_rejected(sweep, tmp_path):
    train_tiny(tmp_path / "other", "data.val_fraction=0.3", "trainer.max_steps=1", "validate_every=1")
    cfg = compose("compare", f"runs=['{sweep}/0','{tmp_path}/other']", f"run_dir='{tmp_path}/x'", *QUICK)
    with pytest.raises(UsageError, match=r"data\.val_fraction .*0\.2 in .* 0\.3 in"):
        compare(cfg)


@pytest.mark.parametrize(("name", "text"), [("absent", "no folder"), ("", "no run in")])
def test_folders_without_runs_are_named(tmp_path, name, text):
    with pytest.raises((ValueError, FileNotFoundError), match=text):
        run_folders([str(tmp_path / name)])


# After a sweep.


def test_sweep_callback_is_not_a_trusted_target():
    node = OmegaConf.load(CONF / "hydra" / "callbacks" / "compare.yaml").compare
    assert isinstance(instantiate(node), CompareRuns)
    assert not any("after_sweep" in target.name for target in known_targets(training=True))


@pytest.mark.faults
def test_sweep_ends_with_its_comparison(tmp_path):
    """Run the preset's launcher in processes; the second time, nothing is trained or measured again."""
    folder = tmp_path / "jobs"
    few = "hydra.callbacks.compare.overrides=" + json.dumps([*QUICK, f"cache='{tmp_path}/cache'"]).replace(" ", "")
    command = ["-m", "src.train", "-m", *TINY, "sweep=schedules", "schedule=cosine,linear", "seed=0,1"]
    command += ["trainer.max_steps=4", "validate_every=2", few, f"hydra.sweep.dir='{folder}'"]
    for again in ([], ["resume=auto"]):
        shutil.rmtree(folder / "comparison", ignore_errors=True)
        done = run_python(*command, *again, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        assert str(folder / "comparison" / "comparison.html") in done.stdout
        assert ("Measuring 4 runs" in done.stdout) == (not again)
        results = json.loads((folder / "comparison" / "comparison.json").read_text())
        assert [row["group"] for row in results["groups"]] == list(SCHEDULES) and not results["left_out"]
        assert results["runs"][0]["schedule"] == "cosine"
