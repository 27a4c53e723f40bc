"""Whether samples show what they were asked to: who judges them, the figures, and what `src.evaluate` leaves."""

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
from src.evaluate import build_benchmark as command_exam_of
from src.evaluate import evaluate
from src.metrics.confidence import wilson
from src.metrics.detector import Seen
from src.runs.open import open_run
from src.viz.tables import markdown
from tests.conftest import HANG_SECONDS, compose, train_tiny
from tests.data.test_split import held_out_digits


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import what takes seconds here, since every collection of the tests would pay for it above."""
    global \
        binomtest, \
        LOOKS, \
        ClassBenchmark, \
        Settings, \
        ShapesBenchmark, \
        aligned, \
        best, \
        compared, \
        sample_and_score, \
        build_benchmark
    global shares, spread, ImageDataModule, ATTRIBUTES, Shapes, paint, parse, place, render, shapes, ConditionSpec
    global DiffusionModule, Sampler
    from scipy.stats import binomtest

    from src.data.images import ImageDataModule
    from src.data.shapes import ATTRIBUTES, Shapes, paint, parse, place, render, shapes
    from src.evaluation.alignment import (
        LOOKS,
        ClassBenchmark,
        Settings,
        ShapesBenchmark,
        aligned,
        best,
        build_benchmark,
        compared,
        sample_and_score,
        shares,
        spread,
    )
    from src.training.module import ConditionSpec, DiffusionModule, Sampler


ALONE = Processes(torch.device("cpu"))
HELD_OUT = [{"shape": "square", "color": "red"}, {"shape": "circle", "color": "blue"}]
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
TURNED = {"left of": "above", "right of": "below", "above": "left of", "below": "right of"}


@pytest.mark.parametrize(("right", "n"), [(0, 10), (3, 10), (10, 10), (199, 200), (1, 1)])
@pytest.mark.parametrize("level", [0.95, 0.5])
def test_wilsons_interval_is_scipys(right, n, level):
    theirs = binomtest(right, n).proportion_ci(level, method="wilson")
    ours = wilson(right, n, level)
    assert ours == pytest.approx((right / n, theirs.low, theirs.high), abs=1e-12)
    with pytest.raises(ValueError, match="of at least one sample"):
        wilson(n + 1, n)


class Captions:
    """A condition of texts: each is known by its number."""

    examples = ()

    def __init__(self):
        self.texts = []

    def __call__(self, asked):
        self.texts += [text for text in asked if text not in self.texts]
        return torch.tensor([self.texts.index(text) for text in asked])

    def title(self, asked):
        return asked

    def check(self, source):
        pass


def shapes_data(**settings):
    source = partial(shapes, num_samples=60, held_out=HELD_OUT, **settings)
    data = ImageDataModule(source, None, 3, 32, val_fraction=0.2, batch_size=8)
    data.condition = Captions()
    data.setup()
    return data


def what_is_seen(placed, scene, number):
    """What a perfect judge sees of scene `number` of those that were placed."""
    middles = [tuple(middle) for middle in placed.center[number].tolist()][: len(scene.objects)]
    looks = [tuple(ATTRIBUTES[look].index(getattr(each, look)) for look in LOOKS) for each in scene.objects]
    return Seen(middles, looks, ATTRIBUTES["background"].index(scene.background))


class Oracle:
    """Sees what a picture shows because it was told so."""

    def __init__(self, scenes, seeds):
        placed = place(scenes, seeds)
        pairs = enumerate(zip(paint(placed, 32), scenes, strict=True))
        self.told = {image.numpy().tobytes(): what_is_seen(placed, scene, k) for k, (image, scene) in pairs}

    def __call__(self, images):
        return [self.told[image.numpy().tobytes()] for image in images]


@pytest.fixture
def benchmark(tmp_path, monkeypatch):
    """Of shapes, with no judge yet."""
    monkeypatch.setattr("src.evaluation.alignment.train_detector", lambda *args, **kwargs: None)
    monkeypatch.setattr(ShapesBenchmark, "_tested", lambda self, steps: {"all_9": wilson(9, 9)})
    return ShapesBenchmark(shapes_data(), Settings(n=24, cache=tmp_path), torch.device("cpu"), list)


def test_what_differs_in_one_attribute_is_wrong_in_it_alone():
    """Every attribute of every object of random scenes, changed to every other value."""
    checked = set()
    for scene in Shapes(num_samples=10, held_out=HELD_OUT).any_scenes(60, 1):
        assert all(compared(scene, what_is_seen(place([scene], [0]), scene, 0)).values())
        changed = {"background": [scene._replace(background=b) for b in ATTRIBUTES["background"]]}
        for look in ("shape", "color", "size", "position")[: 3 if scene.relation else 4]:
            changed[look] = [
                scene._replace(objects=(*scene.objects[:k], each._replace(**{look: value}), *scene.objects[k + 1 :]))
                for k, each in enumerate(scene.objects)
                for value in ATTRIBUTES[look]
            ]
        if scene.relation:
            changed["relation"] = [scene._replace(relation=table[scene.relation]) for table in (OPPOSITE, TURNED)]
        for attribute, others in changed.items():
            for number, other in enumerate(others):
                if other == scene or len({each.color for each in other.objects}) < len(other.objects):
                    continue  # two objects of one color are no scene
                seen = what_is_seen(place([other], [number]), other, 0)
                wrong = {name for name, right in compared(scene, seen).items() if not right}
                assert wrong == {attribute}, (scene, other)
                checked.add(attribute)
    assert checked == {"background", "shape", "color", "size", "position", "relation"}


def test_the_number_of_objects_is_an_attribute_of_its_own():
    """And a scene is the same told from its other object."""
    pair = parse("a small red circle left of a large blue square on a grey background")
    same = parse("a large blue square right of a small red circle on a grey background")
    square = parse("a large blue square in the centre on a grey background")
    seen = {scene: what_is_seen(place([scene], [0]), scene, 0) for scene in (pair, square)}
    assert all(compared(same, seen[pair]).values())
    wrong = {"number", "shape", "color", "size", "relation"}
    assert {name for name, right in compared(pair, seen[square]).items() if not right} == wrong
    middles = [*seen[pair].middles, (0.9, 0.9)]
    more = Seen(middles, [*seen[pair].looks, seen[square].looks[0]], seen[pair].ground)
    assert {name for name, right in compared(pair, more).items() if not right} == {"number"}
    alone = Seen([(0.5, 0.46), (0.2, 0.3)], more.looks[1::-1], more.ground)  # the square is there, but not alone
    assert {name for name, right in compared(square, alone).items() if not right} == {"number"}
    nothing = Seen([], [], more.ground)
    assert {name for name, right in compared(pair, nothing).items() if right} == {"background"}


def pictures(benchmark, group, per_prompt, change=lambda scene: scene):
    """Renders as if they were samples, prompt by turns: what is shown in each, and the images."""
    scenes = [change(parse(prompt)) for prompt in benchmark.prompts[group]] * per_prompt
    return scenes, render(scenes, 32, range(len(scenes)))


def other_colour(scene):
    """The first object in a color that neither has."""
    free = [c for c in ATTRIBUTES["color"] if c not in {each.color for each in scene.objects}]
    return scene._replace(objects=(scene.objects[0]._replace(color=free[0]), *scene.objects[1:]))


def test_real_renders_are_right_and_vary_as_much_and_a_wrong_colour_is_wrong_in_colour_alone(benchmark):
    assert [len(benchmark.prompts[group]) for group in ("seen", "held out")] == [3, 3]
    assert all(benchmark.source.is_held_out(parse(prompt)) for prompt in benchmark.prompts["held out"])
    assert not any(benchmark.source.is_held_out(parse(prompt)) for prompt in benchmark.prompts["seen"])
    prompts = benchmark.prompts["seen"]
    usual = [spread(benchmark.real(prompt)) for prompt in prompts]
    for change, wrong in ((lambda scene: scene, {}), (other_colour, {"color", "all"})):
        scenes, images = pictures(benchmark, "seen", 20, change)
        benchmark.detector = Oracle(scenes, range(len(scenes)))
        result = aligned(benchmark, images, prompts, prompts, usual, seed=0)
        figures = {name.rpartition("_")[0]: figure for name, figure in result.figures.items()}
        assert figures.keys() == {*benchmark.attributes, "all", "diversity"}
        for name, figure in figures.items():
            if name != "diversity":
                assert figure.value == (name not in wrong), name
        if not wrong:  # another color differs otherwise from the background
            assert figures["diversity"].value == pytest.approx(1, abs=0.15)
        assert result.by_prompt == dict.fromkeys(prompts, 1.0 - bool(wrong))
    singles = sum(len(parse(prompt).objects) == 1 for prompt in prompts)
    assert {f"position_{20 * singles}", f"relation_{60 - 20 * singles}", "all_60"} <= result.figures.keys()


def test_shares_count_only_what_was_asked_for():
    right = torch.tensor([[1.0, math.nan], [0.0, 1.0], [1.0, 0.0], [1.0, math.nan]])
    figures = shares(["a", "b"], right)
    assert {name: figure.value for name, figure in figures.items()} == {"a_4": 0.75, "b_2": 0.5, "all_4": 0.5}


def test_spread_is_the_mean_rms_difference_of_pairs():
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pairs = [np.sqrt(np.mean((a.numpy().astype(float) - b.numpy()) ** 2)) for a, b in combinations(images, 2)]
    assert spread(images) == pytest.approx(np.mean(pairs), rel=1e-9)
    assert math.isnan(spread(images[:1]))


class Painter(torch.nn.Module):
    """A network that knows the answer: it paints a picture of what it is asked for, and grey for nothing."""

    def __init__(self, painted, null):
        super().__init__()
        self.register_buffer("painted", torch.cat([painted, torch.zeros_like(painted[:1])]))
        self.null = null

    def forward(self, x, time, cond):
        return self.painted[torch.where(cond == self.null, len(self.painted) - 1, cond)]


def painter(benchmark, change):
    """A module that paints the prompts, those that are held out `change`d; and an oracle for its pictures."""
    texts = [prompt for group in benchmark.prompts.values() for prompt in group]
    benchmark.data.condition(texts)
    asked = [parse(text) for text in benchmark.data.condition.texts]
    shown = [change(scene) if benchmark.source.is_held_out(scene) else scene for scene in asked]
    images = render(shown, 32, range(len(shown)))
    net = Painter(benchmark.data.preprocess(images), null=1000)
    module = DiffusionModule(
        net,
        NoiseSchedule(schedules.cosine(100)),
        GaussianDiffusion("x0"),
        partial(losses.simple, weighting=losses.uniform),
        uniform,
        Sampler(samplers.ddim, 2, "trailing"),
        shape=(3, 32, 32),
        conditioning=ConditionSpec(torch.tensor([1000]), torch.arange(2), 0.1),
    )
    return module, Oracle(shown, range(len(shown)))


def test_a_model_that_fails_at_held_out_colours_is_found_out(benchmark):
    module, benchmark.detector = painter(benchmark, other_colour)
    settings = Settings([1], batch_size=7)
    asked = sample_and_score(
        module, module.sampler, benchmark, benchmark.data, settings, ALONE, lambda scale, count: None
    )
    seen, held_out = (
        {name: figure.value for name, figure in asked.found[group][1].figures.items()} for group in ("seen", "held out")
    )
    assert {value for name, value in seen.items() if name != "diversity_24"} == {1}
    assert {name for name, value in held_out.items() if value < 1} == {"colour_24", "all_24", "diversity_24"}
    assert held_out["all_24"] == held_out["diversity_24"] == seen["diversity_24"] == 0  # it paints but one of each
    titles = [f"{group}: {prompt}" for group, prompts in benchmark.prompts.items() for prompt in prompts]
    assert [title for title, _ in asked.shown[1]] == titles
    assert {len(images) for _, images in asked.shown[1]} == {8}
    assert best(asked.found) == 1


class Together(Processes):
    """Two processes that are threads."""

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
def told(tmp_path_factory):
    """A run of six steps on the digits that is told their classes."""
    folder = tmp_path_factory.mktemp("alignment") / "run"
    train_tiny(folder, "conditioning=class")
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def digits(told, cache):
    data = open_run(str(told)).data
    return data, build_benchmark(data, Settings(n=30, cache=cache), ALONE)


def test_two_processes_find_what_one_finds(told, digits):
    data, benchmark = digits
    settings = Settings([1, 3], batch_size=4)
    results = {}

    modules = [open_run(str(told)).module for _ in range(3)]

    def work(processes, name):
        module = modules.pop()
        asked = sample_and_score(
            module, module.sampler, benchmark, data, settings, processes, lambda scale, count: None
        )
        results[name] = asked

    work(ALONE, "alone")
    threads = [threading.Thread(target=work, args=(each, each.rank)) for each in Together.of(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0].found == results["alone"].found
    assert results[1].found == {"classes": {}}


def test_classes_are_judged_by_the_classifier_and_its_own_mistakes_are_told(digits):
    """Held-out digits as samples, a third of them asked to be the next digit: shares by a plain loop."""
    data, benchmark = digits
    assert isinstance(benchmark, ClassBenchmark) and list(benchmark.prompts["classes"]) == [str(c) for c in range(10)]
    numbers = data.source.labels.targets
    by_class = [[k for k in data.val_indices if numbers[k] == c][:9] for c in range(10)]
    chosen = [by_class[(k + (k < 30)) % 10][k // 10] for k in range(90)]  # number k is asked to be k mod 10
    images = data.postprocess(data.preprocess(data.source.fetch(chosen)))
    names = benchmark.prompts["classes"]
    usual = [spread(benchmark.real(name)) for name in names]
    found = aligned(benchmark, images, names, names, usual, seed=0)
    right = [int(benchmark.classifier(images[k : k + 1]).probabilities.argmax()) == k % 10 for k in range(90)]
    assert found.figures["class_90"].value == found.figures["all_90"].value == sum(right) / 90
    assert sum(right) / 90 == pytest.approx(2 / 3, abs=0.05)
    assert found.by_prompt == {str(c): pytest.approx(np.mean(right[c::10])) for c in range(10)}
    assert {str(n): figure.value for n, figure in benchmark.own.items()} == {
        f"{name}_{len(data.val_indices)}": pytest.approx(benchmark.classifier.accuracy) for name in ("class", "all")
    }
    for name in names:
        shown = benchmark.real(name)
        assert (benchmark.right(shown, [name] * len(shown)) == 1).double().mean() > 0.95


@pytest.fixture(scope="module")
def settings(told, cache):
    small = ["n=20", "batch_size=16", "alignment.n=40", "alignment.scales=[2,1]", "num_val=10", "num_terms=2"]
    return [f"run='{told}'", f"cache='{cache}'", "device=cpu", *small]


def test_evaluate_leaves_table_pictures_and_figures(settings, tmp_path, capsys):
    folder = tmp_path / "out"
    metrics = evaluate(compose("evaluate", *settings, f"run_dir='{folder}'"))
    kept = json.loads((folder / "metrics.json").read_text())["alignment"]
    assert kept["asked"] == metrics["alignment"]["asked"] and kept["sampler"] == "ancestral 3"
    assert [*kept["asked"]["classes"]] == ["1", "2"]
    for each in kept["asked"]["classes"].values():
        assert {*each["figures"]} == {"class_40", "all_40", "diversity_40"}
        assert np.mean([*each["by_prompt"].values()]) == pytest.approx(each["figures"]["all_40"]["value"])
    assert kept["judge"][f"class_{held_out_digits()}"]["value"] > 0.95
    table = (folder / "table.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    header = rows.index(["guidance", "asked for", "class", "all", "diversity"])
    assert [row[:2] for row in rows[header + 2 :]] == [
        ["1", "classes"],
        ["2", "classes"],
        ["", "real images, as judged"],
    ]
    assert "bits/dim of 10 held-out" in table and "fd_classifier_20" in table
    for picture in ("alignment.png", "asked.png"):
        assert (folder / picture).stat().st_size > 1000
    said = capsys.readouterr().out
    assert "Drawing 40 samples by ancestral 3 at guidance 1, 2: about" in said and "asked.png" in said


def alone(settings, tmp_path, *overrides):
    only = ["likelihood=false", "quality=false", f"run_dir='{tmp_path / 'out'}'"]
    return evaluate(compose("evaluate", *settings, *only, *overrides))


def test_alignment_alone_and_without_it(settings, tmp_path):
    metrics = alone(settings, tmp_path)
    assert {*metrics} == {"checkpoint", "alignment"}
    assert (tmp_path / "out" / "table.md").read_text() == markdown(metrics)
    with pytest.raises(UsageError, match="nothing to evaluate"):
        alone(settings, tmp_path, "alignment.enabled=false")


def test_a_run_that_never_was_told_nothing_is_measured_without_guidance(tmp_path, cache, capsys):
    train_tiny(tmp_path / "run", "conditioning=class", "conditioning.cond_drop_prob=0")
    asked = [f"run='{tmp_path / 'run'}'", f"cache='{cache}'", "device=cpu", "alignment.n=20"]
    metrics = alone(asked, tmp_path)
    assert [*metrics["alignment"]["asked"]["classes"]] == ["1"]
    assert "at guidance 1, as this run never learned" in capsys.readouterr().out


def test_runs_without_conditions_say_nothing_of_it_and_others_one_line(trained, capsys):
    opened = open_run(str(trained))
    assert command_exam_of(compose("evaluate"), opened, ALONE) is None
    assert capsys.readouterr().out == ""
    opened.data.condition = Captions()  # of images without classes, and of no known scenes
    assert command_exam_of(compose("evaluate"), opened, ALONE) is None
    (line,) = capsys.readouterr().out.splitlines()
    assert "not of this run's conditions" in line


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (["alignment.scales=[]"], "one or more scales of guidance from 0 on"),
        (["alignment.scales=[1,-2]"], r"from 0 on, got \[1, -2\]"),
        (["alignment.scales=much"], r"from 0 on, got \['much'\]"),
        (["alignment.n=1"], "alignment.n must be at least 2, got 1"),
        (["alignment.n=12"], "alignment.n=12 leaves less than two samples to each of 10 classes"),
    ],
)
def test_what_cannot_be_measured_is_refused(settings, overrides, rule, tmp_path):
    with pytest.raises(UsageError, match=rule):
        alone(settings, tmp_path, *overrides)


def test_a_judge_that_learned_little_is_told_of_or_refused(tmp_path, monkeypatch):
    """And is read from the cache, unless the renders have changed."""
    data = shapes_data(objects=1)
    monkeypatch.setattr("src.evaluation.alignment.RENDERS", 100)
    with pytest.warns(UserWarning, match=r"right in \w+ on .* of fresh renders, less than 99%"):
        first = build_benchmark(data, Settings(detector_steps=2, cache=tmp_path), ALONE)
    assert {name.rpartition("_")[0] for name in first.own} == {*first.attributes, "all"}  # of two objects too
    with monkeypatch.context() as patch:
        patch.setattr("src.metrics.detector.fit", lambda *args: pytest.fail("trained again"))
        with pytest.warns(UserWarning, match="fresh renders"):
            again = build_benchmark(data, Settings(detector_steps=2, cache=tmp_path), ALONE)
    assert again.own == first.own
    monkeypatch.setattr("src.evaluation.alignment.DETECTOR_STEPS", 2)
    monkeypatch.setattr("src.data.shapes.COLOR_JITTER", 11)
    with pytest.raises(ValueError, match=r"raise alignment\.judge_steps=2"):
        build_benchmark(data, Settings(detector_steps=2, cache=tmp_path), ALONE)
    assert len([*tmp_path.glob("judge-*.safetensors")]) == 2


def test_captions_of_shapes_are_measured_seen_and_held_out(tmp_path, cache, monkeypatch):
    """From end to end, with next to no training of anything."""
    monkeypatch.setattr("src.evaluation.alignment.RENDERS", 50)
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
    asked = [f"run='{tmp_path / 'run'}'", f"cache='{cache}'", "device=cpu", "sampler.steps=2"]
    asked += ["alignment.n=12", "alignment.scales=[1,2]", "alignment.detector_steps=3"]
    with pytest.warns(UserWarning, match="of fresh renders, less than 99%"):
        kept = alone(asked, tmp_path)["alignment"]
    assert [*kept["asked"]] == ["seen", "held out"] and kept["n"] == 12
    for scales in kept["asked"].values():
        assert [*scales] == ["1", "2"]
        for each in scales.values():
            assert {"number_12", "shape_12", "background_12", "all_12", "diversity_12"} <= {*each["figures"]}
            assert len(each["by_prompt"]) == 2  # of 8 samples, or fewer, each
            assert all(parse(prompt) for prompt in each["by_prompt"])
    assert "number_50" in kept["judge"]
    for name in ("alignment.png", "asked.png", "table.md"):
        assert (tmp_path / "out" / name).stat().st_size > 500


@pytest.mark.slow
def test_the_judge_of_shapes_is_right(tmp_path):
    """On renders of captions, seen and held out, that it has not learned from; and sees a wrong color in color."""
    data = shapes_data()
    benchmark = build_benchmark(data, Settings(n=400, cache=tmp_path), ALONE)
    assert all(figure.value > 0.99 for name, figure in benchmark.own.items() if not name.startswith("all_"))
    for group in ("seen", "held out"):
        prompts = benchmark.prompts[group]
        usual = [spread(benchmark.real(prompt)) for prompt in prompts]
        for change, expected in ((lambda scene: scene, 1), (other_colour, 0)):
            _, images = pictures(benchmark, group, 8, change)
            found = aligned(benchmark, images, prompts, prompts, usual, seed=0)
            for name, figure in found.figures.items():
                if name.startswith(("all_", "color_")):
                    assert figure.value == pytest.approx(expected, abs=0.03), name
                elif name.startswith("diversity"):  # another color differs otherwise from the background
                    assert not expected or figure.value == pytest.approx(1, abs=0.1), name
                else:  # eight renders of one caption err together
                    assert figure.value == pytest.approx(1, abs=0.04), name
