"""Text conditions from a frozen pretrained encoder, computed once and cached on disk."""

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

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
CONFIG_FILES = ("config.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


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
        folder = _folder(settings["model"])
        inferred: dict[str, Any] = {
            "features": _features(folder, settings.get("max_length", 64)),
            "fingerprint": _fingerprint(folder),
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
        folder = _folder(model)
        if _fingerprint(folder) != fingerprint:
            raise ValueError(
                f"{model} is not the encoder that this run was trained with; set encoder=... to that one, or train a "
                "new run"
            )
        _features(folder, max_length)  # checks max_length
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
        self.net = _open_net(folder).to(self.device)
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


def _folder(model: str) -> Path:
    """Return the folder of a pretrained model, after downloading it if necessary. Raises ValueError on failure."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = _from_hub(model)
    if missing := _missing_files(folder):
        raise ValueError(
            f"conditioning.encode.model={model} has no {' and no '.join(missing)}; save the encoder and its tokenizer "
            "there with save_pretrained"
        )
    return folder


def _missing_files(folder: Path) -> list[str]:
    """Return the required files of an encoder and its tokenizer that are missing."""
    wanted = {"config.json": ("config.json",), WEIGHTS: (WEIGHTS, INDEX), "tokenizer.json": TOKENIZER_FILES}
    return [name for name, any_of in wanted.items() if not any((folder / each).is_file() for each in any_of)]


def _from_hub(model: str) -> Path:
    import_optional("transformers")
    from huggingface_hub import snapshot_download

    wanted = [*TOKENIZER_FILES, *CONFIG_FILES, WEIGHTS, INDEX, "model-*-of-*.safetensors"]
    try:
        try:
            folder = Path(snapshot_download(model, allow_patterns=wanted, local_files_only=True))
            if not _missing_files(folder) and all(path.is_file() for path in _weights(folder)):
                return folder  # complete; a download may have been interrupted
        except OSError:
            pass  # not downloaded before
        return Path(snapshot_download(model, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"conditioning.encode.model={model} is neither a folder nor downloadable ({one_line(error)}); set it to "
            "a folder with config.json, tokenizer.json and model.safetensors"
        ) from error


def _fingerprint(folder: Path) -> str:
    """Return a digest of an encoder and its tokenizer: all small files, and excerpts of every weight."""
    parts: list[str] = []
    for name in (*TOKENIZER_FILES, *CONFIG_FILES):
        path = folder / name
        parts += [name, path.read_bytes().hex()] if path.is_file() else []
    for path in _weights(folder):
        try:
            with safe_open(path, "pt"):
                pass  # the file is complete and its header valid
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is corrupted ({one_line(error)}); save it again") from error
        parts += [path.name, *_excerpts(path)]
    return digest(*parts)


def _weights(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    try:
        names = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    except (ValueError, KeyError) as error:
        raise ValueError(f"{folder / INDEX} lists no weight files ({one_line(error)}); save it again") from error
    return [folder / name for name in sorted(names)]


def _excerpts(path: Path, count: int = 4, size: int = 4096) -> Iterator[str]:
    """Yield the header of a safetensors file and `count` excerpts of each tensor, since files may have many GB."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        yield header.hex()
        for name, entry in sorted(json.loads(header).items()):
            if name == "__metadata__":
                continue
            first, stop = entry["data_offsets"]
            last = max(first, stop - size)
            for offset in sorted({first + (last - first) * i // (count - 1) for i in range(count)}):
                file.seek(8 + length + offset)
                yield file.read(min(size, stop - offset)).hex()


def _config(folder: Path) -> Any:
    """Return the configuration of the model's text encoder. Raises ValueError if it has none."""
    try:
        config = import_optional("transformers").AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"the transformers library does not know the model in {folder} ({one_line(error)}); choose another "
            "conditioning.encode.model"
        ) from error
    text = config.get_text_config(encoder=True) if config.is_encoder_decoder else config.get_text_config()
    if not getattr(text, "vocab_size", None):
        raise ValueError(
            f"the model in {folder} is a {config.model_type} without a text encoder; set conditioning.encode.model to "
            "CLIP, T5 or another text encoder"
        )
    return text


def _features(folder: Path, max_length: int) -> int:
    """Return the width of the encoder's hidden states. Raises ValueError if it does not take `max_length` tokens."""
    config = _config(folder)
    limit = getattr(config, "max_position_embeddings", None) or max_length
    if not 1 <= max_length <= limit:
        raise ValueError(
            f"conditioning.encode.max_length={max_length} must be in [1, {limit}], the limit of the encoder in {folder}"
        )
    return int(config.hidden_size)


def _open_net(folder: Path) -> torch.nn.Module:
    """Load the text encoder in float32. Raises ValueError if its weights are incomplete."""
    package = import_optional("transformers")
    config = _config(folder)
    try:
        known = type(config) in package.MODEL_FOR_TEXT_ENCODING_MAPPING
        auto_class = package.AutoModelForTextEncoding if known else package.AutoModel
        with _quiet(package):
            net, loaded = auto_class.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"the encoder in {folder} cannot be opened ({one_line(error)}); save it again") from error
    missing = sorted(name for name in loaded["missing_keys"] if "pooler" not in name)  # unused
    if missing:
        raise ValueError(
            f"the weights in {folder} lack {len(missing)} of the encoder's, such as {missing[0]}; save it again"
        )
    if net.config.is_encoder_decoder:
        net = net.get_encoder()
    return net.eval().requires_grad_(False)  # type: ignore[no-any-return]


@contextmanager
def _quiet(package: Any) -> Iterator[None]:
    """Suppress the table of unused weights and the progress bar."""
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
