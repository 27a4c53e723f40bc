"""Colored shapes with captions, generated on the fly from a grammar: text-to-image without files.

Samples can be checked against their captions, since `parse` maps a caption to its scene and `place` maps a scene to
coordinates. Held-out combinations measure generalization to combinations not seen in training.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import product
from typing import Literal, NamedTuple, TypeVar, overload

import torch
from torch import Tensor

from src.data.sources import Covariates, Labels, Source
from src.errors import did_you_mean
from src.rng import key

ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "shape": ("circle", "square", "triangle", "cross"),
    "color": ("red", "green", "blue", "yellow", "magenta", "cyan"),
    "size": ("small", "large"),
    "position": ("center", "top left", "top right", "bottom left", "bottom right"),
    "background": ("black", "gray", "white"),
}
"""Values of the attributes of an object and of the background. Only a single object has a position."""

RELATIONS = ("left of", "right of", "above", "below")
"""Positions of the first of two objects relative to the second."""

COLORS = {
    "red": (215, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 75, 220),
    "yellow": (240, 215, 50),
    "magenta": (215, 60, 205),
    "cyan": (50, 205, 225),
    "black": (16, 16, 16),
    "gray": (128, 128, 128),
    "white": (239, 239, 239),
}
"""RGB of objects and backgrounds, before jitter."""

COLOR_JITTER = 12
"""Maximum change of each channel of an object's color, and of all channels of the background together."""

RADII = {"small": (0.09, 0.11), "large": (0.145, 0.17)}
"""Radius range of the circle with the object's area, relative to the image size. Small and large do not overlap."""

PLACES = {
    "center": (0.5, 0.5),
    "top left": (0.27, 0.27),
    "top right": (0.73, 0.27),
    "bottom left": (0.27, 0.73),
    "bottom right": (0.73, 0.73),
}
"""Center (x, y) of a single object, y downwards, before a jitter of at most `PLACE_JITTER`."""

PLACE_JITTER = 0.04
GAP, MARGIN = 0.03, 0.01  # minimum distance between two objects, and to the border
SHIFT, OFFSET = 0.15, 0.03  # jitter of two objects perpendicular to their relation: joint, individual

SQUARE = math.sqrt(math.pi) / 2  # half the side of a square with the area of the unit circle
TRIANGLE = math.sqrt(4 * math.pi / (3 * math.sqrt(3)))  # circumradius of such an equilateral triangle
CROSS = math.sqrt(9 * math.pi / 20)  # half the length of such a cross, with arms a third as wide
HALF_SIZES = {
    "circle": (1.0, 1.0),
    "square": (SQUARE, SQUARE),
    "triangle": (TRIANGLE * math.sqrt(3) / 2, TRIANGLE * 3 / 4),
    "cross": (CROSS, CROSS),
}
"""Half the width and height of each shape with the area of the unit circle."""

Objects = Literal[1, 2, "both"]
Attributes = frozenset[tuple[str, str]]
"""Names and values of an object's attributes and of its background."""

T = TypeVar("T")


class Object(NamedTuple):
    """An object, with values of `ATTRIBUTES`."""

    shape: str
    color: str
    size: str
    position: str | None = None
    """None for one of two objects."""


class Scene(NamedTuple):
    """One object with a position, or two with the `relation` of the first to the second."""

    objects: tuple[Object, ...]
    background: str
    relation: str | None = None


class Placed(NamedTuple):
    """N scenes with random sizes, places and colors. Lengths are relative to the image size; y points down."""

    shape: Tensor
    """(N, 2) int64 in the order of `ATTRIBUTES`; -1 if there is no second object, whose other values are undefined."""
    center: Tensor
    """(N, 2, 2): x and y of the center of each object's bounding box."""
    radius: Tensor
    """(N, 2): radius of the circle with each object's area."""
    half: Tensor
    """(N, 2, 2): half the width and height of each object."""
    color: Tensor
    """(N, 2, 3): RGB of each object in [0, 255]."""
    background: Tensor
    """(N, 3): RGB in [0, 255]."""


ONE = (
    "a {first} {place} on a {background} background",
    "on a {background} background, a {first} {place}",
    "a {background} background with a {first} {place}",
    "{first}, {position}, {background} background",
)
TWO = (
    "a {first} {relation} a {second} on a {background} background",
    "on a {background} background, a {first} {relation} a {second}",
    "a {background} background with a {first} {relation} a {second}",
    "{first} {relation} {second}, {background} background",
)
WORDINGS = len(ONE)
EXAMPLES = (
    Scene((Object("circle", "red", "small", "top left"),), "black"),
    Scene((Object("circle", "red", "small"), Object("square", "blue", "large")), "gray", "left of"),
)
VOCABULARY = sorted(
    set(re.findall(r"\w+", re.sub(r"{\w+}", "", " ".join(ONE + TWO))))
    | {"in", "at", "the"}
    | {word for values in (*ATTRIBUTES.values(), RELATIONS) for value in values for word in value.split()}
)


def wordings(scene: Scene) -> list[str]:
    """Return all `WORDINGS` captions of a scene, each complete."""
    return [caption(scene, number) for number in range(WORDINGS)]


def caption(scene: Scene, wording: int = 0) -> str:
    """Return a caption such as "a small red circle at the top left on a black background", in one of the wordings."""
    names = [f"{each.size} {each.color} {each.shape}" for each in scene.objects]
    if len(names) == 2:
        assert scene.relation is not None
        return TWO[wording].format(
            first=names[0], relation=scene.relation, second=names[1], background=scene.background
        )
    position = scene.objects[0].position
    assert position is not None
    place = f"in the {position}" if position == "center" else f"at the {position}"
    return ONE[wording].format(first=names[0], place=place, position=position, background=scene.background)


def parse(text: str) -> Scene:
    """Return the scene that a caption describes, in any wording: the inverse of `caption`.

    Ignores case, extra spaces and a final period, and accepts "gray" and "center". Raises ValueError for other strings.
    """
    words = " ".join(text.lower().split()).rstrip(" .").replace("grey", "gray").replace("centre", "center")
    for pattern in _patterns():
        if match := pattern.fullmatch(words):
            parts = match.groupdict()
            first = Object(parts["shape1"], parts["color1"], parts["size1"], parts.get("position"))
            if "relation" not in parts:
                return Scene((first,), parts["background"])
            second = Object(parts["shape2"], parts["color2"], parts["size2"])
            return Scene((first, second), parts["background"], parts["relation"])
    unknown = [word for word in re.findall(r"[^\s,.]+", words) if word not in VOCABULARY]
    hint = f" ({unknown[0]!r} is unknown: {did_you_mean(unknown[0], VOCABULARY)})" if unknown else ""
    raise ValueError(
        f"{text!r:.100} is not a caption of data=shapes{hint}; write it like {caption(EXAMPLES[0])!r} or "
        f"{caption(EXAMPLES[1])!r}"
    )


def place(scenes: Sequence[Scene], seeds: Sequence[int]) -> Placed:
    """Draw sizes, places and colors of N scenes, each with its own seed.

    Jitter leaves attributes unambiguous: sizes, positions and colors do not overlap, objects do not touch, and the
    offset along their relation exceeds the one perpendicular to it.
    """
    if len(seeds) != len(scenes):
        raise ValueError(f"place needs one seed per scene, got {len(seeds)} for {len(scenes)} scenes")
    generator = torch.Generator()
    draws = [torch.rand(17, generator=generator.manual_seed(seed), dtype=torch.float64) for seed in seeds]
    uniform = torch.stack(draws)
    signed = 2 * uniform - 1
    objects = [
        (*scene.objects, scene.objects[0])[:2] for scene in scenes
    ]  # (N, 2), the second unused if there is only one
    two = torch.tensor([len(scene.objects) == 2 for scene in scenes])[:, None]

    def lookup(table: Mapping[str, Sequence[float]], attribute: str) -> Tensor:
        return torch.tensor(
            [[table[getattr(each, attribute)] for each in pair] for pair in objects], dtype=torch.float64
        )

    low, high = lookup(RADII, "size").unbind(-1)
    radius = low + (high - low) * uniform[:, 0:2]
    half = radius[..., None] * lookup(HALF_SIZES, "shape")
    color = lookup(COLORS, "color") + COLOR_JITTER * signed[:, 2:8].view(-1, 2, 3)
    background = torch.tensor([COLORS[scene.background] for scene in scenes]) + COLOR_JITTER * signed[:, 8:9]
    alone = torch.tensor([PLACES[scene.objects[0].position or "center"] for scene in scenes], dtype=torch.float64)
    alone = (alone + PLACE_JITTER * signed[:, 9:11])[:, None].expand(-1, 2, -1)
    center = torch.where(two[..., None], _side_by_side(scenes, half, uniform[:, 11:]), alone)
    shape = torch.tensor([[ATTRIBUTES["shape"].index(each.shape) for each in pair] for pair in objects])
    shape[:, 1:].masked_fill_(~two, -1)
    return Placed(shape, center, radius, half, color.clamp(0, 255), background.clamp(0, 255))


def _side_by_side(scenes: Sequence[Scene], half: Tensor, uniform: Tensor) -> Tensor:
    """Return centers (N, 2, 2) of two objects, of half sizes (N, 2, 2), that satisfy their relation.

    `uniform` (N, 6) are the random numbers.

    The space that objects, gap and margins leave is distributed uniformly before, between and after them.
    """
    vertical = torch.tensor([scene.relation in ("above", "below") for scene in scenes]).long()
    before = torch.tensor([scene.relation in ("right of", "below") for scene in scenes]).long()[:, None]
    order = torch.cat([before, 1 - before], dim=1)  # (N, 2): the object nearer to the left or top, and the other
    lengths = half.gather(2, vertical[:, None, None].expand(-1, 2, 1)).squeeze(2).gather(1, order)
    free = 1 - 2 * MARGIN - GAP - 2 * lengths.sum(1)
    cuts = uniform[:, 0:2].sort(dim=1).values * free[:, None]
    nearer = MARGIN + cuts[:, 0] + lengths[:, 0]
    farther = 1 - MARGIN - (free - cuts[:, 1]) - lengths[:, 1]
    along = torch.stack([nearer, farther], dim=1).gather(1, order)  # order is its own inverse
    across = 0.5 + SHIFT * (2 * uniform[:, 2:3] - 1) + OFFSET * (2 * uniform[:, 3:5] - 1)
    centers = torch.stack([along, across], dim=2)
    return torch.where(vertical[:, None, None].bool(), centers.flip(2), centers)


def render(scenes: Sequence[Scene], image_size: int, seeds: Sequence[int]) -> Tensor:
    """Return antialiased images (N, 3, S, S) uint8 of N scenes, each placed with its own seed."""
    return paint(place(scenes, seeds), image_size)


def paint(placed: Placed, image_size: int) -> Tensor:
    """Return images (N, 3, S, S) uint8 that blend colors by the part of a pixel that the object covers."""
    pixels = (torch.arange(image_size) + 0.5) / image_size
    coverage = torch.zeros(*placed.shape.shape, image_size, image_size)  # (N, 2, S, S)
    for number, name in enumerate(ATTRIBUTES["shape"]):
        which = (placed.shape == number).nonzero(as_tuple=True)
        x, y = (pixels - placed.center.float()[which][:, axis, None] for axis in (0, 1))
        distance = DISTANCES[name](x[:, None, :], y[:, :, None], placed.radius.float()[which][:, None, None])
        coverage[which] = (0.5 - image_size * distance).clamp(0, 1)
    image = placed.background.float()[:, :, None, None]
    for k in (0, 1):
        image = torch.lerp(image, placed.color.float()[:, k, :, None, None], coverage[:, k, None])
    return (image + 0.5).to(torch.uint8)


# Signed distances to the outline, negative inside, of shapes with the area of a circle of radius r, centered by their
# bounding box at x = y = 0 (y downwards). Outside of corners they are less than the distance, which changes no edge.


def circle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.hypot(x, y) - r


def square(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - SQUARE * r


def triangle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Equilateral, on its base. The center of its box is a quarter of the circumradius above the centroid."""
    y = y - TRIANGLE / 4 * r
    return torch.maximum(y, math.sqrt(3) / 2 * x.abs() - y / 2) - TRIANGLE / 2 * r


def cross(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """A plus sign."""
    x, y, length = x.abs(), y.abs(), CROSS * r
    return torch.minimum(torch.maximum(x - length, y - length / 3), torch.maximum(x - length / 3, y - length))


DISTANCES: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "circle": circle,
    "square": square,
    "triangle": triangle,
    "cross": cross,
}


class Shapes:
    """A source of `num_samples` images (N, 3, S, S) uint8 with captions; sample i depends only on (seed, i).

    Args:
        objects: per scene; "both" gives one half of the scenes one object, the other two, of different colors.
        held_out: combinations of attributes, such as {"shape": "square", "color": "red"}. No sample has an object
            with all attributes of one of them.

    Raises ValueError for unknown attributes, and if an attribute occurs in no remaining scene.
    """

    labels: Labels | None = None
    covariates: Covariates | None = None
    ids: Sequence[str] | None = None

    def __init__(
        self,
        image_size: int = 32,
        num_samples: int = 50_000,
        objects: Objects = "both",
        held_out: Sequence[Mapping[str, str]] = (),
        seed: int = 0,
    ) -> None:
        if num_samples < 2:
            raise ValueError(f"data.source.num_samples={num_samples} must be at least 2; the default is 50000")
        if image_size < 32:
            raise ValueError(f"data.image_size={image_size} must be at least 32; smaller shapes look alike")
        if objects not in (1, 2, "both"):
            raise ValueError(f"data.source.objects={objects} must be 1, 2 or both")
        for mapping in held_out:
            _check_held_out(mapping)
        self.image_size = image_size
        self.seed = seed
        self.held_out = [dict(mapping) for mapping in held_out]
        pools = [_grammar(count) for count in (1, 2) if objects in (count, "both")]
        unseen = set(filter(self._matches, {o for pool in pools for scene in pool for o in _attributes(scene)}))
        self._held_out = [[s for s in pool if not unseen.isdisjoint(_attributes(s))] for pool in pools]
        self._seen = [[s for s in pool if unseen.isdisjoint(_attributes(s))] for pool in pools]
        for pool, left in zip(pools, self._seen, strict=True):
            lost = set().union(*map(_facts, pool)) - set().union(*map(_facts, left))
            if lost:
                attribute, value = sorted(lost)[0]
                raise ValueError(
                    f"data.source.held_out leaves no scene with {attribute} {value}; hold out fewer combinations"
                )
        self.scenes: Sequence[Scene] = Lazy(num_samples, self._scene)
        self.captions: Sequence[Sequence[str]] | None = Lazy(num_samples, self._wordings)

    def __len__(self) -> int:
        return len(self.scenes)

    def fetch(self, indices: Sequence[int]) -> Tensor:
        scenes = [self._scene(i) for i in indices]
        return render(scenes, self.image_size, [key(self.seed, "picture", i) for i in indices])

    def stamps(self) -> Sequence[int] | None:
        return None

    def seen_scenes(self, count: int, seed: int) -> list[Scene]:
        """Draw scenes that may be among the samples, with balanced attributes."""
        return _balanced(self._seen, count, seed)

    def held_out_scenes(self, count: int, seed: int) -> list[Scene]:
        """Draw scenes with held-out combinations, with balanced attributes. Raises ValueError if there are none."""
        if not any(self._held_out):
            raise ValueError("data.source.held_out is empty; set it, as conf/data/shapes.yaml does")
        return _balanced([pool for pool in self._held_out if pool], count, seed)

    def any_scenes(self, count: int, seed: int) -> list[Scene]:
        """Draw scenes uniformly, with held-out combinations or without."""
        chosen = []
        for k in range(count):
            which = k % len(self._seen)
            seen, held_out = self._seen[which], self._held_out[which]
            number = key(seed, "any", k) % (len(seen) + len(held_out))
            chosen.append(seen[number] if number < len(seen) else held_out[number - len(seen)])
        return chosen

    def is_held_out(self, scene: Scene) -> bool:
        """Return whether a scene has a held-out combination, and so is never among the samples."""
        return any(map(self._matches, _attributes(scene)))

    def _matches(self, attributes: Attributes) -> bool:
        return any(mapping.items() <= dict(attributes).items() for mapping in self.held_out)

    def _scene(self, i: int) -> Scene:
        which, number = divmod(key(self.seed, "scene", i), len(self._seen))[::-1]
        pool = self._seen[which]
        return pool[number % len(pool)]

    def _wordings(self, i: int) -> list[str]:
        return wordings(self._scene(i))


def shapes(
    root: str | None,
    image_size: int,
    channels: int,
    prepare: bool = False,
    *,
    num_samples: int = 50_000,
    objects: Objects = "both",
    held_out: Sequence[Mapping[str, str]] = (),
    seed: int = 0,
) -> Source:
    """Open `Shapes`, without reading `root`. Raises ValueError as `Shapes` does, and for gray images."""
    if channels != 3:
        raise ValueError(f"data.channels={channels} must be 3 for data=shapes")
    return Shapes(image_size, num_samples, objects, held_out, seed)


class Lazy(Sequence[T]):
    """A sequence of `length` values, where `compute(i)` returns value i."""

    def __init__(self, length: int, compute: Callable[[int], T]) -> None:
        self.indices = range(length)
        self.compute = compute

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, i: int) -> T: ...
    @overload
    def __getitem__(self, i: slice) -> list[T]: ...
    def __getitem__(self, i: int | slice) -> T | list[T]:
        indices = self.indices[i]
        return self.compute(indices) if isinstance(indices, int) else [self.compute(k) for k in indices]


@cache
def _grammar(count: int) -> tuple[Scene, ...]:
    """Return all scenes with `count` objects."""
    attributes = [ATTRIBUTES[name] for name in ("shape", "color", "size")]
    if count == 1:
        single = product(*attributes, ATTRIBUTES["position"])
        return tuple(Scene((Object(*each),), background) for each in single for background in ATTRIBUTES["background"])
    pairs = [
        (a, b) for a, b in product(map(Object._make, product(*attributes, [None])), repeat=2) if a.color != b.color
    ]
    return tuple(Scene(*each) for each in product(pairs, ATTRIBUTES["background"], RELATIONS))


@cache
def _patterns() -> list[re.Pattern[str]]:
    """Return a pattern that matches captions, for each wording."""

    def any_of(name: str, values: Sequence[str]) -> str:
        return f"(?P<{name}>{'|'.join(values)})"

    first, second = (
        " ".join(any_of(f"{name}{k}", ATTRIBUTES[name]) for name in ("size", "color", "shape")) for k in (1, 2)
    )
    position, background = (any_of(name, ATTRIBUTES[name]) for name in ("position", "background"))
    parts = {"first": first, "second": second, "position": position, "background": background}
    parts |= {"place": f"(?:in|at) the {position}", "relation": any_of("relation", RELATIONS)}
    return [re.compile(template.format(**parts)) for template in ONE + TWO]


def _facts(scene: Scene) -> set[tuple[str, str]]:
    """Return names and values of all attributes in the scene, and its relation."""
    relation = {("relation", scene.relation)} if scene.relation else set()
    return relation.union(*_attributes(scene))


def _attributes(scene: Scene) -> list[Attributes]:
    return [_object_attributes(each, scene.background) for each in scene.objects]


@cache
def _object_attributes(each: Object, background: str) -> Attributes:
    named = {**each._asdict(), "background": background}
    return frozenset((name, value) for name, value in named.items() if value is not None)


def _check_held_out(mapping: Mapping[str, str]) -> None:
    if not mapping:
        raise ValueError("data.source.held_out has an empty combination, which matches everything; name attributes")
    for name, value in mapping.items():
        if name not in ATTRIBUTES:
            raise ValueError(
                f"data.source.held_out: unknown attribute {name!r}; {did_you_mean(str(name), list(ATTRIBUTES))}"
            )
        if value not in ATTRIBUTES[name]:
            raise ValueError(
                f"data.source.held_out: unknown {name} {value!r}; {did_you_mean(str(value), ATTRIBUTES[name])}"
            )


def _balanced(pools: Sequence[Sequence[Scene]], count: int, seed: int) -> list[Scene]:
    """Draw from each pool in turn, choosing among 16 scenes the one with the rarest attributes so far."""
    counts: Counter[tuple[str, str]] = Counter()
    chosen = []
    for k in range(count):
        pool = pools[k % len(pools)]
        candidates = [pool[key(seed, "balanced", k, j) % len(pool)] for j in range(16)]
        scene = min(candidates, key=lambda each: sum(counts[fact] for fact in _facts(each)))
        counts.update(_facts(scene))
        chosen.append(scene)
    return chosen
