"""Text conditions as token ids, for a text encoder trained with the model, and functions for all text conditions."""

import importlib
import json
import os
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from src.data.sources import Source
from src.errors import one_line, optional_package

PADDING, BEGIN, END = range(3)
SPECIAL = 3
"""The number of special ids. Those of the tokenizer follow, so no text can contain a special id."""

MAX_CAPTIONS = 20_000
"""Captions to train a tokenizer on and to choose examples from."""


class TextCondition:
    """Methods that all text conditions share."""

    def of_sample(self, source: Source, index: int, choice: int) -> str:
        captions = captions_of(source)[index]
        return captions[choice % len(captions)] if captions else ""

    def title(self, value: str | None) -> str:
        text = clean_text(value) or "no text"
        return text if len(text) <= 100 else f"{text[:97]}..."

    def check(self, source: Source) -> None:
        captions_of(source)


class Tokens(TextCondition):
    """Encodes text as token ids (N, max_length) int64: begin, tokens, end, padding.

    Args:
        tokenizer: a byte-level BPE, which can encode any text, in the JSON format of the tokenizers library;
            `infer_settings` trains it on the captions.
        max_length: maximum number of tokens, including begin and end. Longer text is truncated with a warning.
        vocab_size: ids, at least 259: the bytes and three special ids.
        examples: prompts to draw samples for.

    Text is lowercased and normalized to Unicode NFKC with collapsed spaces. None and blank text mean no condition.
    Source: Sennrich et al. 2016 (arXiv 1508.07909); Radford et al. 2019 for bytes.
    """

    def __init__(
        self, tokenizer: str | None, max_length: int = 64, vocab_size: int = 1024, examples: Sequence[str] = ()
    ) -> None:
        if tokenizer is None:
            raise ValueError("conditioning.encode.tokenizer is empty; a new run trains one on its captions")
        if max_length < 3:
            raise ValueError(
                f"conditioning.encode.max_length={max_length} must be at least 3: begin, one token and end"
            )
        package = import_optional("tokenizers")
        try:
            self._tokenizer = package.Tokenizer.from_str(tokenizer)
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(
                f"conditioning.encode.tokenizer is not JSON of the tokenizers library ({one_line(error)}); set it to "
                "null in a new run to train one"
            ) from error
        used = self._tokenizer.get_vocab_size() + SPECIAL
        if used > vocab_size:
            raise ValueError(
                f"conditioning.encode.vocab_size={vocab_size} must be at least {used}, the number of ids of "
                "conditioning.encode.tokenizer"
            )
        self.max_length = max_length
        self.examples = list(examples)
        self._warned = False

    def __call__(self, values: Sequence[str | None]) -> Tensor:
        rows = [self._tokens(value) for value in values]
        padded = [row + [PADDING] * (self.max_length - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64).view(-1, self.max_length)

    @staticmethod
    def infer_settings(source: Source, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        texts = sample_captions(captions_of(source))
        tokenizer = settings.get("tokenizer") or _train_tokenizer(texts, settings.get("vocab_size", 1024))
        return {"tokenizer": tokenizer, "examples": list(settings.get("examples") or distinct_texts(texts))}

    def _tokens(self, value: str | None) -> list[int]:
        ids = [SPECIAL + i for i in self._tokenizer.encode(_normalize(value), add_special_tokens=False).ids]
        room = self.max_length - 2
        if len(ids) > room and not self._warned:
            self._warned = True
            warnings.warn(
                f"conditioning.encode.max_length={self.max_length} truncates text of {len(ids)} tokens to {room}; "
                "raise it to keep all of them (further truncations are not reported)",
                stacklevel=3,
            )
        return [BEGIN, *ids[:room], END]


def captions_of(source: Source) -> Sequence[Sequence[str]]:
    """Return the captions of each sample. Raises ValueError if the source has none."""
    if source.captions is None:
        raise ValueError(
            "conditioning=text needs data with captions; use data=captions data.root=... for images with text "
            "files, or data=shapes, kanji or emoji"
        )
    return source.captions


def sample_captions(captions: Sequence[Sequence[str]]) -> list[str]:
    """Return up to `MAX_CAPTIONS` captions that are not blank, evenly spread over the samples."""
    texts = [text for index in _spread(len(captions), MAX_CAPTIONS) for text in captions[index] if clean_text(text)]
    if not texts:
        raise ValueError("the captions of the data are blank; write some, or add conditioning=null")
    return [texts[i] for i in _spread(len(texts), MAX_CAPTIONS)]


def distinct_texts(texts: Sequence[str], limit: int = 8) -> list[str]:
    """Return up to `limit` distinct strings, evenly spread, without the interpolation "${" of configurations."""
    different = [text for text in dict.fromkeys(map(clean_text, texts)) if text.isprintable() and "${" not in text]
    return [different[i] for i in _spread(len(different), limit)]


def _spread(count: int, limit: int) -> list[int]:
    """Return up to `limit` of 0, ..., count - 1, evenly spread."""
    taken = min(count, limit)
    return [i * count // taken for i in range(taken)]


def clean_text(value: str | float | None) -> str:
    """Return text with collapsed whitespace and valid UTF-8. Accepts numbers, as YAML parses them."""
    if value is None:
        return ""
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise ValueError(f"{value!r} is not a string; quote it, or give null for no condition")
    return " ".join(str(value).encode(errors="replace").decode().split())


def _normalize(value: str | None) -> str:
    return clean_text(unicodedata.normalize("NFKC", clean_text(value)).lower())


def _train_tokenizer(texts: Sequence[str], vocab_size: int) -> str:
    """Return a tokenizer of at most `vocab_size` ids, including special ones, as ASCII JSON."""
    minimum = 256 + SPECIAL
    if vocab_size < minimum:
        raise ValueError(
            f"conditioning.encode.vocab_size={vocab_size} must be at least {minimum} (256 bytes, {SPECIAL} special ids)"
        )
    package = import_optional("tokenizers")
    tokenizer = package.Tokenizer(package.models.BPE())
    tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(
        add_prefix_space=True
    )  # encodes the first word like the others
    trainer = package.trainers.BpeTrainer(
        vocab_size=vocab_size - SPECIAL,
        min_frequency=2,
        initial_alphabet=package.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(map(_normalize, texts), trainer)
    # A configuration interpolates "${".
    return json.dumps(json.loads(tokenizer.to_str()), separators=(",", ":")).replace("$", "\\u0024")


def import_optional(name: str) -> Any:
    """Import an optional package. Raises ValueError with the command to install it if it is missing."""
    # Threads of the tokenizers library do not survive the fork of a worker, and it warns at each fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with optional_package("conditioning by text", name):
        module: Any = importlib.import_module(name)
    return module
