"""Prompt alignment: benchmarks, their scorers, metrics, and the output of `src.evaluate`."""

import json
import math
import threading
from functools import partial
from itertools import combinations

import numpy as np
import pytest
import torch

from src.diffusion import losses, samplers, schedules
from src.diffusion.gaussian_diffusion import GaussianDiffusion
from src.diffusion.noise import NoiseSchedule
from src.diffusion.timestep_samplers import uniform
from src.distributed.processes import Processes
from src.errors import UsageError
from src.evaluate import evaluate
from src.evaluation.settings import AlignmentSettings
from src.metrics.confidence import wilson
from src.metrics.detector import Detections
from src.runs.evaluation import build_alignment
from src.runs.open import open_run
from src.viz.tables import markdown, metric_title
from tests.conftest import HANG_SECONDS, compose, train_tiny
from tests.data.test_split import held_out_digits


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not at collection."""
    global ImageDataModule, ATTRIBUTES, Shapes, paint, parse_scene, place, render, shapes, ConditionSpec
    global best_scale, pairwise_rms, sample_and_score, score_group, DiffusionModule, Sampler
    global OBJECT_ATTRIBUTES, ClassBenchmark, ShapesBenchmark, attribute_accuracy, build_benchmark, match_scene
    from src.data.images import ImageDataModule
    from src.data.scene_images import paint, place, render
    from src.data.scenes import ATTRIBUTES, parse_scene
    from src.data.shapes import Shapes, shapes
    from src.evaluation.alignment import best_scale, pairwise_rms, sample_and_score, score_group
    from src.evaluation.benchmarks import (
        OBJECT_ATTRIBUTES,
        ClassBenchmark,
        ShapesBenchmark,
        attribute_accuracy,
        build_benchmark,
        match_scene,
    )
    from src.training.module import ConditionSpec, DiffusionModule, Sampler


ALONE = Processes(torch.device("cpu"))
HELD_OUT = [{"shape": "square", "color": "red"}, {"shape": "circle", "color": "blue"}]
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
TURNED = {"left of": "above", "right of": "below", "above": "left of", "below": "right of"}


class Captions:
    """A condition that encodes each text by its index."""

    examples = ()

    def __init__(self):
        self.texts = []

    def __call__(self, texts):
        self.texts += [text for text in texts if text not in self.texts]
        return torch.tensor([self.texts.index(text) for text in texts])

    def title(self, text):
        return text

    def check(self, source):
        pass


def shapes_data(**settings):
    source = partial(shapes, num_samples=60, held_out=HELD_OUT, **settings)
    data = ImageDataModule(source, None, 3, 32, val_fraction=0.2, batch_size=8)
    data.condition = Captions()
    data.setup()
    return data


def perfect_detections(placed, scene, number):
    """Return the correct detections of scene `number` of the placed ones."""
    centers = [tuple(center) for center in placed.center[number].tolist()][: len(scene.objects)]
    attributes = [tuple(ATTRIBUTES[a].index(getattr(each, a)) for a in OBJECT_ATTRIBUTES) for each in scene.objects]
    return Detections(centers, attributes, ATTRIBUTES["background"].index(scene.background))


class Oracle:
    """A detector that looks up the scene of each known image."""

    def __init__(self, scenes, seeds):
        placed = place(scenes, seeds)
        pairs = enumerate(zip(paint(placed, 32), scenes, strict=True))
        self.detections = {image.numpy().tobytes(): perfect_detections(placed, scene, k) for k, (image, scene) in pairs}

    def __call__(self, images):
        return [self.detections[image.numpy().tobytes()] for image in images]


@pytest.fixture
def benchmark(tmp_path, monkeypatch):
    """A shapes benchmark without a detector."""
    monkeypatch.setattr("src.evaluation.benchmarks.train_detector", lambda *args, **kwargs: None)
    monkeypatch.setattr(ShapesBenchmark, "_test_detector", lambda self, steps: {"all_9": wilson(9, 9)})
    return ShapesBenchmark(shapes_data(), AlignmentSettings(n=24, cache=tmp_path), torch.device("cpu"))


def with_object(scene, k, new):
    return scene._replace(objects=(*scene.objects[:k], new, *scene.objects[k + 1 :]))


def test_one_changed_attribute_is_the_only_wrong_one():
    """Change every attribute of every object of random scenes to every other value."""
    checked = set()
    for scene in Shapes(num_samples=10, held_out=HELD_OUT).any_scenes(60, 1):
        assert all(match_scene(scene, perfect_detections(place([scene], [0]), scene, 0)).values())
        changed = {"background": [scene._replace(background=b) for b in ATTRIBUTES["background"]]}
        for attribute in ("shape", "color", "size", "position")[: 3 if scene.relation else 4]:
            changed[attribute] = [
                scene._replace(
                    objects=(*scene.objects[:k], each._replace(**{attribute: value}), *scene.objects[k + 1 :])
                )
                for k, each in enumerate(scene.objects)
                for value in ATTRIBUTES[attribute]
            ]
        if scene.relation:
            changed["relation"] = [scene._replace(relation=table[scene.relation]) for table in (OPPOSITE, TURNED)]
        for attribute, others in changed.items():
            for number, other in enumerate(others):
                if other == scene or len({each.color for each in other.objects}) < len(other.objects):
                    continue  # scenes have distinct colors
                seen = perfect_detections(place([other], [number]), other, 0)
                wrong = {name for name, right in match_scene(scene, seen).items() if not right}
                assert wrong == {attribute}, (scene, other)
                checked.add(attribute)
    assert checked == {"background", "shape", "color", "size", "position", "relation"}


def test_surplus_objects_are_wrong_in_number_alone():
    """A scene equals its description from the other object."""
    pair = parse_scene("a small red circle left of a large blue square on a gray background")
    same = parse_scene("a large blue square right of a small red circle on a gray background")
    square = parse_scene("a large blue square in the center on a gray background")
    detected = {scene: perfect_detections(place([scene], [0]), scene, 0) for scene in (pair, square)}
    assert all(match_scene(same, detected[pair]).values())
    wrong = {"number", "shape", "color", "size", "relation"}
    assert {name for name, right in match_scene(pair, detected[square]).items() if not right} == wrong
    centers = [*detected[pair].centers, (0.9, 0.9)]
    more = Detections(centers, [*detected[pair].attributes, detected[square].attributes[0]], detected[pair].background)
    assert {name for name, right in match_scene(pair, more).items() if not right} == {"number"}
    alone = Detections([(0.5, 0.46), (0.2, 0.3)], more.attributes[1::-1], more.background)
    assert {name for name, right in match_scene(square, alone).items() if not right} == {"number"}
    nothing = Detections([], [], more.background)
    assert {name for name, right in match_scene(pair, nothing).items() if right} == {"background"}


def render_prompts(benchmark, group, per_prompt, change=lambda scene: scene):
    """Render the prompts in turn as if they were samples: the scenes and the images."""
    scenes = [change(parse_scene(prompt)) for prompt in benchmark.prompts[group]] * per_prompt
    return scenes, render(scenes, 32, range(len(scenes)))


def recolor(scene):
    """Give the first object a color that neither object has."""
    free = [c for c in ATTRIBUTES["color"] if c not in {each.color for each in scene.objects}]
    return scene._replace(objects=(scene.objects[0]._replace(color=free[0]), *scene.objects[1:]))


def test_correct_and_recolored_renders_are_scored(benchmark):
    assert [len(benchmark.prompts[group]) for group in ("seen", "held out")] == [3, 3]
    assert all(benchmark.source.is_held_out(parse_scene(prompt)) for prompt in benchmark.prompts["held out"])
    assert not any(benchmark.source.is_held_out(parse_scene(prompt)) for prompt in benchmark.prompts["seen"])
    prompts = benchmark.prompts["seen"]
    real_rms = [pairwise_rms(benchmark.real(prompt)) for prompt in prompts]
    for change, wrong in ((lambda scene: scene, {}), (recolor, {"color", "all"})):
        scenes, images = render_prompts(benchmark, "seen", 20, change)
        benchmark.detector = Oracle(scenes, range(len(scenes)))
        result = score_group(benchmark, images, prompts, prompts, real_rms, seed=0)
        metrics = {name.rpartition("_")[0]: metric for name, metric in result.metrics.items()}
        assert metrics.keys() == {*benchmark.attributes, "all", "diversity"}
        for name, metric in metrics.items():
            if name != "diversity":
                assert metric.value == (name not in wrong), name
        if not wrong:  # the contrast to the background changes
            assert metrics["diversity"].value == pytest.approx(1, abs=0.15)
        assert result.by_prompt == dict.fromkeys(prompts, 1.0 - bool(wrong))
    singles = sum(len(parse_scene(prompt).objects) == 1 for prompt in prompts)
    assert {f"position_{20 * singles}", f"relation_{60 - 20 * singles}", "all_60"} <= result.metrics.keys()


def test_accuracy_excludes_attributes_outside_the_prompt():
    right = torch.tensor([[1.0, math.nan], [0.0, 1.0], [1.0, 0.0], [1.0, math.nan]])
    metrics = attribute_accuracy(["a", "b"], right)
    assert {name: metric.value for name, metric in metrics.items()} == {"a_4": 0.75, "b_2": 0.5, "all_4": 0.5}


def test_pairwise_rms_equals_a_loop_over_pairs():
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pairs = [np.sqrt(np.mean((a.numpy().astype(float) - b.numpy()) ** 2)) for a, b in combinations(images, 2)]
    assert pairwise_rms(images) == pytest.approx(np.mean(pairs), rel=1e-9)
    assert math.isnan(pairwise_rms(images[:1]))


class Painter(torch.nn.Module):
    """A network that predicts an image for each prompt, and gray without one."""

    def __init__(self, painted, null):
        super().__init__()
        self.register_buffer("painted", torch.cat([painted, torch.zeros_like(painted[:1])]))
        self.null = null

    def forward(self, x, time, cond):
        return self.painted[torch.where(cond == self.null, len(self.painted) - 1, cond)]


def painter(benchmark, change):
    """Return a module that predicts the prompts, held-out ones after `change`, and a perfect detector."""
    texts = [prompt for group in benchmark.prompts.values() for prompt in group]
    benchmark.data.condition(texts)
    scenes = [parse_scene(text) for text in benchmark.data.condition.texts]
    shown = [change(scene) if benchmark.source.is_held_out(scene) else scene for scene in scenes]
    images = render(shown, 32, range(len(shown)))
    net = Painter(benchmark.data.preprocess(images), null=1000)
    module = DiffusionModule(
        net,
        NoiseSchedule(schedules.cosine(100)),
        GaussianDiffusion("x0"),
        partial(losses.simple, weighting=losses.uniform_weighting),
        uniform,
        Sampler(samplers.ddim, 2, "trailing"),
        shape=(3, 32, 32),
        conditioning=ConditionSpec(torch.tensor([1000]), torch.arange(2), 0.1),
    )
    return module, Oracle(shown, range(len(shown)))


def test_wrong_held_out_colors_lower_their_metrics(benchmark):
    module, benchmark.detector = painter(benchmark, recolor)
    settings = AlignmentSettings([1], batch_size=7)
    result = sample_and_score(module, module.sampler, benchmark, benchmark.data, settings, ALONE)
    seen, held_out = (
        {name: metric.value for name, metric in result.groups[group][1].metrics.items()}
        for group in ("seen", "held out")
    )
    assert {value for name, value in seen.items() if name != "diversity_24"} == {1}
    assert {name for name, value in held_out.items() if value < 1} == {"color_24", "all_24", "diversity_24"}
    assert (
        held_out["all_24"] == held_out["diversity_24"] == seen["diversity_24"] == 0
    )  # all samples of a prompt are equal
    titles = [f"{group}: {prompt}" for group, prompts in benchmark.prompts.items() for prompt in prompts]
    assert [title for title, _ in result.examples[1]] == titles
    assert {len(images) for _, images in result.examples[1]} == {8}
    assert best_scale(result.groups) == 1


class ThreadProcesses(Processes):
    """Processes that are threads."""

    def gather(self, part):
        self.shared[self.rank] = part
        self.barrier.wait()
        parts = [self.shared[k] for k in range(self.count)]
        self.barrier.wait()
        return parts

    @classmethod
    def of(cls, count):
        shared, barrier = {}, threading.Barrier(count, timeout=HANG_SECONDS)
        made = [cls(torch.device("cpu"), k, count) for k in range(count)]
        for each in made:
            object.__setattr__(each, "shared", shared)
            object.__setattr__(each, "barrier", barrier)
        return made


@pytest.fixture(scope="module")
def class_run(tmp_path_factory):
    """A class-conditional run of six steps on the digits."""
    folder = tmp_path_factory.mktemp("alignment") / "run"
    train_tiny(folder, "conditioning=class")
    return folder


@pytest.fixture(scope="module")
def digits(class_run, cache):
    data = open_run(str(class_run)).data
    return data, build_benchmark(data, AlignmentSettings(n=30, cache=cache), ALONE)


def test_two_processes_equal_one(class_run, digits):
    data, benchmark = digits
    settings = AlignmentSettings([1, 3], batch_size=4)
    results = {}

    modules = [open_run(str(class_run)).module for _ in range(3)]

    def work(processes, name):
        module = modules.pop()
        result = sample_and_score(module, module.sampler, benchmark, data, settings, processes)
        results[name] = result

    work(ALONE, "alone")
    threads = [threading.Thread(target=work, args=(each, each.rank)) for each in ThreadProcesses.of(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0].groups == results["alone"].groups
    assert results[1].groups == {"classes": {}}


def test_class_scores_equal_a_plain_loop(digits):
    """Validation digits as samples; a third of them have the prompt of the next digit."""
    data, benchmark = digits
    assert isinstance(benchmark, ClassBenchmark) and list(benchmark.prompts["classes"]) == [str(c) for c in range(10)]
    numbers = data.source.labels.targets
    by_class = [[k for k in data.val_indices if numbers[k] == c][:9] for c in range(10)]
    chosen = [by_class[(k + (k < 30)) % 10][k // 10] for k in range(90)]  # the prompt of image k is k mod 10
    images = data.postprocess(data.preprocess(data.source.fetch(chosen)))
    names = benchmark.prompts["classes"]
    real_rms = [pairwise_rms(benchmark.real(name)) for name in names]
    result = score_group(benchmark, images, names, names, real_rms, seed=0)
    right = [int(benchmark.classifier(images[k : k + 1]).probabilities.argmax()) == k % 10 for k in range(90)]
    assert result.metrics["class_90"].value == result.metrics["all_90"].value == sum(right) / 90
    assert sum(right) / 90 == pytest.approx(2 / 3, abs=0.05)
    assert result.by_prompt == {str(c): pytest.approx(np.mean(right[c::10])) for c in range(10)}
    assert {str(n): metric.value for n, metric in benchmark.detector_accuracy.items()} == {
        f"{name}_{len(data.val_indices)}": pytest.approx(benchmark.classifier.accuracy) for name in ("class", "all")
    }
    for name in names:
        shown = benchmark.real(name)
        assert (benchmark.correct(shown, [name] * len(shown)) == 1).double().mean() > 0.95


@pytest.fixture(scope="module")
def settings(class_run, cache):
    small = ["n=20", "batch_size=16", "alignment.n=40", "alignment.scales=[2,1]", "num_val=10", "num_terms=2"]
    return [f"run='{class_run}'", f"cache='{cache}'", "device=cpu", *small]


def test_evaluate_writes_table_pictures_and_metrics(settings, tmp_path, capsys):
    folder = tmp_path / "out"
    metrics = evaluate(compose("evaluate", *settings, f"run_dir='{folder}'"))
    kept = json.loads((folder / "metrics.json").read_text())["alignment"]
    assert kept["groups"] == metrics["alignment"]["groups"] and kept["sampler"] == "ancestral 3"
    assert [*kept["groups"]["classes"]] == ["1", "2"]
    for each in kept["groups"]["classes"].values():
        assert {*each["metrics"]} == {"class_40", "all_40", "diversity_40"}
        assert np.mean([*each["by_prompt"].values()]) == pytest.approx(each["metrics"]["all_40"]["value"])
    assert kept["detector"][f"class_{held_out_digits()}"]["value"] > 0.95
    table = (folder / "table.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    header = rows.index(["guidance", "prompts", "class", "all", "diversity"])
    assert [row[:2] for row in rows[header + 2 :]] == [
        ["1", "classes"],
        ["2", "classes"],
        ["", "real images"],
    ]
    assert "bits/dim of 10" in table and metric_title("fd_classifier_20") in table
    for picture in ("alignment.png", "prompts.png"):
        assert (folder / picture).stat().st_size > 1000
    said = capsys.readouterr().out
    assert "Drawing 40 samples by ancestral 3 at guidance 1, 2: about" in said and "prompts.png" in said


def evaluate_alignment_only(settings, tmp_path, *overrides):
    only = ["likelihood=false", "quality=false", f"run_dir='{tmp_path / 'out'}'"]
    return evaluate(compose("evaluate", *settings, *only, *overrides))


def test_alignment_can_be_evaluated_alone(settings, tmp_path):
    metrics = evaluate_alignment_only(settings, tmp_path)
    assert {*metrics} == {"checkpoint", "alignment"}
    assert (tmp_path / "out" / "table.md").read_text() == markdown(metrics)
    with pytest.raises(UsageError, match="nothing to evaluate"):
        evaluate_alignment_only(settings, tmp_path, "alignment.enabled=false")


def test_no_guidance_without_condition_dropout(tmp_path, cache, capsys):
    train_tiny(tmp_path / "run", "conditioning=class", "conditioning.cond_drop_prob=0")
    arguments = [f"run='{tmp_path / 'run'}'", f"cache='{cache}'", "device=cpu", "alignment.n=20"]
    metrics = evaluate_alignment_only(arguments, tmp_path)
    assert [*metrics["alignment"]["groups"]["classes"]] == ["1"]
    assert "at guidance 1 (trained with conditioning.cond_drop_prob=0)" in capsys.readouterr().out


def test_unsupported_conditions_skip_alignment_with_one_line(trained, capsys):
    opened = open_run(str(trained))
    assert build_alignment(AlignmentSettings(), opened, ALONE) is None
    assert capsys.readouterr().out == ""
    opened.data.condition = Captions()  # neither classes nor captions of shapes
    assert build_alignment(AlignmentSettings(), opened, ALONE) is None
    (line,) = capsys.readouterr().out.splitlines()
    assert "alignment" in line


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (["alignment.scales=[]"], "alignment.scales="),
        (["alignment.scales=[1,-2]"], "alignment.scales="),
        (["alignment.scales=much"], "alignment.scales="),
        (["alignment.n=1"], "alignment.n=1 "),
        (["alignment.n=12"], "alignment.n=12 .*20"),
    ],
)
def test_invalid_settings_are_rejected(settings, overrides, rule, tmp_path):
    with pytest.raises(UsageError, match=rule):
        evaluate_alignment_only(settings, tmp_path, *overrides)


def test_inaccurate_detector_warns_or_is_rejected(tmp_path, monkeypatch):
    """The detector is read from the cache unless the renderer changed."""
    data = shapes_data(objects=1)
    monkeypatch.setattr("src.evaluation.benchmarks.TEST_RENDERS", 100)
    with pytest.warns(UserWarning, match=r"alignment\.detector_steps=2 .* 99%"):
        first = build_benchmark(data, AlignmentSettings(detector_steps=2, cache=tmp_path), ALONE)
    assert {name.rpartition("_")[0] for name in first.detector_accuracy} == {
        *first.attributes,
        "all",
    }
    with monkeypatch.context() as patch:
        patch.setattr("src.metrics.detector.fit_detector", lambda *args: pytest.fail("trained again"))
        with pytest.warns(UserWarning, match=r"alignment\.detector_steps=2"):
            again = build_benchmark(data, AlignmentSettings(detector_steps=2, cache=tmp_path), ALONE)
    assert again.detector_accuracy == first.detector_accuracy
    monkeypatch.setattr("src.evaluation.benchmarks.DETECTOR_STEPS", 2)
    monkeypatch.setattr("src.data.scene_images.COLOR_JITTER", 11)
    with pytest.raises(ValueError, match=r"alignment\.detector_steps=2"):
        build_benchmark(data, AlignmentSettings(detector_steps=2, cache=tmp_path), ALONE)
    assert len([*tmp_path.glob("detector-*.safetensors")]) == 2


def test_seen_and_held_out_captions_end_to_end(tmp_path, cache, monkeypatch):
    """Train everything for a few steps only."""
    monkeypatch.setattr("src.evaluation.benchmarks.TEST_RENDERS", 50)
    small = [
        "data.source.num_samples=200",
        "data.batch_size=8",
        "callbacks.samples.num_samples=2",
        "trainer.max_steps=2",
    ]
    text = [
        "conditioning.embed.hidden_size=16",
        "conditioning.embed.num_layers=1",
        "conditioning.encode.vocab_size=400",
    ]
    text += ["conditioning.encode.max_length=64"]
    train_tiny(tmp_path / "run", "data=shapes", "conditioning=text", "validate_every=2", *small, *text)
    arguments = [f"run='{tmp_path / 'run'}'", f"cache='{cache}'", "device=cpu", "sampler.steps=2"]
    arguments += ["alignment.n=12", "alignment.scales=[1,2]", "alignment.detector_steps=3"]
    with pytest.warns(UserWarning, match=r"alignment\.detector_steps=3"):
        kept = evaluate_alignment_only(arguments, tmp_path)["alignment"]
    assert [*kept["groups"]] == ["seen", "held out"] and kept["n"] == 12
    for scales in kept["groups"].values():
        assert [*scales] == ["1", "2"]
        for each in scales.values():
            assert {"number_12", "shape_12", "background_12", "all_12", "diversity_12"} <= {*each["metrics"]}
            assert len(each["by_prompt"]) == 2  # up to 8 samples each
            assert all(parse_scene(prompt) for prompt in each["by_prompt"])
    assert "number_50" in kept["detector"]
    for name in ("alignment.png", "prompts.png", "table.md"):
        assert (tmp_path / "out" / name).stat().st_size > 500


@pytest.mark.slow
def test_fully_trained_detector_is_accurate(tmp_path):
    """Score new renders of seen and held-out captions, with correct and with wrong colors."""
    data = shapes_data()
    benchmark = build_benchmark(data, AlignmentSettings(n=400, cache=tmp_path), ALONE)
    assert all(
        metric.value > 0.99 for name, metric in benchmark.detector_accuracy.items() if not name.startswith("all_")
    )
    for group in ("seen", "held out"):
        prompts = benchmark.prompts[group]
        real_rms = [pairwise_rms(benchmark.real(prompt)) for prompt in prompts]
        for change, expected in ((lambda scene: scene, 1), (recolor, 0)):
            _, images = render_prompts(benchmark, group, 8, change)
            result = score_group(benchmark, images, prompts, prompts, real_rms, seed=0)
            for name, metric in result.metrics.items():
                if name.startswith(("all_", "color_")):
                    assert metric.value == pytest.approx(expected, abs=0.03), name
                elif name.startswith("diversity"):  # the contrast to the background changes
                    assert not expected or metric.value == pytest.approx(1, abs=0.1), name
                else:  # errors of eight renders of one caption are correlated
                    assert metric.value == pytest.approx(1, abs=0.04), name
