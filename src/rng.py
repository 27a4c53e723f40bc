"""Random draws that belong to (seed, purpose, step, position in the global batch), never to a process.

One process, or any number of them that share a global batch between them, draw the same numbers for the same
sample. Positions are drawn in blocks, each from a generator seeded by its key, and a process generates only the
blocks that its share touches.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 16


@dataclass(frozen=True)
class StepRng:
    """The draws for positions start..start + count - 1 of the global batch of one step."""

    seed: int
    step: int
    start: int
    count: int
    device: torch.device

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """(count, *shape) standard normal, float32."""
        return self._blocks(purpose, lambda g: _randn(shape, g))

    def uniform(self, purpose: str) -> Tensor:
        """(count,) uniform in [0, 1), float32."""
        return self._blocks(purpose, lambda g: torch.rand(BLOCK, generator=g, device=g.device, dtype=torch.float32))

    def shared(self, purpose: str) -> Tensor:
        """() uniform in [0, 1), float32, the same for all positions of the step."""
        generator = torch.Generator(self.device).manual_seed(key(self.seed, purpose, self.step, "shared"))
        return torch.rand((), generator=generator, device=self.device, dtype=torch.float32)

    def _blocks(self, purpose: str, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        first, stop = self.start // BLOCK, -(-(self.start + self.count) // BLOCK)
        generator = torch.Generator(self.device)
        blocks = [draw(generator.manual_seed(key(self.seed, purpose, self.step, b))) for b in range(first, stop)]
        offset = self.start - first * BLOCK
        return torch.cat(blocks)[offset : offset + self.count]


class SampleNoise:
    """Standard normal noise for images `indices`, whole blocks of them from one generator each: (seed, block).

    So image k is the same whatever batch or process it is drawn in. Called with x (B, *data), gives the next
    noise like x, float32 on x's device.
    """

    def __init__(self, seed: int, indices: Sequence[int], device: torch.device) -> None:
        blocks = {block: k for k, block in enumerate(dict.fromkeys(i // BLOCK for i in indices))}
        self.generators = [torch.Generator(device).manual_seed(key(seed, "sample", block)) for block in blocks]
        self.places = torch.tensor([blocks[i // BLOCK] * BLOCK + i % BLOCK for i in indices], device=device)

    def draw(self, shape: Sequence[int]) -> Tensor:
        """(B, *shape) fresh noise."""
        return torch.cat([_randn(shape, g) for g in self.generators])[self.places]

    def __call__(self, x: Tensor) -> Tensor:
        return self.draw(x.shape[1:]).to(x.dtype)


def _randn(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """(BLOCK, *shape) in float32, also where the default is a lower precision."""
    return torch.randn(BLOCK, *shape, generator=generator, device=generator.device, dtype=torch.float32)


def key(*parts: int | str) -> int:
    """A 63-bit seed from the parts; unlike their sum, no two lists of parts share it but by chance."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
