"""Conditions of text: what a pretrained encoder makes of it, computed once and kept on disk."""

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from src.cache import digest
from src.data.embedding_cache import EmbeddingCache, Embeddings
from src.data.sources import Source
from src.data.text import Texts, captions_of, clean, distinct, library, one_line, sample
from src.rng import key

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
BESIDE = ("config.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


class Pretrained(Texts):
    """Texts -> (N, max_length, features) float32: what a frozen encoder makes of their tokens, rows of padding being 0.

    `model` is a folder or a name on the Hugging Face hub of CLIP, T5 or any other encoder of texts that the
    transformers library knows, its weights in safetensors; the last hidden states are taken. Texts have one blank for
    several, and are cut at `length` tokens, with a warning; `None` and a blank text are the same, and give the
    encoder's answer to the empty text.

    What was computed is kept in `cache` as float16. The encoder is opened only for a text that is not there, on
    `device`: `auto` is an accelerator where there is one. `infer_settings` has it read all captions of the data;
    `features` and `fingerprint` are of the encoder that it found.
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
                "conditioning=pretrained needs the features and the fingerprint of its encoder, which are found as a "
                "run starts"
            )
        self.model = model
        self.max_length = max_length
        self.device = device
        self.features = features
        self.fingerprint = fingerprint
        self.examples = list(examples)
        self._cache = EmbeddingCache(Path(cache) / f"texts-{digest(fingerprint, max_length)}", features)
        self._encoder: _Encoder | None = None

    def __call__(self, asked: Sequence[str | None]) -> Tensor:
        texts = {key(text): text for text in map(clean, asked)}
        out = torch.zeros(len(asked), self.max_length, self.features)
        arrays = self._cache.get([key(clean(each)) for each in asked], partial(self._encode, texts))
        for row, array in zip(out, arrays, strict=True):
            row[: len(array)] = torch.from_numpy(array.astype(np.float32))
        return out

    @staticmethod
    def infer_settings(source: Source, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        captions = captions_of(source)
        folder = _folder(settings["model"])
        found: dict[str, Any] = {
            "features": _features(folder, settings.get("max_length", 64)),
            "fingerprint": _fingerprint(folder),
        }
        found["examples"] = list(settings.get("examples") or distinct(sample(captions)))
        given = {name: settings[name] for name in ("model", "max_length", "cache", "device") if name in settings}
        Pretrained(**given, **found).prepare(captions)
        return found

    def prepare(self, captions: Sequence[Sequence[str]]) -> None:
        """Compute what the cache lacks of all captions, the examples and the empty text, some hundreds at a time."""
        said = False
        texts = map(clean, chain(["", *self.examples], chain.from_iterable(captions)))
        while some := list(islice(texts, 512)):
            named = {key(text): text for text in some}
            lacking = self._cache.missing(list(named))
            if lacking and not said:
                said = True
                warnings.warn(
                    f"{self.model} reads the captions, once: later runs find them in {self._cache.folder}", stacklevel=2
                )
            if lacking:
                self._cache.get(lacking, partial(self._encode, named))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_encoder": None}

    def _encode(self, texts: Mapping[int, str], keys: Sequence[int]) -> list[Embeddings]:
        if self._encoder is None or self._encoder.process != os.getpid():
            self._encoder = _Encoder(self.model, self.max_length, self.device, self.fingerprint)
        return self._encoder([texts[k] for k in keys])


class _Encoder:
    """A pretrained encoder of texts, frozen, with its tokenizer."""

    def __init__(self, model: str, max_length: int, device: str, fingerprint: str) -> None:
        folder = _folder(model)
        if _fingerprint(folder) != fingerprint:
            raise ValueError(
                f"{model} is not the encoder that this run was trained with: give that one by encoder=..., or train "
                "anew"
            )
        _features(folder, max_length)  # which knows what cannot be
        package = library("transformers")
        try:
            self.tokenizer = package.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # whatever the many tokenizers raise
            raise ValueError(f"the tokenizer in {folder} cannot be opened ({one_line(error)}): save it anew") from error
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token
        self.max_length = max_length
        self.process = os.getpid()
        # What a process has on an accelerator does not outlive a fork, by which workers come to be.
        in_worker = torch.utils.data.get_worker_info() is not None
        self.device = torch.device("cpu" if in_worker else _accelerator() if device == "auto" else device)
        self.net = _open_net(folder).to(self.device)
        self._warned = False

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> list[Embeddings]:
        """The last hidden states of each text, (tokens, features) float16."""
        found: dict[int, Embeddings] = {}
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # alike in length: little padding
        for start in range(0, len(order), 64):
            some = order[start : start + 64]
            ids, mask = self._tokenize([texts[i] for i in some])
            states = self.net(input_ids=ids, attention_mask=mask).last_hidden_state.half()
            if not states.isfinite().all():
                raise ValueError(
                    "the encoder's hidden states are not finite in float16, in which they are kept: choose another "
                    "conditioning.encode.model"
                )
            for i, row, count in zip(some, states.cpu(), mask.sum(1).tolist(), strict=True):
                found[i] = row[:count].numpy()
        return [found[i] for i in range(len(texts))]

    def _tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask, (N, L <= max_length), padding last."""
        whole = max(len(ids) for ids in self.tokenizer(texts, verbose=False)["input_ids"])
        if whole > self.max_length and not self._warned:
            self._warned = True
            warnings.warn(
                f"a text of {whole} tokens is cut to {self.max_length} (and so are others that are longer): raise "
                "conditioning.encode.max_length for all of it, if the encoder takes as much",
                stacklevel=2,
            )
        ids, masks = [], []
        for each in self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]:
            # A tokenizer without tokens for the ends makes nothing of the empty text.
            ids.append(torch.tensor(each or [self.tokenizer.pad_token_id]))
            masks.append(torch.ones(len(ids[-1]), dtype=torch.int64))
        padded = torch.nn.utils.rnn.pad_sequence(ids, True, self.tokenizer.pad_token_id or 0)
        return padded.to(self.device), torch.nn.utils.rnn.pad_sequence(masks, True).to(self.device)


def _folder(model: str) -> Path:
    """Where the files of a pretrained model lie, downloaded if need be. Raises ValueError if they are not to be had."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = _from_hub(model)
    if lacking := _lacking(folder):
        raise ValueError(
            f"{model} is no text encoder that can be opened: it has no {' and no '.join(lacking)}; put there what "
            "save_pretrained writes of the encoder and of its tokenizer"
        )
    return folder


def _lacking(folder: Path) -> list[str]:
    """Names of files without which it holds no encoder and tokenizer."""
    wanted = {"config.json": ("config.json",), WEIGHTS: (WEIGHTS, INDEX), "tokenizer.json": TOKENIZERS}
    return [name for name, any_of in wanted.items() if not any((folder / each).is_file() for each in any_of)]


def _from_hub(model: str) -> Path:
    library("transformers")
    from huggingface_hub import snapshot_download

    wanted = [*TOKENIZERS, *BESIDE, WEIGHTS, INDEX, "model-*-of-*.safetensors"]
    try:
        try:
            folder = Path(snapshot_download(model, allow_patterns=wanted, local_files_only=True))
            if not _lacking(folder) and all(path.is_file() for path in _weights(folder)):
                return folder  # whole: a download may have been interrupted
        except OSError:
            pass  # nothing of it was downloaded before
        return Path(snapshot_download(model, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no text encoder {model}: there is no such folder, and none was downloaded ({one_line(error)}): give the "
            "folder with its config.json, tokenizer.json and model.safetensors as conditioning.encode.model"
        ) from error


def _fingerprint(folder: Path) -> str:
    """What stands for an encoder and its tokenizer: all of their small files, and samples of every weight."""
    parts: list[str] = []
    for name in (*TOKENIZERS, *BESIDE):
        path = folder / name
        parts += [name, path.read_bytes().hex()] if path.is_file() else []
    for path in _weights(folder):
        try:
            with safe_open(path, "pt"):
                pass  # it is whole, and its header can be believed
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} holds no weights that can be read ({one_line(error)}): save it anew") from error
        parts += [path.name, *_samples(path)]
    return digest(*parts)


def _weights(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    try:
        names = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    except (ValueError, KeyError) as error:
        raise ValueError(f"{folder / INDEX} names no files of weights ({one_line(error)}): save it anew") from error
    return [folder / name for name in sorted(names)]


def _samples(path: Path, count: int = 4, size: int = 4096) -> Iterator[str]:
    """The header of a safetensors file, and `count` pieces of each tensor: files of many GB are not read in whole."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        yield header.hex()
        for name, about in sorted(json.loads(header).items()):
            if name == "__metadata__":
                continue
            first, stop = about["data_offsets"]
            last = max(first, stop - size)
            for place in sorted({first + (last - first) * i // (count - 1) for i in range(count)}):
                file.seek(8 + length + place)
                yield file.read(min(size, stop - place)).hex()


def _config(folder: Path) -> Any:
    """The configuration of the text part of the model in `folder`. Raises ValueError if it has none."""
    try:
        config = library("transformers").AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"the model in {folder} is none that the transformers library knows ({one_line(error)}): choose another "
            "conditioning.encode.model"
        ) from error
    text = config.get_text_config(encoder=True) if config.is_encoder_decoder else config.get_text_config()
    if not getattr(text, "vocab_size", None):
        raise ValueError(
            f"the model in {folder} is a {config.model_type}, which has no part for texts: choose CLIP, T5 or another "
            "encoder of texts as conditioning.encode.model"
        )
    return text


def _features(folder: Path, max_length: int) -> int:
    """The width of the encoder's hidden states. Raises ValueError if it does not take `length` tokens."""
    config = _config(folder)
    most = getattr(config, "max_position_embeddings", None) or max_length
    if not 1 <= max_length <= most:
        raise ValueError(
            f"conditioning.encode.max_length must lie in [1, {most}], the tokens that the encoder in {folder} takes, got "
            f"{max_length}"
        )
    return int(config.hidden_size)


def _open_net(folder: Path) -> torch.nn.Module:
    """The encoder of texts in `folder`, in float32. Raises ValueError if its weights do not make one."""
    package = library("transformers")
    config = _config(folder)
    try:
        known = type(config) in package.MODEL_FOR_TEXT_ENCODING_MAPPING
        kind = package.AutoModelForTextEncoding if known else package.AutoModel
        with _quiet(package):
            net, loaded = kind.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"the encoder in {folder} cannot be opened ({one_line(error)}): save it anew") from error
    missing = sorted(name for name in loaded["missing_keys"] if "pooler" not in name)  # which is not used
    if missing:
        raise ValueError(
            f"the weights in {folder} lack {len(missing)} of the encoder's, among them {missing[0]}: save it anew"
        )
    if net.config.is_encoder_decoder:
        net = net.get_encoder()
    return net.eval().requires_grad_(False)  # type: ignore[no-any-return]


@contextmanager
def _quiet(package: Any) -> Iterator[None]:
    """No table of the weights that are not of the text part, and no progress bar."""
    logging = package.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _accelerator() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
