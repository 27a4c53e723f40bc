"""Find, check and load the files of a pretrained text encoder: a folder, or a download from the Hugging Face hub."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from src.cache import digest
from src.data.text import import_optional
from src.errors import one_line

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tokenizer.model"),
)
CONFIG_FILES = ("config.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def encoder_folder(model: str) -> Path:
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


def fingerprint_of(folder: Path) -> str:
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


def num_features(folder: Path, max_length: int) -> int:
    """Return the width of the encoder's hidden states. Raises ValueError if it does not take `max_length` tokens."""
    config = _config(folder)
    limit = getattr(config, "max_position_embeddings", None) or max_length
    if not 1 <= max_length <= limit:
        raise ValueError(
            f"conditioning.encode.max_length={max_length} must be in [1, {limit}], the limit of the encoder in {folder}"
        )
    return int(config.hidden_size)


def open_encoder(folder: Path) -> torch.nn.Module:
    """Load the text encoder in float32. Raises ValueError if its weights are incomplete."""
    package = import_optional("transformers")
    config = _config(folder)
    try:
        known = type(config) in package.MODEL_FOR_TEXT_ENCODING_MAPPING
        auto_class = package.AutoModelForTextEncoding if known else package.AutoModel
        with _quiet(package):
            options = {"use_safetensors": True, "trust_remote_code": False, "local_files_only": True}
            net, loaded = auto_class.from_pretrained(
                folder, config=config, dtype=torch.float32, output_loading_info=True, **options
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
