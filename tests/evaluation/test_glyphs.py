"""The benchmark of glyphs: prompts, correct samples, and the accuracy of the nearest glyph."""

import math

import pytest
import torch

from src.data.glyphs import Glyphs, GlyphSource
from src.distributed.processes import Processes
from src.evaluation.settings import AlignmentSettings
from src.metrics.confidence import metric_name


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not at collection."""
    global ImageDataModule, GlyphBenchmark, TextCondition, build_benchmark, reports, AlignmentResult, score_group
    from src.data.images import ImageDataModule
    from src.data.text import TextCondition
    from src.evaluation import reports
    from src.evaluation.alignment import AlignmentResult, score_group
    from src.evaluation.benchmarks import GlyphBenchmark, build_benchmark


def source(*args, **kwargs) -> GlyphSource:
    """Return 8 x 8 glyphs: a random picture at the left for the row, another at the right for the column."""
    generator = torch.Generator().manual_seed(0)
    left, right = (255 * torch.randint(0, 2, (8, 4, 2), generator=generator) for _ in range(2))
    pairs = [(r, c) for r in range(8) for c in range(8)]
    images = torch.stack([torch.cat([left[r], right[c]], dim=1) for r, c in pairs])[:, None].to(torch.uint8)
    images = images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    parts = [[f"{r} left", f"{c} right"] for r, c in pairs]
    return GlyphSource(Glyphs(images, [f"{p}" for p in pairs], [", ".join(p) for p in parts], parts), 6, 3)


@pytest.fixture
def benchmark():
    data = ImageDataModule(source, None, 1, 16, val_fraction=0.2)
    data.setup()
    return GlyphBenchmark(data, AlignmentSettings(), torch.device("cpu"))


def test_prompts_are_held_out_and_training_captions(benchmark):
    data = benchmark.data
    held_out = {data.source.glyphs.captions[i] for i in data.source.held_out}
    trained = {data.source.captions[i][0] for i in data.train_indices}
    assert set(benchmark.prompts["held out"]) == held_out
    assert benchmark.n == len(held_out) == 6
    seen = set(benchmark.prompts["seen"])
    assert len(seen) == 6 and seen <= trained and not seen & held_out


def test_glyphs_need_text_to_be_measured():
    data = ImageDataModule(source, None, 1, 16, val_fraction=0.2)
    assert build_benchmark(data, AlignmentSettings(), Processes(torch.device("cpu"))) is None
    data.condition = TextCondition()
    assert isinstance(build_benchmark(data, AlignmentSettings(), Processes(torch.device("cpu"))), GlyphBenchmark)


def test_real_glyphs_are_correct_and_others_are_not(benchmark):
    prompts = benchmark.prompts["held out"]
    images = torch.cat([benchmark.real(prompt) for prompt in prompts])
    assert benchmark.correct(images, prompts).tolist() == [[1, 1]] * 6
    wrong = benchmark.correct(images, [*prompts[1:], prompts[0]])
    assert (wrong[:, 0] == 0).all()


def test_real_images_show_their_caption(benchmark):
    glyphs = benchmark.source.glyphs
    for prompt in benchmark.prompts["seen"]:
        assert torch.equal(benchmark.real(prompt)[0], glyphs.images[glyphs.captions.index(prompt)])


def test_noisy_glyphs_are_found(benchmark):
    accuracy = benchmark.detector_accuracy
    assert set(accuracy) == {metric_name(name, 12) for name in ("top_1", "top_5", "all")}
    assert all(metric.value == 1 for metric in accuracy.values())


def test_pictures_need_no_diversity(benchmark, tmp_path, monkeypatch):
    prompts = benchmark.prompts["held out"]
    images = torch.cat([benchmark.real(prompt) for prompt in prompts])
    scores = score_group(benchmark, images, prompts, prompts, [math.nan] * len(prompts), seed=0)
    result = AlignmentResult({"held out": {2.0: scores}}, {2.0: [(prompts[0], images[:1])]})
    monkeypatch.setattr(reports, "sample_and_score", lambda *args: result)
    alone = Processes(torch.device("cpu"))
    metrics = reports.evaluate_alignment(
        None, benchmark.data, None, benchmark, AlignmentSettings(scales=[2.0]), alone, tmp_path
    )
    assert metrics["groups"]["held out"]["2"]["metrics"]["top_1_6"]["value"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.png"]


def test_number_of_prompts_is_a_setting(benchmark):
    fewer = GlyphBenchmark(benchmark.data, AlignmentSettings(n=4), torch.device("cpu"))
    assert fewer.n == 4
    assert fewer.prompts["held out"] == benchmark.prompts["held out"][:4]
