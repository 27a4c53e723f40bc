"""The prompt benchmark of glyphs: does a sample look most like the glyph that its caption asks for?"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from src.data.glyphs import GlyphSource
from src.data.module import BaseDataModule
from src.evaluation.settings import AlignmentSettings
from src.metrics.confidence import Metric, metric_name, wilson
from src.metrics.retrieval import target_ranks
from src.rng import key

TOP = 5
NOISE = 0.1
"""Standard deviation of the noise that tests whether the nearest glyph is found; pixels are in [0, 1]."""


class GlyphBenchmark:
    """Captions of held-out and of training glyphs. A sample is correct if the nearest of all glyphs is the right one.

    `top_1` and `top_5` are the fractions of samples whose glyph is the nearest, and among the five nearest.
    """

    attributes: Sequence[str] = ("top_1", f"top_{TOP}")

    def __init__(self, data: BaseDataModule, settings: AlignmentSettings) -> None:
        assert isinstance(data.source, GlyphSource)
        self.data, self.source = data, data.source
        glyphs = self.source.glyphs
        trained = [self.source.seen[k] for k in data.train_indices if glyphs.parts[self.source.seen[k]]]
        trained.sort(key=lambda i: key(settings.seed, "glyph", glyphs.ids[i]))
        self.n = settings.n or len(self.source.held_out) or 200
        of_group = {"held out": self.source.held_out[: self.n], "seen": trained[: self.n]}
        # Pictures show the first captions, and their font has no CJK.
        of_group = {
            group: sorted(indices, key=lambda i: not glyphs.captions[i].isascii())
            for group, indices in of_group.items()
            if indices
        }
        self.prompts: Mapping[str, Sequence[str]] = {
            group: [glyphs.captions[i] for i in indices] for group, indices in of_group.items()
        }
        self._index = {glyphs.captions[i]: i for indices in of_group.values() for i in indices}
        self._references = self._display(glyphs.images)
        self.detector_accuracy: Mapping[str, Metric] = self._test()

    def correct(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        targets = torch.tensor([self._index[prompt] for prompt in prompts])
        ranks = target_ranks(images, self._references, targets)
        return torch.stack([ranks < 1, ranks < TOP], dim=1).double()

    def real(self, prompt: str) -> Tensor:
        return self._references[self._index[prompt]][None]

    def _test(self) -> dict[str, Metric]:
        """Return how often a glyph with noise is the nearest to itself."""
        prompts = [prompt for group in self.prompts.values() for prompt in group]
        clean = torch.cat([self.real(prompt) for prompt in prompts])
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        noisy = (clean.float() + 255 * NOISE * noise).clamp(0, 255).to(torch.uint8)
        correct = self.correct(noisy, prompts).sum(0).int().tolist()
        metrics = {
            metric_name(name, len(prompts)): wilson(count, len(prompts))
            for name, count in zip(self.attributes, correct, strict=True)
        }
        return {**metrics, metric_name("all", len(prompts)): wilson(correct[0], len(prompts))}

    def _display(self, images: Tensor) -> Tensor:
        """Quantize images to the number of values of the data, as for generated samples."""
        return self.data.postprocess(self.data.preprocess(images))
