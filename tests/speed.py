"""Make a process of the tests faster, without torch and without other results."""

import gc
import pickle
from dataclasses import astuple, replace
from functools import cache
from typing import Any

import omegaconf.base
import yaml
from hydra._internal import config_loader_impl, config_repository, defaults_list
from hydra.core.config_store import ConfigStore

from src.config.search_path import CONF


def speed_up() -> None:
    """Search for garbage less often; parse each text and interpolation, and compose each choice of files, once.

    By default Python searches the many objects of imported modules again and again: a tenth of the time.
    """
    gc.set_threshold(20_000, 20, 20)
    load = yaml.load
    parsed: dict[tuple[str, str], bytes] = {}

    def load_once(stream: Any, Loader: type) -> Any:
        text = stream
        if hasattr(stream, "read"):
            start = stream.tell()
            text = stream.read()
            stream.seek(start)
        key = text, Loader.__qualname__  # OmegaConf makes a new class for each file
        if key not in parsed:
            parsed[key] = pickle.dumps(load(stream, Loader))  # whose name an error has
        return pickle.loads(parsed[key])  # a copy, six times as fast as deepcopy

    yaml.load = load_once
    omegaconf.base.parse = cache(omegaconf.base.parse)
    _compose_once()


def _compose_once() -> None:
    """Reuse what Hydra makes of the same files of conf/ before it overrides values: four fifths of its time."""
    create, make_map = config_loader_impl.create_defaults_list, defaults_list._create_interpolation_map
    loader, files = config_loader_impl.ConfigLoaderImpl, config_repository.ConfigRepository
    compose, load = loader._compose_config_from_defaults_list, files.load_config
    store = ConfigStore.store
    lists: dict[tuple[Any, ...], defaults_list.DefaultsList] = {}
    composed: dict[tuple[Any, ...], bytes] = {}
    loaded: dict[tuple[Any, ...], bytes] = {}

    stored: list[None] = []  # one for each call of ConfigStore.store, as by plugins

    def sources(repo: Any, file: str = "") -> tuple[Any, ...] | None:
        """Return the folders of `repo` and the state of its files, or of one; None if it has folders of users."""
        if any(each.scheme() == "file" and each.path != str(CONF) for each in repo.get_sources()):
            return None
        files = [CONF / file] if file else CONF.rglob("*.yaml")
        times = (each.stat().st_mtime_ns for each in files if each.is_file())
        plugins = (len(ConfigStore.instance().repo["hydra"].get(group, ())) for group in ("launcher", "sweeper"))
        return (*(each.path for each in repo.get_sources()), len(stored), *plugins, *times)

    def load_once(self: Any, config_path: str) -> Any:
        key = sources(self, config_path if config_path.endswith(".yaml") else f"{config_path}.yaml"), config_path
        if key[0] is None or key not in loaded:
            loaded[key] = pickle.dumps(load(self, config_path))
        return pickle.loads(loaded[key])

    def create_once(repo: Any, config_name: str, overrides_list: list[Any], **further: bool) -> Any:
        typed = defaults_list.Overrides(repo, overrides_list)
        choices = (each.input_line for each in overrides_list if each not in typed.config_overrides)
        key = sources(repo), config_name, *choices, *further.items()
        if key[0] is None or key not in lists:
            lists[key] = create(repo, config_name, overrides_list, **further)
        return replace(lists[key], config_overrides=typed.config_overrides)

    def compose_once(self: Any, defaults: list[Any], repo: Any) -> Any:
        key = sources(repo), *map(astuple, defaults)
        if key[0] is None or key not in composed:
            composed[key] = pickle.dumps(compose(self, defaults, repo))
        return pickle.loads(composed[key])

    def make_map_if_used(overrides: Any, defaults: list[Any], self_added: bool) -> Any:
        used = any(each.is_interpolation() for each in defaults)
        return make_map(overrides, defaults, self_added) if used else None

    def count_stored(*args: Any, **further: Any) -> None:
        stored.append(None)
        store(*args, **further)

    files.load_config = load_once
    config_loader_impl.create_defaults_list = create_once
    loader._compose_config_from_defaults_list = compose_once
    defaults_list._create_interpolation_map = make_map_if_used
    ConfigStore.store = count_stored
    ConfigStore.__deepcopy__ = lambda self, memo: self  # copied for each composition, changed by none
