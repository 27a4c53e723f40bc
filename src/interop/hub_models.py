"""Open models of the Hugging Face Hub, and push them there, by `huggingface_hub`, an optional extra."""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from src.errors import format_override, one_line, optional_package

SCHEME = "hf://"
MODEL_FILE = "model.safetensors"
SIDECAR = "training.safetensors"  # of format=diffusers
LOGIN = "run hf auth login, or set the variable HF_TOKEN"
PATTERNS = (
    *(MODEL_FILE, SIDECAR, "model_index.json", "config.json", "scheduler_config.json"),
    *("diffusion_pytorch_model*.safetensors", "unet/*.json", "unet/*.safetensors", "scheduler/*.json"),
    *("transformer/*.json", "transformer/*.safetensors"),
)
"""The files of a model that this project reads."""
NOT_PUSHED = [".hydra/*", "*.log"]
"""What Hydra writes into the folder of an export: the command line, with paths of this machine."""


def local_copy(location: str, setting: str, patterns: tuple[str, ...] = PATTERNS) -> Path:
    """Return the folder of the model `user/name`, `hf://user/name` or `hf://user/name@revision` of the Hub.

    It is in the cache of the Hub's library, and holds an exported model of this project or a model of diffusers, of
    which only files that match `patterns` are downloaded. `setting` is the name of `location` in messages. Raises
    ValueError if the Hub has no such model, does not permit the download, or cannot be reached.
    """
    override = format_override(setting, location)
    _import_library(override)
    repo, at, revision = location.removeprefix(SCHEME).partition("@")
    if at and not revision:
        raise ValueError(f"{override} has an empty revision; leave out the @")
    with _hub_errors(override, repo):
        folder = _download(repo, revision or None, patterns)
    names = (MODEL_FILE, "model_index.json", "config.json", "vae/config.json")
    if not any((folder / name).is_file() for name in names):
        raise ValueError(f"{override} has neither {MODEL_FILE} nor a model of diffusers; name another model")
    return folder


@functools.cache
def _download(repo: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """Return the folder of a repository; once per process, so that all readers get the same revision."""
    download = _import_library(repo).snapshot_download
    folder = Path(download(repo, revision=revision, allow_patterns=[*patterns], ignore_patterns=["*.fp16.*", "*ema*"]))
    if (folder / SIDECAR).is_file():  # a pipeline of this project, which may have an autoencoder of its own
        download(repo, revision=revision, allow_patterns=["vae/*.json", "vae/*.safetensors"])
    places = [x for x in ("", "unet/", "transformer/", "vae/") if any(each.startswith(x) for each in patterns)]
    if not any(any(folder.glob(f"{place}*.safetensors")) for place in places):
        download(repo, revision=revision, allow_patterns=[f"{place}diffusion_pytorch_model.bin" for place in places])
    return folder


def check_push(repo: str) -> None:
    """Raise ValueError if it is certain that `push` would fail: without package, valid name, network or login."""
    override = format_override("hub", repo)
    _import_library(override)
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    with _hub_errors(override, repo):
        validate_repo_id(repo)
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{override} needs the network, and HF_HUB_OFFLINE is set; unset it, or leave hub out")
    if get_token() is None:
        raise ValueError(f"{override} needs a login: {LOGIN}")


def push(folder: Path, repo: str, private: bool) -> str:
    """Upload the files of an exported model to the repository `user/name`, and return its address.

    A missing repository is created, visible to others unless `private`; an existing one keeps its visibility. Raises
    ValueError if the Hub does not permit the upload or cannot be reached.
    """
    override = format_override("hub", repo)
    api = _import_library(override).HfApi()
    with _hub_errors(override, repo):
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, ignore_patterns=NOT_PUSHED)
    return str(url)


def _import_library(override: str) -> Any:
    with optional_package(override, "huggingface_hub", ", or leave it out"):
        import huggingface_hub
    for name in ("httpx", "httpx2"):  # which logs every request
        logging.getLogger(name).setLevel(logging.WARNING)
    return huggingface_hub


@contextmanager
def _hub_errors(override: str, repo: str) -> Iterator[None]:
    """Turn the library's errors into ValueError with the setting and the fix."""
    from huggingface_hub import constants, errors

    try:
        yield
    except Exception as error:  # those of its HTTP library too, which depends on its version
        match error:
            case errors.HFValidationError():
                problem = "does not name a model of the Hub; its form is user/name, of letters, digits, - _ and ."
            case errors.GatedRepoError():
                problem = f"needs the consent of its authors; ask on https://huggingface.co/{repo}, then {LOGIN}"
            case errors.RepositoryNotFoundError():
                problem = f"does not exist or is private; check its name, or {LOGIN}"
            case errors.RevisionNotFoundError():
                problem = "has no such revision; name a branch, tag or commit after the @, or leave it out"
            case errors.LocalEntryNotFoundError():
                fix = "unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "check the connection"
                problem = f"was not downloaded before, and the Hub cannot be reached; {fix}"
            case errors.EntryNotFoundError():
                problem = f"has no {MODEL_FILE}; name a model that src.export hub=... has pushed"
            case _:
                problem = f"failed ({one_line(error)}); check the connection and your rights, and try again"
        raise ValueError(f"{override} {problem}") from error
