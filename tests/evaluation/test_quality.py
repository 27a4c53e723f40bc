"""Sample quality in `src.evaluate`, checked against second implementations."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from src.config.overrides import expand_grid
from src.diffusion import samplers
from src.distributed.processes import Processes
from src.errors import UsageError
from src.evaluate import evaluate
from src.metrics.collected import Collected
from src.models.unet import UNet
from src.runs.open import open_run
from src.sample import sample
from src.viz.tables import format_duration, format_metric, markdown, metric_title
from tests.conftest import compose, train_tiny
from tests.data.test_split import held_out_digits


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not at collection."""
    global sqrtm, NearestNeighbors, Sampler, GeneratedSamples, QualitySettings, SampleEvaluator
    from scipy.linalg import sqrtm
    from sklearn.neighbors import NearestNeighbors

    from src.evaluation.quality import GeneratedSamples, SampleEvaluator
    from src.evaluation.settings import QualitySettings
    from src.training.module import Sampler


N = 40
ALONE = Processes(torch.device("cpu"))


@pytest.fixture(scope="module")
def arguments(trained, cache) -> list[str]:
    return [
        f"run='{trained}'",
        f"cache='{cache}'",
        f"n={N}",
        "batch_size=16",
        "num_val=10",
        "num_terms=2",
        "device=cpu",
    ]


@pytest.fixture(scope="module")
def evaluated(arguments, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "all"
    several = expand_grid("evaluate", ["sampler=ddim,heun", "sampler.steps=2,4", "features=[pixels]"], "sampler")
    evaluate(compose("evaluate", *arguments, *several, f"run_dir='{folder}'"))
    return folder


@pytest.fixture(scope="module")
def drawn(trained, tmp_path_factory) -> Tensor:
    """Samples of `src.sample` with the same seed, (N, 64) uint8."""
    folder = tmp_path_factory.mktemp("drawn") / "all"
    settings = [f"run='{trained}'", f"n={N}", "sampler=ddim", "sampler.steps=4", "device=cpu", f"run_dir='{folder}'"]
    return torch.from_numpy(np.load(sample(compose("sample", *settings)) / "samples.npz")["arr_0"]).flatten(1)


@pytest.fixture(scope="module")
def real(trained) -> tuple[np.ndarray, np.ndarray]:
    """Validation and training digits after `postprocess`, (M, 64)."""
    data = open_run(str(trained)).data
    data.setup()
    return tuple(
        data.postprocess(data.preprocess(data.source.fetch(part))).flatten(1).double().numpy()
        for part in (data.val_indices, data.train_indices)
    )


def test_metrics_are_those_of_samples_from_src_sample(evaluated, drawn, real):
    """Compare with scipy's matrix square root and scikit-learn's nearest neighbors."""
    metrics = json.loads((evaluated / "metrics.json").read_text())["samplers"]["ddim 4"]["metrics"]
    x, (val, train) = drawn.double().numpy(), real
    covariances = np.cov(x.T), np.cov(val.T)
    distance = np.square(x.mean(0) - val.mean(0)).sum() + np.trace(
        sum(covariances) - 2 * sqrtm(covariances[0] @ covariances[1]).real
    )
    assert metrics[f"fd_pixels_{N}"]["value"] == pytest.approx(distance, rel=1e-4)
    tree = NearestNeighbors(n_neighbors=1).fit(train)
    distances, of_val = (tree.kneighbors(part)[0][:, 0] for part in (x, val))
    ratio = np.sort(distances)[(N - 1) // 2] / np.sort(of_val)[(len(of_val) - 1) // 2]  # lower medians
    assert metrics[f"nearest_ratio_pixels_{N}"]["value"] == pytest.approx(ratio, rel=1e-9)
    assert metrics[f"copies_pixels_{N}"]["value"] == pytest.approx((distances <= np.quantile(of_val, 0.05)).mean())


def test_table_has_a_column_per_sampler(evaluated):
    metrics = json.loads((evaluated / "metrics.json").read_text())
    calls = {name: each["calls_per_image"] for name, each in metrics["samplers"].items()}
    assert calls == {"ddim 2": 2, "ddim 4": 4, "heun 2": 3, "heun 4": 7}  # Heun's last step is Euler's
    assert all(each["seconds_per_image"] > 0 for each in metrics["samplers"].values())
    header, _, *rows = (evaluated / "table.md").read_text().splitlines()
    assert [cell.strip() for cell in header.split("|")[2:-1]] == [*calls, "real data"]
    titles = " ".join(row.split("|")[1] for row in rows if row.startswith("|"))
    assert "bits/dim of 10" in titles and all(metric_title(f"{m}_pixels_{N}") in titles for m in ("fd", "copies"))
    for picture in ("bound.png", "samples.png", "nearest.png", "quality.png"):
        assert (evaluated / picture).stat().st_size > 1000


def test_baseline_has_as_many_training_samples(arguments, trained, tmp_path, cache):
    metrics = evaluate(compose("evaluate", *arguments, "sampler.steps=2", "likelihood=false", f"run_dir='{tmp_path}'"))
    names = {*metrics["baseline"]}
    assert names == {n for n in metrics["samplers"]["ancestral 2"]["metrics"] if n.startswith(SAME)}
    assert f"fd_classifier_{N}" in names  # the digits have labels
    assert "bits_per_dim" not in metrics and (tmp_path / "classes.png").exists()


SAME = ("fd_", "kd_", "precision_", "recall_", "density_", "coverage_", "class_")


@pytest.mark.parametrize(("left_out", "halved"), [("likelihood", True), ("quality", False)])
def test_precision_applies_to_sampling_only(left_out, halved, arguments, tmp_path):
    settings = ["precision=bf16-mixed", f"{left_out}=false", "sampler.steps=2", "features=[pixels]"]
    seen = set()
    watched = register_module_forward_pre_hook(
        lambda net, _: seen.add(torch.is_autocast_enabled("cpu")) if isinstance(net, UNet) else None
    )
    with watched:
        evaluate(compose("evaluate", *arguments, *settings, f"run_dir='{tmp_path}'"))
    assert (True in seen) == halved  # building the network calls it once, too


def test_compiled_network_has_one_batch_size(arguments, tmp_path, monkeypatch):
    sizes = []

    def compiled(net, mode):
        assert mode is True

        def fast(x, *others):
            sizes.append(len(x))
            return net(x, *others)

        return fast

    monkeypatch.setattr("src.training.compile.compile_network", compiled)
    settings = ["compile=true", "sampler=ddim", "sampler.steps=2", "features=[pixels]"]
    metrics = evaluate(compose("evaluate", *arguments, *settings, f"run_dir='{tmp_path}'"))
    assert sizes == [16] * (2 + 2 * 3)  # two timed calls, then two steps of three batches
    assert metrics["sampling_compiled"] is True


def test_only_memorization_metrics_detect_copies(trained, cache):
    """Training digits as samples match the baseline and coincide with training digits."""
    data = open_run(str(trained)).data
    evaluator = SampleEvaluator(data, QualitySettings(["pixels"], n=300, cache=cache), ALONE)
    indices = data.train_indices[300:600]
    copies = data.postprocess(data.preprocess(data.source.fetch(indices)))
    (pixels,) = evaluator.extractors
    generated = GeneratedSamples({"pixels": Collected.of(pixels(copies), 0, 1000)}, copies, 1, 1.0)
    (measured,) = evaluator.measure([generated])
    baseline = evaluator.baseline()
    for name, metric in measured.metrics.items():
        if name in baseline:
            assert metric.low <= baseline[name].high and baseline[name].low <= metric.high, name
    assert measured.metrics["nearest_ratio_pixels_300"].value == 0
    assert measured.metrics["copies_pixels_300"].value == 1
    assert measured.neighbors.distances.eq(0).all()
    assert [data.train_indices[k] for k in measured.neighbors.numbers] == indices


def test_copies_look_perfect_with_reference_train(trained, cache):
    """Their Fréchet distance is 0; the baseline then uses validation data."""
    data = open_run(str(trained)).data
    evaluator = SampleEvaluator(data, QualitySettings(["pixels"], n=2000, reference="train", cache=cache), ALONE)
    everything = data.postprocess(data.preprocess(data.source.fetch(data.train_indices)))
    (pixels,) = evaluator.extractors
    copies = GeneratedSamples({"pixels": Collected.of(pixels(everything), 0, 2000)}, everything[:20], 1, 1.0)
    (measured,) = evaluator.measure([copies])
    assert measured.metrics[f"fd_pixels_{len(data.train_indices)}"].value == pytest.approx(0, abs=1e-4)
    assert f"fd_pixels_{len(data.val_indices)}" in evaluator.baseline()


def test_baseline_may_have_fewer_samples(arguments, tmp_path):
    """With reference=train there are fewer validation digits than generated samples."""
    name = f"fd_pixels_{held_out_digits()}"
    several = [
        "samplers=[{sampler:ddim,steps:2},{sampler:ddim,steps:3}]",
        "features=pixels",
        "reference=train",
        "n=400",
    ]
    folder = tmp_path / "out"
    metrics = evaluate(compose("evaluate", *arguments, *several, "likelihood=false", f"run_dir='{folder}'"))
    assert name in metrics["baseline"] and "fd_pixels_400" in metrics["samplers"]["ddim 3"]["metrics"]
    lines = (folder / "table.md").read_text().splitlines()
    (row,) = [line for line in lines if line.startswith("| Fréchet distance (pixels")]
    assert row.split("|")[-2].strip() == format_metric(metrics["baseline"][name])
    assert (folder / "quality.png").stat().st_size > 1000


def test_non_finite_samples_are_rejected(trained, cache):
    opened = open_run(str(trained))

    def diverge(diffusion, predict, x, grid, *, noise):
        yield torch.where(torch.arange(len(x)).view(-1, 1, 1, 1) % 8 == 0, torch.nan, x)

    evaluator = SampleEvaluator(opened.data, QualitySettings(["pixels"], n=24, batch_size=16, cache=cache), ALONE)
    with pytest.raises(ValueError, match="3 of 24 samples are not finite"):
        evaluator.draw(opened.module, Sampler(diverge, 2, "trailing"))


def test_too_little_data_and_large_images_are_rejected(trained, cache, monkeypatch):
    data = open_run(str(trained)).data
    data.setup()
    with monkeypatch.context() as patch:
        patch.setattr(data, "val_indices", data.val_indices[:5])
        with pytest.raises(ValueError, match=r"at least 6 validation .* found 5"):
            SampleEvaluator(data, QualitySettings(["pixels"], cache=cache), ALONE)
    monkeypatch.setattr("src.evaluation.quality.MAX_PIXELS", 63)
    with pytest.raises(ValueError, match=r"features=pixels.* 63 .* 64"):
        SampleEvaluator(data, QualitySettings(["pixels"], cache=cache), ALONE)


def test_memory_is_bounded_in_the_number_of_samples(trained, cache):
    """The Fréchet distance uses all samples, the other metrics the first ones."""
    opened = open_run(str(trained))
    fn = Sampler(samplers.ddim, 2, "trailing")
    limits = {"batch_size": 16, "max_features": 24, "num_memorization": 10, "cache": cache}
    few, many = (
        SampleEvaluator(opened.data, QualitySettings(["pixels"], n, **limits), ALONE).draw(opened.module, fn)
        for n in (24, 88)
    )
    assert [d.collected["pixels"].moments.number for d in (few, many)] == [24, 88]
    assert torch.equal(few.collected["pixels"].features, many.collected["pixels"].features)
    assert torch.equal(few.first, many.first) and len(many.first) == 10


def test_metrics_of_points(tmp_path, cache, capsys):
    from src.train import train

    settings = [
        "data=points",
        "data.num_samples=400",
        "data.batch_size=64",
        "model.hidden_size=16",
        "trainer.max_steps=2",
    ]
    settings += ["trainer.accelerator=cpu", "sampler.steps=2", "logger=none", "callbacks.progress.refresh_rate=0"]
    train(compose("train", *settings, f"run_dir='{tmp_path / 'run'}'"))
    arguments = [f"run='{tmp_path / 'run'}'", "n=50", "num_terms=2", "device=cpu", f"cache='{cache}'"]
    metrics = evaluate(compose("evaluate", *arguments, f"run_dir='{tmp_path / 'out'}'"))
    assert "validation samples: metrics depend on the split" in capsys.readouterr().out
    (sampler,) = metrics["samplers"].values()
    expected = {"sliced_wasserstein_50", "energy_distance_50", "mmd_50", "nearest_ratio_values_50", "copies_values_50"}
    assert {*sampler["metrics"]} == expected
    assert metrics["baseline"]["energy_distance_50"]["value"] < sampler["metrics"]["energy_distance_50"]["value"]
    with pytest.raises(UsageError, match="features=pixels"):
        evaluate(compose("evaluate", *arguments, "features=[pixels]", f"run_dir='{tmp_path / 'rejected'}'"))


def test_quality_callback_measures_averaged_weights(tmp_path, cache):
    """The callback's last metrics equal those of `src.evaluate` for the checkpoint."""
    measured = ["callbacks=[default,quality]", f"callbacks.quality.cache='{cache}'", f"callbacks.quality.n={N}"]
    measured += ["callbacks.quality.steps=2", "callbacks.quality.features=[pixels]"]
    run = tmp_path / "run"
    metrics = train_tiny(
        run, *measured, "optimizer.lr=0.01", "trainer.max_steps=7"
    )  # the last step is not a multiple of 3
    arguments = [f"run='{run}'", f"cache='{cache}'", f"n={N}", "batch_size=64", "likelihood=false", "device=cpu"]
    arguments += ["sampler.steps=2", "features=[pixels]"]
    after, raw = (
        evaluate(compose("evaluate", *arguments, f"ema={ema}", f"run_dir='{tmp_path / ema}'"))
        for ema in ("true", "false")
    )
    values = {name: metric["value"] for name, metric in after["samplers"]["ancestral 2"]["metrics"].items()}
    logged = {name.removeprefix("quality/"): value for name, value in metrics.items() if name.startswith("quality/")}
    assert logged == {name: pytest.approx(value, rel=1e-4, abs=1e-6) for name, value in values.items()}
    name = f"fd_pixels_{N}"
    assert raw["samplers"]["ancestral 2"]["metrics"][name]["value"] != pytest.approx(logged[name], rel=1e-3)


def test_quality_callback_rejects_settings_before_training(tmp_path, cache):
    quality = ["callbacks=[default,quality]", "callbacks.quality.features=[inception]"]
    with pytest.raises(UsageError, match=r"no file nowhere\.pth"):
        train_tiny(tmp_path / "run", *quality, "callbacks.quality.inception_weights=nowhere.pth")
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (["features=[inceptoin]"], "features=inceptoin must be"),
        (["reference=test"], "reference=test must be"),
        (["n=5"], "n=5 must be at least 10"),
        (["likelihood=false", "quality=false", "alignment.enabled=false"], "nothing to evaluate"),
        (["features=inception", "inception_weights=nowhere.pth"], "no file nowhere.pth"),
        (["samplers=[{sampler:ddim,setps:3}]"], "unknown setting 'sampler.setps'"),
        (["samplers=[{sampler:dimm}]"], "did you mean ddim"),
    ],
)
def test_invalid_settings_are_rejected_first(arguments, overrides, rule, tmp_path, monkeypatch):
    monkeypatch.setattr("src.evaluation.reports.evaluate_likelihood", lambda *_: pytest.fail("the bound was computed"))
    with pytest.raises(UsageError, match=rule):
        evaluate(compose("evaluate", *arguments, "likelihood=true", *overrides, f"run_dir='{tmp_path}'"))


@pytest.mark.parametrize(
    ("typed_overrides", "samplers"),
    [
        (["sampler=ddim,heun", "sampler.steps=2,4"], ["ddim 2", "ddim 4", "heun 2", "heun 4"]),
        (["sampler=ddim", "sampler.eta=0,0.5", "sampler.steps=7"], ["ddim 7 0", "ddim 7 0.5"]),
        (["sampler.steps=range(3,9,3)"], [" 3", " 6"]),
    ],
)
def test_several_sampler_values_become_a_list(typed_overrides, samplers):
    cfg = compose("evaluate", *expand_grid("evaluate", ["run=x", *typed_overrides], "sampler"))
    assert cfg.run == "x" and cfg.sampler._target_ is None
    found = [f"{c.get('sampler', '')} {c.steps}" + (f" {c.eta}" if "eta" in c else "") for c in cfg.samplers]
    assert found == samplers


def test_single_sampler_value_is_unchanged():
    typed_overrides = ["run=x", "sampler=ddim", "sampler.steps=7"]
    assert expand_grid("evaluate", typed_overrides, "sampler") == typed_overrides


@pytest.mark.parametrize(
    ("typed_overrides", "rule"),
    [
        (["sampler=ddim,huen"], "did you mean heun"),
        (["sampler=ddim,dpmpp_2m", "sampler.eta=0,1"], "sampler.eta"),
        (["sampler.steps=interval(1,5)"], "sampler.steps"),
        (["sampler.steps=1,2", "samplers=[{steps:3}]"], "samplers"),
    ],
)
def test_invalid_sampler_values_are_rejected(typed_overrides, rule):
    with pytest.raises(UsageError, match=rule):
        expand_grid("evaluate", typed_overrides, "sampler")


@pytest.mark.parametrize(
    ("metric", "shown"),
    [
        ((12.3456, 11.2, 13.5), "12.3 [11.2, 13.5]"),
        ((0.98765, 0.97, 0.999), "0.988 [0.970, 0.999]"),
        ((1234.5, 1100.0, 1400.0), "1234 [1100, 1400]"),
        ((-0.0001, -0.04, 0.05), "0.000 [-0.040, 0.050]"),
        ((0.0, 0.0, 0.0), "0.000 [0.000, 0.000]"),
    ],
)
def test_metrics_have_significant_digits(metric, shown):
    assert format_metric(dict(zip(("value", "low", "high"), metric, strict=True))) == shown


def test_table_of_likelihood_alone():
    text = markdown({"bits_per_dim": 2.5, "standard_error": math.nan, "num_val": 1})
    assert text.splitlines()[2].split("|")[2].strip() == "one sample" and "brackets" not in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.42, "0.42 seconds"), (89, "89 seconds"), (600, "10 minutes"), (9000, "2.5 hours")]
)
def test_duration_chooses_its_unit(seconds, text):
    assert format_duration(seconds) == text
