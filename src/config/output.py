"""Defer the output of a command until everything is built.

Hydra writes `.hydra/` and opens the job's log before it calls the task. A command that the task rejects would
therefore have changed the run that it should resume. `defer_output` makes Hydra write neither, and `start_output`
writes both.
"""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from hydra.utils import to_absolute_path
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from src.data import PATH_KEYS
from src.distributed.ranks import rank, record_missing_dirs
from src.errors import UsageError, first_line

OUTPUT_OVERRIDE = re.compile(r"[+~]*hydra[./](output_subdir|job_logging)\b")
"""Overrides that control Hydra's files in the output folder."""
HYDRAS_FORMAT = "[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"
"""Format of log lines, unless an override sets another one."""
NO_OUTPUT = ("hydra.output_subdir=null", "hydra/job_logging=none")
"""Overrides that disable Hydra's output."""
NAME_OR_FILE = (
    *("cond", "data.name", "conditioning.encode.model", "encoder", "autoencoder", "autoencoder.path", "dinov2_model"),
    "repa.encoder",
)
"""Settings whose value may be a file or folder, or something else, such as a name of the hub."""
FILE_SETTINGS = (
    *(name for name in PATH_KEYS if name not in NAME_OR_FILE and "data.source." not in name),  # those are in data.root
    *("data.cache_dir", "schedule.betas", "conditioning.encode.cache", "callbacks.quality.cache", "cache"),
    *("autoencoder.cache_dir", "inception_weights", "guidance.model", "resume", "run", "ckpt", "runs"),
)
"""Settings of files and folders."""


class DeferredOutput(NamedTuple):
    """The output that Hydra's settings request. Launchers send it to their workers."""

    output_subdir: str | None
    job_logging: dict[str, Any]
    """With interpolations unresolved."""
    overrides: list[str]
    """The typed overrides of these settings."""
    folder: Path
    """Of the run, or of the sweep."""


class PendingOutput(NamedTuple):
    """The output of the running job, until `start_output` writes it."""

    subdir: str | None
    texts: dict[str, str]
    """Contents of the files in `subdir`, by name."""
    logs: list[tuple[MemoryHandler, logging.FileHandler]]
    """The lines so far of each log file, which is not open yet."""


_pending: PendingOutput | None = None


def defer_output(cfg: DictConfig, overrides: Sequence[str], multirun: bool) -> tuple[list[str], DeferredOutput]:
    """Return overrides with which Hydra writes no output, and the output that it would write.

    `cfg` is the composed configuration with Hydra's node. Records which of the output folder and its parents are
    missing. Raises UsageError if the name of the folder cannot be resolved.
    """
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(cfg)  # the folder's name may contain `${hydra:...}`
    try:
        folder = Path(cfg.hydra.sweep.dir if multirun else cfg.hydra.run.dir)
    except OmegaConfBaseException as error:
        setting = "hydra.sweep.dir" if multirun else "hydra.run.dir"
        raise UsageError(f"{setting} cannot be resolved ({first_line(error)}); name a folder") from error
    finally:
        HydraConfig.instance().cfg = before
    record_missing_dirs(folder)
    job_logging = OmegaConf.to_container(cfg.hydra.job_logging, resolve=False)
    assert isinstance(job_logging, dict)
    own = [o for o in overrides if OUTPUT_OVERRIDE.match(o)]
    kept = [o for o in overrides if not OUTPUT_OVERRIDE.match(o)]
    logged = {str(key): value for key, value in job_logging.items()}
    return [*kept, *NO_OUTPUT], DeferredOutput(cfg.hydra.output_subdir, logged, own, folder)


def store_output(deferred: DeferredOutput, cfg: DictConfig) -> None:
    """Restore Hydra's output settings, log only to the console, and store the rest for `start_output`."""
    global _pending
    settings: Any = HydraConfig.get()
    with read_write(settings), open_dict(settings):
        settings.output_subdir = deferred.output_subdir
        settings.job_logging = deferred.job_logging
        settings.overrides.hydra = [
            *(o for o in settings.overrides.hydra if o not in NO_OUTPUT),
            *deferred.overrides,
        ]
    job_logging: Any = OmegaConf.create(OmegaConf.to_container(settings.job_logging, resolve=True))
    simple = OmegaConf.select(job_logging, "formatters.simple.format")
    for handler in (job_logging.get("handlers") or {}).values():
        if "filename" in handler:
            handler.delay = True  # opens the file at the first line
        elif simple == HYDRAS_FORMAT and not settings.verbose:
            handler.formatter = "plain"  # as the lines that commands print; the file keeps time and module
            job_logging.formatters.plain = {"format": "%(message)s"}
    configure_log(job_logging, settings.verbose)
    root, logs = logging.getLogger(), []
    for file in [each for each in root.handlers if isinstance(each, logging.FileHandler)]:
        root.removeHandler(file)
        if rank() == 0:  # the first process writes for all
            logs.append((MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1), file))
            root.addHandler(logs[-1][0])
    texts = {
        "config.yaml": OmegaConf.to_yaml(cfg),  # the task may change it later
        "hydra.yaml": OmegaConf.to_yaml(HydraConfig.instance().cfg),
        "overrides.yaml": OmegaConf.to_yaml(settings.overrides.task),
    }
    _pending = PendingOutput(deferred.output_subdir, texts, logs)


def start_output(folder: Path) -> Path:
    """Create the output folder of a command, write `.hydra/` and open the log. Does nothing in other processes."""
    global _pending
    if rank() > 0:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    if _pending is None:
        return folder
    pending, _pending = _pending, None
    if pending.subdir is not None:
        with TemporaryDirectory(prefix=".", dir=folder) as aside:  # a full disk leaves the old files
            for name, text in pending.texts.items():
                (Path(aside) / name).write_text(text, encoding="utf-8")
            (folder / pending.subdir).mkdir(parents=True, exist_ok=True)
            for name in pending.texts:
                os.replace(Path(aside) / name, folder / pending.subdir / name)
    root = logging.getLogger()
    for lines, file in pending.logs:
        root.removeHandler(lines)
        root.addHandler(file)
        Path(file.baseFilename).touch()
        for line in lines.buffer:
            file.handle(line)
    return folder


def discard_output() -> None:
    """Discard the output of a rejected job and close its log file if one is open."""
    global _pending
    _pending = None
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, logging.FileHandler | MemoryHandler)]:
        root.removeHandler(handler)
        handler.close()


@contextmanager
def preserve_sweep(deferred: DeferredOutput) -> Iterator[None]:
    """Run a sweep in its folder; restore the folder's own files if no job started.

    Hydra writes `multirun.yaml` before the first job, so the file of an earlier start is moved away first.
    """
    if rank() > 0:
        yield
        return
    sweep, subdir = deferred.folder, deferred.output_subdir
    file, aside = sweep / "multirun.yaml", sweep / ".multirun.yaml.before"
    if existed := file.is_file():
        os.replace(file, aside)
    jobs = _start_times(sweep, subdir)
    try:
        yield
    finally:
        if _start_times(sweep, subdir) != jobs:
            aside.unlink(missing_ok=True)
        elif existed:
            os.replace(aside, file)
        else:
            for path in [file, *sweep.glob(".worker_*")]:
                path.unlink(missing_ok=True)


def _start_times(sweep: Path, subdir: str | None) -> dict[Path, int]:
    """Return when each job of a sweep last started."""
    files = sweep.rglob(f"{subdir or '.hydra'}/overrides.yaml")
    return {path: path.stat().st_mtime_ns for path in files}


def absolute_paths(cfg: DictConfig) -> None:
    """Make the paths in `cfg` absolute, from the folder in which the command was typed, under hydra.job.chdir=true."""
    if not HydraConfig.get().job.chdir:
        return

    def absolute(value: Any) -> Any:
        if isinstance(value, list):
            return [absolute(each) for each in value]
        return value if not isinstance(value, str) or ":" in value or value == "auto" else to_absolute_path(value)

    for name in (*FILE_SETTINGS, *NAME_OR_FILE):
        parent, _, key = name.rpartition(".")
        node = OmegaConf.select(cfg, parent) if parent else cfg
        if not isinstance(node, DictConfig) or key not in node or OmegaConf.is_interpolation(node, key):
            continue
        value = OmegaConf.to_container(node[key]) if isinstance(node[key], ListConfig) else node[key]
        if name in FILE_SETTINGS or (isinstance(value, str) and os.path.lexists(to_absolute_path(value))):
            node[key] = absolute(value)


def relative(path: Path) -> Path:
    """Return `path` relative to the folder in which the command was typed, if it is below it."""
    here = Path(HydraConfig.get().runtime.cwd) if HydraConfig.initialized() else Path.cwd()
    return path.absolute().relative_to(here) if path.absolute().is_relative_to(here) else path.absolute()
