"""Colored shapes with captions, generated on the fly from a grammar: text-to-image without files.

Samples can be checked against their captions, since `parse_scene` maps a caption to its scene and `place` maps a scene
to coordinates. Held-out combinations measure generalization to combinations not seen in training.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeVar, overload

from torch import Tensor

from src.data.scene_images import render
from src.data.scenes import ATTRIBUTES, Attributes, Scene, all_scenes, attributes_of, facts_of, wordings
from src.data.sources import Covariates, Labels, Source
from src.errors import did_you_mean
from src.rng import key

Objects = Literal[1, 2, "both"]
T = TypeVar("T")


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
        pools = [all_scenes(count) for count in (1, 2) if objects in (count, "both")]
        unseen = set(filter(self._matches, {o for pool in pools for scene in pool for o in attributes_of(scene)}))
        self._held_out = [[s for s in pool if not unseen.isdisjoint(attributes_of(s))] for pool in pools]
        self._seen = [[s for s in pool if unseen.isdisjoint(attributes_of(s))] for pool in pools]
        for pool, left in zip(pools, self._seen, strict=True):
            lost = set().union(*map(facts_of, pool)) - set().union(*map(facts_of, left))
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
        return any(map(self._matches, attributes_of(scene)))

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
        scene = min(candidates, key=lambda each: sum(counts[fact] for fact in facts_of(each)))
        counts.update(facts_of(scene))
        chosen.append(scene)
    return chosen
