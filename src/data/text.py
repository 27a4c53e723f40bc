"""Conditions of text as token ids, for a network trained along; and what all conditions of text have in common."""

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

PADDING, BEGIN, END = range(3)
SPECIAL = 3
"""Below this id are those of the names above; the tokenizer's own follow, so that no text can spell one of them."""

SEEN = 20_000
"""Captions from which a tokenizer is trained, and examples are chosen."""


class Texts:
    """What all conditions of text have in common."""

    def of(self, source: Source, index: int, choice: int) -> str:
        captions = captions_of(source)[index]
        return captions[choice % len(captions)] if captions else ""

    def title(self, asked: str | None) -> str:
        text = clean(asked) or "no text"
        return text if len(text) <= 100 else f"{text[:97]}..."

    def check(self, source: Source) -> None:
        captions_of(source)


class Tokens(Texts):
    """Texts -> token ids (N, max_length) int64: where the text begins, its tokens, where it ends, padding.

    A byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) that `infer_settings` trains on the captions of the data, so
    any text can be encoded; `tokenizer` is what the tokenizers library writes of it, in JSON. `vocab_size` is at least
    259, the bytes and three special ids. Texts are taken in lower case, in Unicode's normal form NFKC and with one
    blank for several; what is longer than `length` is cut, with a warning. `None` and a blank text are the same, and
    ask for nothing.
    """

    def __init__(
        self, tokenizer: str | None, max_length: int = 64, vocab_size: int = 1024, examples: Sequence[str] = ()
    ) -> None:
        if tokenizer is None:
            raise ValueError("conditioning=text needs a tokenizer, which the captions of data give as a run starts")
        if max_length < 3:
            raise ValueError(
                f"conditioning.encode.max_length must be at least 3, a token and its ends, got {max_length}"
            )
        package = library("tokenizers")
        try:
            self._tokenizer = package.Tokenizer.from_str(tokenizer)
        except Exception as error:  # the library raises no narrower one
            raise ValueError(
                f"conditioning.encode.tokenizer is no JSON of the tokenizers library ({one_line(error)}): leave it "
                "null in a new run, to have one trained"
            ) from error
        used = self._tokenizer.get_vocab_size() + SPECIAL
        if used > vocab_size:
            raise ValueError(
                f"conditioning.encode.tokenizer has {used} ids, and conditioning.encode.vocab_size is {vocab_size}: "
                "raise it"
            )
        self.max_length = max_length
        self.examples = list(examples)
        self._warned = False

    def __call__(self, asked: Sequence[str | None]) -> Tensor:
        rows = [self._tokens(each) for each in asked]
        padded = [row + [PADDING] * (self.max_length - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64).view(-1, self.max_length)

    @staticmethod
    def infer_settings(source: Source, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        texts = sample(captions_of(source))
        tokenizer = settings.get("tokenizer") or _train(texts, settings.get("vocab_size", 1024))
        return {"tokenizer": tokenizer, "examples": list(settings.get("examples") or distinct(texts))}

    def _tokens(self, asked: str | None) -> list[int]:
        ids = [SPECIAL + i for i in self._tokenizer.encode(_normal(asked), add_special_tokens=False).ids]
        room = self.max_length - 2
        if len(ids) > room and not self._warned:
            self._warned = True
            warnings.warn(
                f"a text of {len(ids)} tokens is cut to {room} and its ends (and so are others that are longer): raise "
                "conditioning.encode.max_length for all of it",
                stacklevel=3,
            )
        return [BEGIN, *ids[:room], END]


def captions_of(source: Source) -> Sequence[Sequence[str]]:
    """Those of each sample. Raises ValueError if the data have none."""
    if source.captions is None:
        raise ValueError(
            "conditions of text need data with captions, and these have none: use data=captions data.root=... for "
            "images with texts beside them, or data=shapes"
        )
    return source.captions


def sample(captions: Sequence[Sequence[str]]) -> list[str]:
    """Up to `SEEN` captions that are not blank, evenly spread over the samples."""
    texts = [text for index in _spread(len(captions), SEEN) for text in captions[index] if clean(text)]
    if not texts:
        raise ValueError("the captions of these data are blank: write some, or train without (conditioning=null)")
    return [texts[i] for i in _spread(len(texts), SEEN)]


def distinct(texts: Sequence[str], most: int = 8) -> list[str]:
    """Some of different texts, evenly apart, as a configuration can have them: in it "${" begins a reference."""
    different = [text for text in dict.fromkeys(map(clean, texts)) if text.isprintable() and "${" not in text]
    return [different[i] for i in _spread(len(different), most)]


def _spread(count: int, most: int) -> list[int]:
    """Up to `most` of 0..count - 1, evenly apart."""
    taken = min(count, most)
    return [i * count // taken for i in range(taken)]


def clean(asked: str | float | None) -> str:
    """The text with one blank for several, and only characters that UTF-8 has; a number, as YAML reads it, is one."""
    if asked is None:
        return ""
    if not isinstance(asked, str | int | float) or isinstance(asked, bool):
        raise ValueError(f"{asked!r} is no text: give one in quotes, or null for nothing")
    return " ".join(str(asked).encode(errors="replace").decode().split())


def _normal(asked: str | None) -> str:
    return clean(unicodedata.normalize("NFKC", clean(asked)).lower())


def _train(texts: Sequence[str], vocab_size: int) -> str:
    """A tokenizer of at most `vocab_size` ids, the special ones included, as JSON in ASCII."""
    least = 256 + SPECIAL
    if vocab_size < least:
        raise ValueError(
            f"conditioning.encode.vocab_size must be at least {least}, the bytes and {SPECIAL} ids for padding and the "
            f"ends, got {vocab_size}"
        )
    package = library("tokenizers")
    tokenizer = package.Tokenizer(package.models.BPE())
    tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=True)  # the first word is as others
    trainer = package.trainers.BpeTrainer(
        vocab_size=vocab_size - SPECIAL,
        min_frequency=2,
        initial_alphabet=package.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(map(_normal, texts), trainer)
    # As a configuration can have it, in which "${" begins a reference to another setting.
    return json.dumps(json.loads(tokenizer.to_str()), separators=(",", ":")).replace("$", "\\u0024")


def library(name: str) -> Any:
    """The optional package of this name. Raises ValueError, which says how to install it, if it is not there."""
    # The threads of tokenizers do not outlive a fork, by which workers come to be, and it says so at every one.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"conditions of text need {name}, which is not installed: pip install {name}") from error


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
