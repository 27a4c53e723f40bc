"""Colored shapes with captions, made from a grammar as they are asked for: text-to-image without any files.

What is said can be held against what is seen, since each caption leads back to its scene (`parse`), and each scene to
where everything lies (`place`). Combinations that are held out tell whether a model puts together what it never saw
together.
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

from src.data.csv_files import nearest
from src.data.sources import Covariates, Labels, Source
from src.rng import key

ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "shape": ("circle", "square", "triangle", "cross"),
    "color": ("red", "green", "blue", "yellow", "magenta", "cyan"),
    "size": ("small", "large"),
    "position": ("centre", "top left", "top right", "bottom left", "bottom right"),
    "background": ("black", "grey", "white"),
}
"""What can be said of an object, and of a scene's background. Only an object that is alone has a position."""

RELATIONS = ("left of", "right of", "above", "below")
"""How the first of two objects lies to the second."""

COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 75, 220),
    "yellow": (240, 215, 50),
    "magenta": (215, 60, 205),
    "cyan": (50, 205, 225),
    "black": (16, 16, 16),
    "grey": (128, 128, 128),
    "white": (239, 239, 239),
}
"""RGB of objects and backgrounds, before jitter."""

COLOR_JITTER = 12
"""Levels by which each channel of an object's color may differ, and all of a background's together."""

RADII = {"small": (0.09, 0.11), "large": (0.145, 0.17)}
"""Of the circle of an object's area, as a share of the picture's side: any small shape has less area than any large."""

PLACES = {
    "centre": (0.5, 0.5),
    "top left": (0.27, 0.27),
    "top right": (0.73, 0.27),
    "bottom left": (0.27, 0.73),
    "bottom right": (0.73, 0.73),
}
"""Where (x, y) the middle of an object that is alone lies, y downwards; `PLACE_JITTER` to any side of it."""

PLACE_JITTER = 0.04
GAP, MARGIN = 0.03, 0.01  # least distance of two objects, and of one of two to the border
SHIFT, OFFSET = 0.15, 0.03  # of two objects across the line that they lie on: together, and each by itself

SQUARE = math.sqrt(math.pi) / 2  # half the side of a square as large as the circle of radius 1
TRIANGLE = math.sqrt(4 * math.pi / (3 * math.sqrt(3)))  # radius of the circle through an equilateral triangle's corners
CROSS = math.sqrt(9 * math.pi / 20)  # half the length of a cross, whose arms are a third of it wide
HALVES = {
    "circle": (1.0, 1.0),
    "square": (SQUARE, SQUARE),
    "triangle": (TRIANGLE * math.sqrt(3) / 2, TRIANGLE * 3 / 4),
    "cross": (CROSS, CROSS),
}
"""Half the width and height of each shape as large as the circle of radius 1."""

Objects = Literal[1, 2, "both"]
Described = frozenset[tuple[str, str]]
"""An object's attributes and its background's, with their values."""

T = TypeVar("T")


class Object(NamedTuple):
    """What can be said of one object, each a value of `ATTRIBUTES`."""

    shape: str
    color: str
    size: str
    position: str | None = None
    """None for one of two."""


class Scene(NamedTuple):
    """One object with a position, or two with the `relation` of the first to the second."""

    objects: tuple[Object, ...]
    background: str
    relation: str | None = None


class Placed(NamedTuple):
    """N scenes with everything that is left to chance, in shares of the picture's side; y goes downwards."""

    shape: Tensor
    """(N, 2) int64 in the order of `ATTRIBUTES`; -1 for no second object, of which all else means nothing."""
    center: Tensor
    """(N, 2, 2): x and y of the middle of each object's box."""
    radius: Tensor
    """(N, 2) of the circle with each object's area."""
    half: Tensor
    """(N, 2, 2): half the width and height of each object."""
    color: Tensor
    """(N, 2, 3) of each object, in [0, 255]."""
    background: Tensor
    """(N, 3)."""


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
    Scene((Object("circle", "red", "small"), Object("square", "blue", "large")), "grey", "left of"),
)
VOCABULARY = sorted(
    set(re.findall(r"\w+", re.sub(r"{\w+}", "", " ".join(ONE + TWO))))
    | {"in", "at", "the"}
    | {word for values in (*ATTRIBUTES.values(), RELATIONS) for value in values for word in value.split()}
)


def wordings(scene: Scene) -> list[str]:
    """All `WORDINGS` captions of a scene, each of which says everything about it."""
    return [caption(scene, number) for number in range(WORDINGS)]


def caption(scene: Scene, wording: int = 0) -> str:
    """The scene in words, "a small red circle at the top left on a black background", worded in one of several ways."""
    names = [f"{each.size} {each.color} {each.shape}" for each in scene.objects]
    if len(names) == 2:
        assert scene.relation is not None
        return TWO[wording].format(
            first=names[0], relation=scene.relation, second=names[1], background=scene.background
        )
    position = scene.objects[0].position
    assert position is not None
    place = f"in the {position}" if position == "centre" else f"at the {position}"
    return ONE[wording].format(first=names[0], place=place, position=position, background=scene.background)


def parse(text: str) -> Scene:
    """The scene that a caption describes, in any wording: the inverse of `caption`.

    Upper case, blanks, a full stop at the end, "gray" and "center" make no difference. Raises ValueError for a text
    that is no caption.
    """
    words = " ".join(text.lower().split()).rstrip(" .").replace("gray", "grey").replace("center", "centre")
    for pattern in _patterns():
        if found := pattern.fullmatch(words):
            said = found.groupdict()
            first = Object(said["shape1"], said["colour1"], said["size1"], said.get("position"))
            if "relation" not in said:
                return Scene((first,), said["background"])
            second = Object(said["shape2"], said["colour2"], said["size2"])
            return Scene((first, second), said["background"], said["relation"])
    unknown = [word for word in re.findall(r"[^\s,.]+", words) if word not in VOCABULARY]
    hint = (
        f"{unknown[0]!r} is none of its words, {nearest(unknown[0], VOCABULARY)}" if unknown else "its words are known"
    )
    raise ValueError(
        f"{text!r:.100} is no caption of shapes ({hint}): write it like {caption(EXAMPLES[0])!r} or "
        f"{caption(EXAMPLES[1])!r}"
    )


def place(scenes: Sequence[Scene], seeds: Sequence[int]) -> Placed:
    """Where everything of N scenes lies, how large and of which exact color: for each scene by its own seed alone.

    Jitter makes no attribute doubtful: small and large, the five positions and the colors stay apart, objects do not
    touch, and the one that is left of another lies so by more than it lies above or below.
    """
    if len(seeds) != len(scenes):
        raise ValueError(f"each scene has a seed of its own, got {len(seeds)} for {len(scenes)} scenes")
    generator = torch.Generator()
    rng = [torch.rand(17, generator=generator.manual_seed(seed), dtype=torch.float64) for seed in seeds]
    chance = torch.stack(rng)
    signed = 2 * chance - 1
    objects = [(*scene.objects, scene.objects[0])[:2] for scene in scenes]  # (N, 2), the second perhaps in vain
    two = torch.tensor([len(scene.objects) == 2 for scene in scenes])[:, None]

    def looked_up(table: Mapping[str, Sequence[float]], attribute: str) -> Tensor:
        return torch.tensor(
            [[table[getattr(each, attribute)] for each in pair] for pair in objects], dtype=torch.float64
        )

    low, high = looked_up(RADII, "size").unbind(-1)
    radius = low + (high - low) * chance[:, 0:2]
    half = radius[..., None] * looked_up(HALVES, "shape")
    color = looked_up(COLOURS, "color") + COLOR_JITTER * signed[:, 2:8].view(-1, 2, 3)
    background = torch.tensor([COLOURS[scene.background] for scene in scenes]) + COLOR_JITTER * signed[:, 8:9]
    alone = torch.tensor([PLACES[scene.objects[0].position or "centre"] for scene in scenes], dtype=torch.float64)
    alone = (alone + PLACE_JITTER * signed[:, 9:11])[:, None].expand(-1, 2, -1)
    center = torch.where(two[..., None], _side_by_side(scenes, half, chance[:, 11:]), alone)
    shape = torch.tensor([[ATTRIBUTES["shape"].index(each.shape) for each in pair] for pair in objects])
    shape[:, 1:].masked_fill_(~two, -1)
    return Placed(shape, center, radius, half, color.clamp(0, 255), background.clamp(0, 255))


def _side_by_side(scenes: Sequence[Scene], half: Tensor, chance: Tensor) -> Tensor:
    """Middles (N, 2, 2) of two objects of these half sizes (N, 2, 2) that lie as their relation says, by (N, 6) draws.

    What the objects, the gap and the margins leave of the side is dealt out evenly before, between and behind them.
    """
    upright = torch.tensor([scene.relation in ("above", "below") for scene in scenes]).long()
    before = torch.tensor([scene.relation in ("right of", "below") for scene in scenes]).long()[:, None]
    numbers = torch.cat([before, 1 - before], dim=1)  # (N, 2): which is the nearer to left or top, which the other
    lengths = half.gather(2, upright[:, None, None].expand(-1, 2, 1)).squeeze(2).gather(1, numbers)
    free = 1 - 2 * MARGIN - GAP - 2 * lengths.sum(1)
    cuts = chance[:, 0:2].sort(dim=1).values * free[:, None]
    nearer = MARGIN + cuts[:, 0] + lengths[:, 0]
    farther = 1 - MARGIN - (free - cuts[:, 1]) - lengths[:, 1]
    along = torch.stack([nearer, farther], dim=1).gather(1, numbers)  # numbers is its own inverse
    across = 0.5 + SHIFT * (2 * chance[:, 2:3] - 1) + OFFSET * (2 * chance[:, 3:5] - 1)
    lying = torch.stack([along, across], dim=2)
    return torch.where(upright[:, None, None].bool(), lying.flip(2), lying)


def render(scenes: Sequence[Scene], image_size: int, seeds: Sequence[int]) -> Tensor:
    """Pictures (N, 3, S, S) uint8 of N scenes, each placed by its own seed, with soft edges."""
    return paint(place(scenes, seeds), image_size)


def paint(placed: Placed, image_size: int) -> Tensor:
    """Pictures (N, 3, S, S) uint8: each pixel takes as much of a color as the object covers of it."""
    pixels = (torch.arange(image_size) + 0.5) / image_size
    covered = torch.zeros(*placed.shape.shape, image_size, image_size)  # (N, 2, S, S)
    for number, name in enumerate(ATTRIBUTES["shape"]):
        which = (placed.shape == number).nonzero(as_tuple=True)
        x, y = (pixels - placed.center.float()[which][:, axis, None] for axis in (0, 1))
        outside = DISTANCES[name](x[:, None, :], y[:, :, None], placed.radius.float()[which][:, None, None])
        covered[which] = (0.5 - image_size * outside).clamp(0, 1)
    picture = placed.background.float()[:, :, None, None]
    for k in (0, 1):
        picture = torch.lerp(picture, placed.color.float()[:, k, :, None, None], covered[:, k, None])
    return (picture + 0.5).to(torch.uint8)


# Signed distances to the outline, less than 0 inside, of shapes in the middle of whose box x = y = 0 (y downwards), as
# large as the circle of radius r. Beyond corners they are less than the distance, which softens no edge otherwise.


def circle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.hypot(x, y) - r


def square(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - SQUARE * r


def triangle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Equilateral, on its base: the middle of its box is a quarter of the outer radius above that of its corners."""
    y = y - TRIANGLE / 4 * r
    return torch.maximum(y, math.sqrt(3) / 2 * x.abs() - y / 2) - TRIANGLE / 2 * r


def cross(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Upright, like a plus sign."""
    x, y, length = x.abs(), y.abs(), CROSS * r
    return torch.minimum(torch.maximum(x - length, y - length / 3), torch.maximum(x - length / 3, y - length))


DISTANCES: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "circle": circle,
    "square": square,
    "triangle": triangle,
    "cross": cross,
}


class Shapes:
    """`num_samples` pictures (N, 3, S, S) uint8 with captions; number i depends on (seed, i) alone.

    `objects` is how many a scene has, or "both": half of the scenes one, half two, of two colors. Scenes in which some
    object has all attributes of one of the mappings `held_out`, such as {"shape": "square", "color": "red"}, are
    never among them. Raises ValueError for attributes that do not exist, or of which nothing would be left to learn.
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
            raise ValueError(f"data.source.num_samples must be at least 2, got {num_samples}: 50000 is usual")
        if image_size < 32:
            raise ValueError(f"shapes are told apart from 32x32 pixels on, got data.image_size={image_size}: raise it")
        if objects not in (1, 2, "both"):
            raise ValueError(f"data.source.objects must be 1, 2 or both, got {objects!r}")
        for mapping in held_out:
            _check_held_out(mapping)
        self.image_size = image_size
        self.seed = seed
        self.held_out = [dict(mapping) for mapping in held_out]
        pools = [_grammar(count) for count in (1, 2) if objects in (count, "both")]
        unseen = set(filter(self._matches, {o for pool in pools for scene in pool for o in _described(scene)}))
        self._held_out = [[s for s in pool if not unseen.isdisjoint(_described(s))] for pool in pools]
        self._seen = [[s for s in pool if unseen.isdisjoint(_described(s))] for pool in pools]
        for pool, left in zip(pools, self._seen, strict=True):
            lost = set().union(*map(_said, pool)) - set().union(*map(_said, left))
            if lost:
                attribute, value = sorted(lost)[0]
                raise ValueError(f"data.source.held_out leaves no scene with {attribute} {value}: hold out less")
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
        """Random scenes of the kinds that are among the samples, every attribute about as often as its others."""
        return _balanced(self._seen, count, seed)

    def held_out_scenes(self, count: int, seed: int) -> list[Scene]:
        """Random scenes of the kinds that are held out, balanced likewise. Raises ValueError if there are none."""
        if not any(self._held_out):
            raise ValueError("no scenes are held out: set data.source.held_out, as conf/data/shapes.yaml does")
        return _balanced([pool for pool in self._held_out if pool], count, seed)

    def any_scenes(self, count: int, seed: int) -> list[Scene]:
        """Random scenes of all kinds alike, whether they are among the samples or held out."""
        chosen = []
        for k in range(count):
            which = k % len(self._seen)
            seen, held_out = self._seen[which], self._held_out[which]
            number = key(seed, "any", k) % (len(seen) + len(held_out))
            chosen.append(seen[number] if number < len(seen) else held_out[number - len(seen)])
        return chosen

    def is_held_out(self, scene: Scene) -> bool:
        """Whether it can never be among the samples."""
        return any(map(self._matches, _described(scene)))

    def _matches(self, described: Described) -> bool:
        return any(mapping.items() <= dict(described).items() for mapping in self.held_out)

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
    """Opens `Shapes`; nothing is read from `root`. Raises ValueError as they do, and for grey pictures."""
    if channels != 3:
        raise ValueError(f"shapes have colors, got data.channels={channels}: set data.channels=3")
    return Shapes(image_size, num_samples, objects, held_out, seed)


class Lazy(Sequence[T]):
    """`length` values, each made when it is asked for: number i by `at(i)`."""

    def __init__(self, length: int, at: Callable[[int], T]) -> None:
        self.numbers = range(length)
        self.at = at

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, i: int) -> T: ...
    @overload
    def __getitem__(self, i: slice) -> list[T]: ...
    def __getitem__(self, i: int | slice) -> T | list[T]:
        numbers = self.numbers[i]
        return self.at(numbers) if isinstance(numbers, int) else [self.at(k) for k in numbers]


@cache
def _grammar(count: int) -> tuple[Scene, ...]:
    """All scenes of so many objects."""
    looks = [ATTRIBUTES[name] for name in ("shape", "color", "size")]
    if count == 1:
        alone = product(*looks, ATTRIBUTES["position"])
        return tuple(Scene((Object(*look),), background) for look in alone for background in ATTRIBUTES["background"])
    pairs = [(a, b) for a, b in product(map(Object._make, product(*looks, [None])), repeat=2) if a.color != b.color]
    return tuple(Scene(*each) for each in product(pairs, ATTRIBUTES["background"], RELATIONS))


@cache
def _patterns() -> list[re.Pattern[str]]:
    """What captions look like, one for each wording."""

    def any_of(name: str, values: Sequence[str]) -> str:
        return f"(?P<{name}>{'|'.join(values)})"

    first, second = (
        " ".join(any_of(f"{name}{k}", ATTRIBUTES[name]) for name in ("size", "color", "shape")) for k in (1, 2)
    )
    position, background = (any_of(name, ATTRIBUTES[name]) for name in ("position", "background"))
    parts = {"first": first, "second": second, "position": position, "background": background}
    parts |= {"place": f"(?:in|at) the {position}", "relation": any_of("relation", RELATIONS)}
    return [re.compile(template.format(**parts)) for template in ONE + TWO]


def _said(scene: Scene) -> set[tuple[str, str]]:
    """Every attribute that the scene has, and its relation, with their values."""
    relation = {("relation", scene.relation)} if scene.relation else set()
    return relation.union(*_described(scene))


def _described(scene: Scene) -> list[Described]:
    return [_describe(each, scene.background) for each in scene.objects]


@cache
def _describe(each: Object, background: str) -> Described:
    named = {**each._asdict(), "background": background}
    return frozenset((name, value) for name, value in named.items() if value is not None)


def _check_held_out(mapping: Mapping[str, str]) -> None:
    if not mapping:
        raise ValueError("a mapping in data.source.held_out is empty, which would hold out everything: name attributes")
    for name, value in mapping.items():
        if name not in ATTRIBUTES:
            raise ValueError(
                f"data.source.held_out names the attribute {name!r}: {nearest(str(name), list(ATTRIBUTES))}"
            )
        if value not in ATTRIBUTES[name]:
            raise ValueError(
                f"data.source.held_out names the {name} {value!r}: {nearest(str(value), ATTRIBUTES[name])}"
            )


def _balanced(pools: Sequence[Sequence[Scene]], count: int, seed: int) -> list[Scene]:
    """Scenes of the pools in turn, each time that of 16 random ones whose attributes were seen the least so far."""
    seen: Counter[tuple[str, str]] = Counter()
    chosen = []
    for k in range(count):
        pool = pools[k % len(pools)]
        some = [pool[key(seed, "balanced", k, j) % len(pool)] for j in range(16)]
        scene = min(some, key=lambda each: sum(seen[said] for said in _said(each)))
        seen.update(_said(scene))
        chosen.append(scene)
    return chosen
