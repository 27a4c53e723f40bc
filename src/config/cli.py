"""Start a command: check the command line before any slow import, then run Hydra."""

import os
import signal
import sys
import threading
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.utils import JobReturn
from hydra.types import RunMode
from omegaconf import DictConfig, read_write

import src
from src.config import resolvers, sweeps  # noqa: F401 - `resolvers` registers those of conf/
from src.config.help import help_text
from src.config.output import DeferredOutput, absolute_paths, defer_output, discard_output, preserve_sweep, store_output
from src.config.overrides import check_overrides, chosen_options, expand_grid
from src.config.pipes import end_silently, print_at_end, quiet_pipe, reader_left
from src.config.resume import check_unused, check_writable, expand_resume, expand_sweep, explain_resume
from src.config.search_path import CONF, check_config_flags, config_folders, config_groups, extra_folders
from src.config.words import (
    check_flags,
    check_package,
    choose_none,
    expand_home,
    expand_init_from,
    key_of,
    last_value,
    split_arguments,
)
from src.distributed.ranks import (
    Interruption,
    exit_process,
    handle_signals,
    ignore_signals,
    is_orphan,
    kill_children,
    rank,
    remove_empty_dirs,
    run_as_worker,
    signals_blocked,
)
from src.errors import UsageError, escaped

SPIN_COUNT = 5_000
"""Number of times that a libgomp thread of torch polls for work before it sleeps; libgomp's default is 300,000.

A polling thread occupies a core that another process may need (docs/design.md).
"""

Program = tuple[ModuleSpec | None, str]
"""The typed command: the module that `python -m` found, and its file."""


def launch(config_name: str, task: Callable[[DictConfig], Any], together: str | None = None) -> None:
    """Run `task` with the configuration that the command line composes; exit with status 2 on a UsageError.

    Without -m, several values of the group `together` become a list for one task (`overrides.expand_grid`).
    HYDRA_FULL_ERROR=1 shows the traceback of a UsageError.
    """
    if "OMP_WAIT_POLICY" not in os.environ:  # torch reads it on import
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
    interruption = Interruption()
    try:
        with handle_signals(interruption), quiet_pipe():
            _launch(config_name, task, together, interruption)
    except KeyboardInterrupt:  # nothing to save yet
        kill_children()
        remove_empty_dirs()
        if rank() == 0:
            print("Interrupted", file=sys.stderr)
        exit_process(128 + (interruption.number or signal.SIGINT))
    finally:
        discard_output()  # of a task that wrote none
        remove_empty_dirs()


def _launch(
    config_name: str, task: Callable[[DictConfig], Any], together: str | None, interruption: Interruption
) -> None:
    warnings.formatwarning = lambda message, *_, **__: f"\nwarning: {message}\n"  # without file and line
    try:
        read = _read_command_line(config_name, together)
    except UsageError as error:
        sys.exit(_report(error))
    if read is None:
        return
    flags, deferred = read
    full_error = os.environ.get("HYDRA_FULL_ERROR") == "1"
    job = _job(task, deferred, full_error, interruption)
    run = hydra.main(version_base="1.3", config_path=str(CONF), config_name=flags.config_name or config_name)(job)
    if flags.cfg or flags.info or flags.hydra_help or flags.shell_completion:
        with print_at_end():
            run()
    elif flags.multirun and deferred:
        _run_sweep(run, deferred, full_error)
    else:
        run()


def _read_command_line(config_name: str, together: str | None) -> tuple[Namespace, DeferredOutput | None] | None:
    """Check sys.argv and leave there what Hydra needs; return the flags and the deferred output.

    Prints the version or the help, if typed, and returns None. Raises UsageError.
    """
    overrides, words = split_arguments(sys.argv[1:])
    if "--version" in words:
        print(f"{src.NAME} {src.__version__}")
        return None
    flags = get_args_parser().parse_args([*words, *overrides])
    check_flags(flags)
    flags.multirun = flags.multirun or last_value(overrides, "hydra.mode") == "MULTIRUN"
    added = extra_folders(overrides, flags.config_dir)
    if flags.help:
        folders = config_folders(added)
        typed = chosen_options(config_name, choose_none(overrides, folders), added)
        print(help_text(config_name, config_groups(folders), typed, folders))
        return None
    if flags.config_path or flags.config_name:
        check_config_flags(config_name, flags, added)
    overrides, deferred = _prepare(config_name, overrides, flags, added, together)
    if flags.config_path and Path(flags.config_path).is_dir():  # Hydra would look next to this file
        words += ["--config-path", str(Path(flags.config_path).resolve())]
    sys.argv[1:] = [*words, *overrides]
    return flags, deferred


def _job(
    task: Callable[[DictConfig], Any], deferred: DeferredOutput | None, full_error: bool, interruption: Interruption
) -> Callable[[DictConfig], Any]:
    """Return the function that Hydra calls for each job. It exits with status 2 on a UsageError of a single run."""
    program = sys.modules["__main__"].__spec__, sys.argv[0]

    def run_task(cfg: DictConfig) -> Any:
        absolute_paths(cfg)
        if deferred is not None:
            store_output(deferred, cfg)
        quote_run_dir()
        sweeps_jobs = HydraConfig.get().mode == RunMode.MULTIRUN
        try:
            return run_sweep_job(task, cfg, program, full_error) if sweeps_jobs else task(cfg)
        except UsageError as error:
            if interruption.number:  # a library turned the interruption into an error
                raise KeyboardInterrupt from error
            discard_output()
            if full_error or sweeps_jobs:  # a sweep runs its other jobs first
                raise
            sys.exit(_report(error))
        except Exception as error:
            if interruption.number:
                raise KeyboardInterrupt from error
            if isinstance(error, BrokenPipeError) and reader_left():  # Hydra would print a traceback
                end_silently()
            for _ in range(100 if rank() > 0 else 0):
                if is_orphan():
                    os._exit(1)  # the first process prints the message
                time.sleep(0.1)
            raise
        finally:
            if sweeps_jobs:
                with suppress(OSError):  # fails if the job wrote into its folder
                    Path(HydraConfig.get().runtime.output_dir).rmdir()

    return run_task


def _run_sweep(run: Callable[[], Any], deferred: DeferredOutput, full_error: bool) -> None:
    """Run the jobs of a sweep; exit with status 2 if one was refused."""
    if not full_error:  # Hydra then raises a job's error here instead of exiting with status 1
        os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        with preserve_sweep(deferred), block_signals_of_workers(), one_line_per_refusal():
            run()
    except UsageError as error:
        if full_error:
            raise
        sys.exit(_report(error))
    finally:
        if not full_error:
            os.environ.pop("HYDRA_FULL_ERROR", None)


def _prepare(
    config_name: str, overrides: list[str], flags: Namespace, added: list[str], together: str | None
) -> tuple[list[str], DeferredOutput | None]:
    """Return the overrides for Hydra and the deferred output. Raises UsageError."""
    if flags.experimental_rerun:
        raise UsageError("--experimental-rerun unpickles a file, which can run any code; type resume=FOLDER")
    if rank() == 0:  # Lightning repeats settings for the processes that it starts
        warn_repeated(overrides)
    typed = expand_init_from(expand_home(overrides), config_name)
    overrides = expand_sweep(typed) if flags.multirun else expand_resume(typed) if config_name == "train" else typed
    overrides = choose_none(overrides, config_folders(added))
    check_unused(overrides, flags.multirun)
    if rank() > 0:
        run_as_worker()
    if flags.hydra_help or flags.info or flags.shell_completion or flags.config_path or flags.config_name:
        return overrides, None
    if together and not flags.multirun:
        overrides = expand_grid(config_name, overrides, together, added)
    try:
        cfg = check_overrides(config_name, overrides, flags.multirun, added)
    except UsageError as error:
        raise explain_resume(error, config_name, typed, overrides, added) from error
    if flags.cfg:
        check_package(flags, cfg)
        return overrides, None
    overrides, deferred = defer_output(cfg, overrides, flags.multirun)
    check_writable(overrides)
    return overrides, deferred


def warn_repeated(overrides: list[str]) -> None:
    """Warn if two overrides set the same key; Hydra uses the last one."""
    seen: dict[str, str] = {}
    for override in overrides:
        if (key := key_of(override)) in seen and seen[key] != override:
            warnings.warn(f"{seen[key]} has no effect: {override} follows and sets {key} too", stacklevel=2)
        seen[key] = override


@contextmanager
def block_signals_of_workers() -> Iterator[None]:
    """Block stop signals in the worker processes of a launcher, so that only this process receives them."""
    with suppress(ImportError):  # a resource tracker that starts later would unblock them
        from multiprocessing import resource_tracker

        from joblib.externals.loky.backend import resource_tracker as tracker_of_loky

        resource_tracker.ensure_running()
        tracker_of_loky.ensure_running()
    threading.Thread(target=threading.Event().wait, daemon=True).start()  # receives them for the main thread
    with signals_blocked():
        yield


@contextmanager
def one_line_per_refusal() -> Iterator[None]:
    """Raise the UsageError of a sweep's job without Hydra's line "Error executing job" before it."""
    hydras = JobReturn.__dict__["return_value"]

    def value(job: JobReturn) -> Any:
        if isinstance(job._return_value, UsageError):
            raise job._return_value
        return hydras.fget(job)

    setattr(JobReturn, "return_value", property(value, hydras.fset))  # noqa: B010 - mypy refuses an assignment
    try:
        yield
    finally:
        setattr(JobReturn, "return_value", hydras)  # noqa: B010


def quote_run_dir() -> None:
    """Escape the run folder: Lightning writes it between double quotes into the command lines of its processes."""
    settings: Any = HydraConfig.get()
    with read_write(settings), read_write(settings.run):
        quoted = QuotedString(escaped(settings.runtime.output_dir), Quote.double).with_quotes()[1:-1]
        settings.run.dir = escaped(quoted)  # twice, because OmegaConf resolves it once more


@contextmanager
def as_single_run(program: Program, full_error: bool) -> Iterator[None]:
    """Make a sweep job look like a single run to the processes that it launches.

    Restores the environment and ends the process group afterwards, so that the next job starts its own.
    """
    main = sys.modules["__main__"]  # in a launcher's worker this is the launcher's module
    arguments, environment, spec = sys.argv, dict(os.environ), main.__spec__
    main.__spec__, sys.argv = program[0], [program[1], *HydraConfig.get().overrides.task]
    if not full_error:
        os.environ.pop("HYDRA_FULL_ERROR", None)  # set by `_run_sweep`
    try:
        yield
    finally:
        main.__spec__, sys.argv = spec, arguments
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        if "torch" in sys.modules:
            from torch import distributed

            if distributed.is_available() and distributed.is_initialized():
                distributed.destroy_process_group()


def run_sweep_job(task: Callable[[DictConfig], Any], cfg: DictConfig, program: Program, full_error: bool) -> Any:
    """Run `task` as one job of a sweep on its share of the devices; return its `optimized_metric`, if one is set."""
    settings = HydraConfig.get()
    if rank() > 0:  # one of the tasks of a SLURM job
        run_as_worker()
    if settings.launcher._target_.endswith(".JoblibLauncher"):
        ignore_signals()  # until the job handles signals; the command ends its workers itself
        sweeps.assign_devices(Path(settings.sweep.dir), settings.launcher.n_jobs)
    with as_single_run(program, full_error):
        result = task(cfg)
    return result.get(cfg.optimized_metric) if cfg.get("optimized_metric") else result


def _report(error: Exception) -> int:
    """Print an error on one line; return the exit status of a rejected command."""
    print(f"{f'process {rank()}: ' if rank() else ''}error: {error}", file=sys.stderr)
    return 2
