"""Text conditions from a frozen pretrained encoder, computed once and cached on disk."""

import os
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src.cache import digest
from src.data.embedding_cache import EmbeddingCache, Embeddings
from src.data.encoder_files import encoder_folder, fingerprint_of, num_features, open_encoder
from src.data.sources import Source
from src.data.text import (
    TextCondition,
    captions_of,
    clean_text,
    distinct_texts,
    import_optional,
    sample_captions,
)
from src.errors import one_line
from src.rng import key


class Pretrained(TextCondition):
    """Encodes text as the encoder's last hidden states (N, max_length, features) float32, with zeros as padding.

    Args:
        model: a folder or a name on the Hugging Face hub of CLIP, T5 or another text encoder of the transformers
            library, with weights in safetensors.
        max_length: maximum number of tokens; longer text is truncated with a warning.
        cache: folder for float16 embeddings. `infer_settings` fills it for all captions of the data.
        device: computes embeddings that are not in the cache; auto prefers an accelerator.
        features: width of the hidden states, inferred.
        fingerprint: hash of the encoder's weights and tokenizer, inferred.
        examples: prompts to draw samples for.

    Whitespace is collapsed. None and blank text mean no condition, encoded as the empty string.
    """

    def __init__(
        self,
        model: str,
        max_length: int = 64,
        cache: str = "outputs/cache",
        device: str = "auto",
        features: int | None = None,
        fingerprint: str | None = None,
        examples: Sequence[str] = (),
    ) -> None:
        if features is None or fingerprint is None:
            raise ValueError(
                "conditioning.encode needs features and fingerprint for conditioning=pretrained; a new run takes those "
                "of its encoder"
            )
        self.model = model
        self.max_length = max_length
        self.device = device
        self.features = features
        self.fingerprint = fingerprint
        self.examples = list(examples)
        self._cache = EmbeddingCache(Path(cache) / f"texts-{digest(fingerprint, max_length)}", features)
        self._encoder: _Encoder | None = None

    def __call__(self, values: Sequence[str | None]) -> Tensor:
        texts = [clean_text(value) for value in values]
        out = torch.zeros(len(texts), self.max_length, self.features)
        arrays = self._cache.get(
            [key(text) for text in texts], partial(self._encode, {key(text): text for text in texts})
        )
        for row, array in zip(out, arrays, strict=True):
            row[: len(array)] = torch.from_numpy(array.astype(np.float32))
        return out

    @staticmethod
    def infer_settings(source: Source, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        captions = captions_of(source)
        folder = encoder_folder(settings["model"])
        inferred: dict[str, Any] = {
            "features": num_features(folder, settings.get("max_length", 64)),
            "fingerprint": fingerprint_of(folder),
        }
        inferred["examples"] = list(settings.get("examples") or distinct_texts(sample_captions(captions)))
        given = {name: settings[name] for name in ("model", "max_length", "cache", "device") if name in settings}
        Pretrained(**given, **inferred).prepare(captions)
        return inferred

    def prepare(self, captions: Sequence[Sequence[str]]) -> None:
        """Fill the cache with all captions, the examples and the empty string, 512 at a time."""
        warned = False
        texts = map(clean_text, chain(["", *self.examples], chain.from_iterable(captions)))
        while chunk := list(islice(texts, 512)):
            by_key = {key(text): text for text in chunk}
            missing = self._cache.missing(list(by_key))
            if missing and not warned:
                warned = True
                warnings.warn(
                    f"{self.model} encodes the captions; later runs read them from {self._cache.folder}", stacklevel=2
                )
            if missing:
                self._cache.get(missing, partial(self._encode, by_key))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_encoder": None}

    def _encode(self, texts: Mapping[int, str], keys: Sequence[int]) -> list[Embeddings]:
        if self._encoder is None or self._encoder.process != os.getpid():
            self._encoder = _Encoder(self.model, self.max_length, self.device, self.fingerprint)
        return self._encoder([texts[k] for k in keys])


class _Encoder:
    """A frozen pretrained text encoder with its tokenizer."""

    def __init__(self, model: str, max_length: int, device: str, fingerprint: str) -> None:
        folder = encoder_folder(model)
        if fingerprint_of(folder) != fingerprint:
            raise ValueError(
                f"{model} is not the encoder that this run was trained with; type encoder=FOLDER with that one, or "
                "train a new run"
            )
        num_features(folder, max_length)  # checks max_length
        package = import_optional("transformers")
        try:
            self.tokenizer = package.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # tokenizers raise almost anything
            raise ValueError(
                f"the tokenizer in {folder} cannot be opened ({one_line(error)}); save it again"
            ) from error
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token
        self.max_length = max_length
        self.process = os.getpid()
        # Memory on an accelerator does not survive the fork of a worker.
        in_worker = torch.utils.data.get_worker_info() is not None
        if device == "auto":
            device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
        self.device = torch.device("cpu" if in_worker else device)
        self.net = open_encoder(folder).to(self.device)
        self._warned = False

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> list[Embeddings]:
        """Return the last hidden states of each text, (tokens, features) float16."""
        states_of: dict[int, Embeddings] = {}
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # similar lengths need little padding
        for start in range(0, len(order), 64):
            chunk = order[start : start + 64]
            ids, mask = self._tokenize([texts[i] for i in chunk])
            states = self.net(input_ids=ids, attention_mask=mask).last_hidden_state.half()
            if not states.isfinite().all():
                raise ValueError(
                    "the encoder's hidden states are not finite in float16, the format of the cache; choose another "
                    "conditioning.encode.model"
                )
            for i, row, count in zip(chunk, states.cpu(), mask.sum(1).tolist(), strict=True):
                states_of[i] = row[:count].numpy()
        return [states_of[i] for i in range(len(texts))]

    def _tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Return ids and mask, (N, L <= max_length), padded at the end."""
        longest = max(len(ids) for ids in self.tokenizer(texts, verbose=False)["input_ids"])
        if longest > self.max_length and not self._warned:
            self._warned = True
            warnings.warn(
                f"conditioning.encode.max_length={self.max_length} truncates text of {longest} tokens; raise it, if "
                "the encoder allows, to keep all of them (further truncations are not reported)",
                stacklevel=2,
            )
        ids, masks = [], []
        for each in self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]:
            # A tokenizer without begin and end tokens returns no ids for the empty string.
            ids.append(torch.tensor(each or [self.tokenizer.pad_token_id]))
            masks.append(torch.ones(len(ids[-1]), dtype=torch.int64))
        padded = torch.nn.utils.rnn.pad_sequence(ids, True, self.tokenizer.pad_token_id or 0)
        return padded.to(self.device), torch.nn.utils.rnn.pad_sequence(masks, True).to(self.device)
