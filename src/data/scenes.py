"""Scenes of colored shapes, all of which a small grammar describes, and their captions."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from typing import NamedTuple

from src.errors import did_you_mean

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

Attributes = frozenset[tuple[str, str]]
"""Names and values of an object's attributes and of its background."""


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
    return [describe_scene(scene, number) for number in range(WORDINGS)]


def describe_scene(scene: Scene, wording: int = 0) -> str:
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


def parse_scene(text: str) -> Scene:
    """Return the scene that a caption describes, in any wording: the inverse of `describe_scene`.

    Ignores case, extra spaces and a final period, and accepts "grey" and "centre". Raises ValueError for other strings.
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
        f"{text!r:.100} is not a caption of data=shapes{hint}; write it like {describe_scene(EXAMPLES[0])!r} or "
        f"{describe_scene(EXAMPLES[1])!r}"
    )


@cache
def all_scenes(count: int) -> tuple[Scene, ...]:
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


def facts_of(scene: Scene) -> set[tuple[str, str]]:
    """Return names and values of all attributes in the scene, and its relation."""
    relation = {("relation", scene.relation)} if scene.relation else set()
    return relation.union(*attributes_of(scene))


def attributes_of(scene: Scene) -> list[Attributes]:
    return [_object_attributes(each, scene.background) for each in scene.objects]


@cache
def _object_attributes(each: Object, background: str) -> Attributes:
    named = {**each._asdict(), "background": background}
    return frozenset((name, value) for name, value in named.items() if value is not None)
