"""Shapes: captions map back to scenes, images show their captions, held-out combinations never occur."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor
from torch.testing import assert_close

from tests.conftest import compose
from tests.loops import for_each


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not at collection."""
    global SHAPES, SIZES, ONE, TWO
    global Outline, ATTRIBUTES, COLOR_JITTER, COLORS, GAP, PLACES, RELATIONS, WORDINGS, Object, Placed, Scene
    global Shapes, describe_scene, paint, parse_scene, place, render, shapes, wordings
    from matplotlib.path import Path as Outline

    from src.data.scene_images import COLOR_JITTER, COLORS, GAP, PLACES, Placed, paint, place, render
    from src.data.scenes import (
        ATTRIBUTES,
        RELATIONS,
        WORDINGS,
        Object,
        Scene,
        describe_scene,
        parse_scene,
        wordings,
    )
    from src.data.shapes import Shapes, shapes

    SHAPES, SIZES = ATTRIBUTES["shape"], ATTRIBUTES["size"]
    ONE, TWO = all_scenes(1), all_scenes(2)


HELD_OUT = [{"shape": "circle", "color": "blue"}, {"color": "red", "background": "white"}]


def all_scenes(count: int) -> list[Scene]:
    """Return every scene with `count` objects, by an independent implementation."""
    attributes = [Object(a, b, c) for a in SHAPES for b in ATTRIBUTES["color"] for c in SIZES]
    if count == 1:
        single = [look._replace(position=p) for look in attributes for p in ATTRIBUTES["position"]]
        return [Scene((each,), b) for each in single for b in ATTRIBUTES["background"]]
    pairs = [(a, b) for a in attributes for b in attributes if a.color != b.color]
    return [Scene(pair, b, r) for pair in pairs for b in ATTRIBUTES["background"] for r in RELATIONS]


def values(scene: Scene) -> set[tuple[str, str]]:
    facts = {(name, value) for each in scene.objects for name, value in each._asdict().items() if value is not None}
    return facts | {("background", scene.background)} | ({("relation", scene.relation)} if scene.relation else set())


def has_blue_circle(scene: Scene) -> bool:
    return any(each.shape == "circle" and each.color == "blue" for each in scene.objects)


def forbidden(scene: Scene) -> bool:
    """Return whether `HELD_OUT` excludes a scene, by an independent implementation."""
    return has_blue_circle(scene) or (
        scene.background == "white" and any(each.color == "red" for each in scene.objects)
    )


def test_each_caption_parses_to_its_scene():
    """For all scenes in all wordings, no text describes two scenes."""
    scene_of: dict[str, Scene] = {}
    for scene in ONE + TWO:
        texts = wordings(scene)
        assert texts == [describe_scene(scene, k) for k in range(WORDINGS)]
        assert len(set(texts)) == WORDINGS >= 3
        scene_of.update(dict.fromkeys(texts, scene))
    assert len(scene_of) == WORDINGS * (len(ONE) + len(TWO))
    assert len(ONE) == 4 * 6 * 2 * 5 * 3 and len(TWO) == 48 * 40 * 3 * 4
    assert all(parse_scene(text) == scene_of[text] for text in list(scene_of)[::7])


def test_captions_are_parsed_as_people_write_them():
    small, large = Object("circle", "red", "small", "top left"), Object("square", "blue", "large")
    assert describe_scene(Scene((small,), "black")) == "a small red circle at the top left on a black background"
    two = Scene((small._replace(position=None), large), "gray", "left of")
    assert describe_scene(two) == "a small red circle left of a large blue square on a gray background"
    assert parse_scene("  A small red circle left of a large\nblue square on a GRAY background. ") == two
    assert parse_scene("large blue square, center, white background").objects[0].position == "center"
    british = "a small red circle in the centre on a grey background"
    assert describe_scene(parse_scene(british)) == british.replace("centre", "center").replace("grey", "gray")
    assert parse_scene("a small red circle above a small red circle on a black background").relation == "above"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a small pimk circle in the center on a black background", "'pimk'"),
        ("a small red squar in the center on a black background", "square"),
        ("a small red circle", "not a caption"),
        ("a small red circle left of a large blue square", "not a caption"),
        ("", "not a caption"),
        ("a small red circle on a black background (a.*)", "is unknown"),
    ],
)
def test_other_texts_raise(text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_scene(text)
    assert "\n" not in str(error.value)
    assert "'a small red circle at the top left on a black background'" in str(error.value)


def placed_alike(scenes: list[Scene]) -> Placed:
    return place(scenes, range(len(scenes)))


@pytest.fixture(scope="module")
def placed_one() -> Placed:
    return placed_alike(ONE * 4)


@pytest.fixture(scope="module")
def placed_two() -> Placed:
    return placed_alike(TWO)


def test_single_objects_lie_at_their_position(placed_one):
    """Each is nearer to its own position than to any other, by at least 0.1, and inside the image."""
    center, half = placed_one.center[:, 0], placed_one.half[:, 0]
    assert (center - half).min() >= 0 and (center + half).max() <= 1
    names = list(PLACES)
    assert names == list(ATTRIBUTES["position"])
    away = (center[:, None] - torch.tensor(list(PLACES.values()))).norm(dim=2)  # (N, 5)
    own = torch.tensor([names.index(scene.objects[0].position or "") for scene in ONE * 4])
    nearest, second = away.topk(2, largest=False).values.unbind(1)
    assert torch.equal(away.argmin(1), own)
    assert (second - nearest).min() > 0.1
    assert (placed_one.shape[:, 1] == -1).all()
    assert center.std(0).min() > 0.1 and nearest.std() > 0.01


def test_two_objects_satisfy_their_relation_without_touching(placed_two):
    """The relation holds for centers, the other direction is much smaller, and boxes are a gap apart."""
    center, half = placed_two.center, placed_two.half
    assert (center - half).min() >= 0 and (center + half).max() <= 1
    right, down = (center[:, 1] - center[:, 0]).unbind(1)
    wanted = {"left of": right, "right of": -right, "above": down, "below": -down}
    other = {"left of": down, "right of": down, "above": right, "below": right}
    along = torch.stack([wanted[scene.relation][k] for k, scene in enumerate(TWO)])
    across = torch.stack([other[scene.relation][k] for k, scene in enumerate(TWO)])
    assert (along > 2.5 * across.abs()).all()
    apart = ((center[:, 0] - center[:, 1]).abs() - half.sum(1)).max(1).values
    assert apart.min() > GAP - 1e-9
    assert along.std() > 0.03 and across.std() > 0.01


def test_sizes_and_colors_are_unambiguous(placed_one, placed_two):
    """Every small object has less area than any large one; each color is nearest to its name's."""
    for placed, scenes in ((placed_one, ONE * 4), (placed_two, TWO)):
        large = torch.tensor([[each.size == "large" for each in scene.objects] for scene in scenes])
        radius = placed.radius[:, : large.shape[1]]
        assert (radius[large].min() / radius[~large].max()).square() > 1.5
        assert radius[large].std() > 0.005 and radius[~large].std() > 0.005
        names = list(COLORS)
        table = torch.tensor(list(COLORS.values()), dtype=torch.float64)
        for k in range(large.shape[1]):
            own = torch.tensor([names.index(scene.objects[k].color) for scene in scenes])
            assert torch.equal(torch.cdist(placed.color[:, k], table).argmin(1), own)
            assert (placed.color[:, k] - table[own]).abs().max() > 0.9 * COLOR_JITTER
        own = torch.tensor([names.index(scene.background) for scene in scenes])
        assert torch.equal(torch.cdist(placed.background, table).argmin(1), own)
    for a, b in combinations(COLORS, 2):
        assert math.dist(COLORS[a], COLORS[b]) > 4 * COLOR_JITTER * math.sqrt(3)


def corners(shape: str, area: float) -> np.ndarray:
    """Return the outline (K, 2) of a shape of this area around its centroid, y downwards."""
    if shape == "circle":
        angle = np.linspace(0, 2 * np.pi, 90, endpoint=False)
        return math.sqrt(area / np.pi) * np.stack([np.cos(angle), np.sin(angle)], 1)
    if shape == "square":
        side = math.sqrt(area)
        return side / 2 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    if shape == "triangle":
        side = math.sqrt(4 * area / math.sqrt(3))
        height = side * math.sqrt(3) / 2
        return np.array([[0, -2 * height / 3], [side / 2, height / 3], [-side / 2, height / 3]])
    arm = math.sqrt(area / 5)  # five squares
    quarter = np.array([[1, -3], [1, -1], [3, -1]]) * arm / 2
    turned = [quarter @ np.linalg.matrix_power(np.array([[0, 1], [-1, 0]]), k) for k in range(4)]
    return np.concatenate(turned)


def coverage(outline: np.ndarray, size: int, fine: int = 8) -> np.ndarray:
    """Return the covered part of each of size x size pixels, for an outline relative to the image size."""
    ticks = (np.arange(size * fine) + 0.5) / (size * fine)
    x, y = np.meshgrid(ticks, ticks)
    inside = Outline(outline).contains_points(np.stack([x.ravel(), y.ravel()], 1)).reshape(size, fine, size, fine)
    return inside.mean((1, 3))


@for_each("shape", lambda: SHAPES)
@pytest.mark.parametrize("size", [32, 96])
def test_images_match_rasterized_outlines(shape, size):
    """Each pixel blends in as much of the object's color as a finer grid counts."""
    scenes = [s for s in ONE if s.objects[0].shape == shape][:: 17 * size // 32]
    placed = placed_alike(scenes)
    white = placed._replace(color=torch.full_like(placed.color, 255), background=torch.zeros_like(placed.background))
    found = paint(white, size).double() / 255
    assert torch.equal(found[:, 0], found[:, 2])
    for k in range(len(scenes)):
        outline = corners(shape, math.pi * float(placed.radius[k, 0]) ** 2)
        middle = (outline.max(0) + outline.min(0)) / 2
        expected = coverage(outline - middle + placed.center[k, 0].numpy(), size)
        error = np.abs(found[k, 0].numpy() - expected)
        assert error.max() < 0.4  # at sharp corners, where the distance is underestimated
        assert error.sum() < 0.1 * expected.sum()
        assert found[k, 0].mean() == pytest.approx(expected.mean(), rel=0.05)


def mask_of(image: Tensor) -> np.ndarray:
    """Return the foreground part of each pixel of (3, S, S) in [0, 1]; the corner is background."""
    flat = image.double().flatten(1)
    away = flat - flat[:, :1]
    farthest = away[:, away.norm(dim=0).argmax()]
    return (farthest @ away / farthest.square().sum()).clamp(0, 1).view(image.shape[1:]).numpy()


def test_captions_can_be_read_off_images():
    """Shape by the best outline of equal area and centroid, size by area; colors and position directly."""
    scenes = ONE[::3]
    images = render(scenes, 32, [7 + k for k in range(len(scenes))])
    assert images.dtype == torch.uint8 and images.shape == (len(scenes), 3, 32, 32)
    ticks = (np.arange(32) + 0.5) / 32
    table = torch.tensor(list(COLORS.values())).double()
    for scene, image in zip(scenes, images, strict=True):
        mask, one = mask_of(image), scene.objects[0]
        area, centroid = mask.mean(), np.array([(mask.sum(0) * ticks).sum(), (mask.sum(1) * ticks).sum()]) / mask.sum()
        misfit = {name: np.abs(mask - coverage(corners(name, area) + centroid, 32, 4)).sum() for name in SHAPES}
        ordered = sorted(misfit, key=lambda name: misfit[name])
        assert ordered[0] == one.shape
        assert misfit[ordered[1]] > 1.2 * misfit[one.shape]
        assert (area > math.pi * 0.128**2) == (one.size == "large")
        nearest = min(PLACES, key=lambda name: math.dist(PLACES[name], centroid))
        assert nearest == one.position
        inside = image[:, torch.from_numpy(mask > 0.95)].double().mean(1)
        assert list(COLORS)[int((table - inside).norm(dim=1).argmin())] == one.color
        assert list(COLORS)[int((table - image[:, 0, 0].double()).norm(dim=1).argmin())] == scene.background


def test_larger_images_show_the_same():
    """A 128 x 128 image averaged over 4 x 4 blocks equals the 32 x 32 image up to antialiasing."""
    scenes = (ONE + TWO)[::500]
    small, large = (render(scenes, size, range(len(scenes))).double() for size in (32, 128))
    assert (torch.nn.functional.avg_pool2d(large, 4) - small).abs().mean() < 0.5


def test_a_sample_depends_on_seed_and_index_only():
    """It depends neither on its batch, nor on num_samples, nor on torch's global generator."""
    source = Shapes(num_samples=100, held_out=HELD_OUT, seed=3)
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    x = source.fetch([5, 70, 5])
    assert_close(torch.rand(2), expected, rtol=0, atol=0)
    assert torch.equal(x[0], x[2]) and not torch.equal(x[0], x[1])
    more = Shapes(num_samples=1000, held_out=HELD_OUT, seed=3)
    assert torch.equal(more.fetch([70]), x[1:2])
    assert more.scenes[70] == source.scenes[70]
    assert torch.equal(pickle.loads(pickle.dumps(source)).fetch([5]), x[:1])
    assert not torch.equal(Shapes(num_samples=100, held_out=HELD_OUT, seed=4).fetch([5]), x[:1])
    one = place([ONE[0], TWO[0]], [8, 9]), place([TWO[0]], [9])
    assert_close(one[0].center[1:], one[1].center, rtol=0, atol=0)
    assert x.shape == (3, 3, 32, 32) and x.dtype == torch.uint8
    with pytest.raises(ValueError, match=r"got 1 for 2"):
        render([ONE[0], ONE[1]], 32, [1])


def test_captions_belong_to_their_images():
    """Lazy sequences support slices and negative indices."""
    source = Shapes(num_samples=50)
    assert source.captions is not None
    assert len(source) == len(source.captions) == len(source.scenes) == 50
    assert source.labels is None and source.covariates is None
    for k in (0, 17, 49):
        assert source.captions[k] == wordings(source.scenes[k])
        assert parse_scene(source.captions[k][2]) == source.scenes[k]
    assert source.captions[-1] == source.captions[49]
    assert source.scenes[3:5] == [source.scenes[3], source.scenes[4]]
    assert len(list(source.scenes)) == 50
    with pytest.raises(IndexError):
        source.captions[50]


@pytest.mark.parametrize(("objects", "share"), [(1, 0.0), (2, 1.0), ("both", 0.5)])
def test_held_out_combinations_never_occur(objects, share):
    """Every single attribute still occurs."""
    n = 6000
    source = Shapes(num_samples=n, objects=objects, held_out=HELD_OUT)
    scenes = list(source.scenes)
    assert not any(map(forbidden, scenes)) and not any(map(source.is_held_out, scenes))
    two = sum(len(scene.objects) == 2 for scene in scenes) / n
    assert abs(two - share) < 5 * math.sqrt(0.25 / n)
    counts = Counter(value for scene in scenes for value in values(scene))
    names = [name for name in ATTRIBUTES if name != "position" or objects != 2]
    assert all(counts[name, value] > 200 for name in names for value in ATTRIBUTES[name])
    everything = (ONE if objects in (1, "both") else []) + (TWO if objects in (2, "both") else [])
    assert [source.is_held_out(scene) for scene in everything] == list(map(forbidden, everything))


@pytest.mark.parametrize("objects", [1, 2, "both"])
def test_evaluation_scenes_are_balanced(objects):
    """Seen and held-out scenes, keyed by a seed; values of an attribute are about equally frequent."""
    source = Shapes(num_samples=10, objects=objects, held_out=HELD_OUT[:1])
    seen, held_out = source.seen_scenes(120, seed=1), source.held_out_scenes(120, seed=1)
    assert not any(map(has_blue_circle, seen)) and all(map(has_blue_circle, held_out))
    assert seen == source.seen_scenes(120, seed=1) != source.seen_scenes(120, seed=2)
    if objects == "both":
        assert sum(len(scene.objects) for scene in seen) == 180
    counts = Counter(value for scene in seen for value in values(scene))
    for name, options in {**ATTRIBUTES, "relation": RELATIONS}.items():
        found = [counts[name, option] for option in options if counts[name, option]]
        assert not found or (len(found) == len(options) and max(found) - min(found) <= 0.2 * max(found))
    assert {value for scene in held_out for value in values(scene)} >= {("size", "small"), ("background", "gray")}


def test_held_out_scenes_need_held_out_combinations():
    with pytest.raises(ValueError, match=r"data\.source\.held_out is empty"):
        Shapes(num_samples=10).held_out_scenes(3, seed=0)


@for_each(
    "settings, message",
    lambda: [
        ({"held_out": [{"colour": "red"}]}, r"unknown attribute 'colour'.*color"),
        ({"held_out": [{"color": "rad"}]}, r"unknown color 'rad'.*red"),
        ({"held_out": [{"size": "huge"}]}, "small, large"),
        ({"held_out": [{}]}, "empty combination"),
        ({"held_out": [{"shape": "cross"}]}, "leaves no scene with shape cross"),
        ({"held_out": [{"shape": s, "color": "red"} for s in SHAPES]}, "leaves no scene with color red"),
        ({"num_samples": 1}, "num_samples=1 must be at least 2"),
        ({"objects": 3}, "objects=3 must be 1, 2 or both"),
        ({"image_size": 31}, "data.image_size=31 must be at least 32"),
        ({"channels": 1}, "data.channels=1 must be 3"),
    ],
)
def test_invalid_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        shapes(None, **{"image_size": 32, "channels": 3, **settings})
    assert "\n" not in str(error.value)


def test_the_config_holds_out_six_combinations():
    """Each color with one shape, and every shape; image_size changes the images."""
    data = instantiate(compose("train", "data=shapes", "data.image_size=48", "data.source.num_samples=500").data)
    data.setup()
    source = data.source
    assert isinstance(source, Shapes)
    assert {mapping["color"] for mapping in source.held_out} == set(ATTRIBUTES["color"])
    assert {mapping["shape"] for mapping in source.held_out} == set(SHAPES)
    assert all(set(mapping) == {"shape", "color"} for mapping in source.held_out)
    assert not data.flip  # flips would swap left and right
    x = data.examples(4)
    assert x.shape == (4, *data.shape) == (4, 3, 48, 48)
    assert -1 <= x.min() < x.max() <= 1
