"""Random numbers keyed by (seed, purpose, step, position in the global batch), independent of processes.

Any number of processes that share a global batch draw the same numbers for the same sample. Positions are drawn in
blocks, each from its own generator, and a process draws only the blocks that overlap its part.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 16


@dataclass(frozen=True)
class StepRng:
    """Random numbers for positions start, ..., start + count - 1 of the global batch of one step."""

    seed: int
    step: int
    start: int
    count: int
    device: torch.device

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Draw (count, *shape) standard normal float32."""
        return self._blocks(purpose, lambda g: _randn(shape, g))

    def uniform(self, purpose: str) -> Tensor:
        """Draw (count,) uniform float32 in [0, 1)."""
        return self._blocks(purpose, lambda g: torch.rand(BLOCK, generator=g, device=g.device, dtype=torch.float32))

    def shared(self, purpose: str) -> Tensor:
        """Draw one uniform float32 () in [0, 1), the same for all positions of the step."""
        generator = torch.Generator(self.device).manual_seed(key(self.seed, purpose, self.step, "shared"))
        return torch.rand((), generator=generator, device=self.device, dtype=torch.float32)

    def _blocks(self, purpose: str, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        first, stop = self.start // BLOCK, -(-(self.start + self.count) // BLOCK)
        generator = torch.Generator(self.device)
        blocks = [draw(generator.manual_seed(key(self.seed, purpose, self.step, b))) for b in range(first, stop)]
        offset = self.start - first * BLOCK
        return torch.cat(blocks)[offset : offset + self.count]


class SampleNoise:
    """Standard normal noise for the samples `indices`, in blocks keyed by (seed, block).

    Sample k gets the same noise in any batch and process. Calling it with x (B, *data) returns the next noise with
    x's shape, dtype and device.
    """

    def __init__(self, seed: int, indices: Sequence[int], device: torch.device) -> None:
        blocks = {block: k for k, block in enumerate(dict.fromkeys(i // BLOCK for i in indices))}
        self.generators = [torch.Generator(device).manual_seed(key(seed, "sample", block)) for block in blocks]
        self.positions = torch.tensor([blocks[i // BLOCK] * BLOCK + i % BLOCK for i in indices], device=device)

    def draw(self, shape: Sequence[int]) -> Tensor:
        """Draw the next noise (B, *shape)."""
        return torch.cat([_randn(shape, g) for g in self.generators])[self.positions]

    def __call__(self, x: Tensor) -> Tensor:
        return self.draw(x.shape[1:]).to(x.dtype)


def _randn(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw (BLOCK, *shape) in float32, independent of torch's default dtype."""
    return torch.randn(BLOCK, *shape, generator=generator, device=generator.device, dtype=torch.float32)


def key(*parts: int | str) -> int:
    """Return a 63-bit seed from the parts. Different parts collide only by chance, unlike their sum."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
