"""Start a command: what was typed is checked before anything heavy is imported, then Hydra takes over."""

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FrameType
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.types import RunMode
from omegaconf import DictConfig, read_write

from src.config import resolvers, sweeps  # noqa: F401 - conf/ needs what the first registers
from src.config.output import Record, defer_output, discard_output, store_output, sweep_kept
from src.config.overrides import CONF, check_overrides, check_repeated, choose_none, expand_grid, split_arguments
from src.config.resume import check_unused, check_writable, expand_resume, expand_sweep
from src.distributed.ranks import (
    handle_signals,
    ignore_signals,
    is_orphan,
    kill_children,
    leave,
    rank,
    remove_empty_dirs,
    run_as_worker,
    signals_blocked,
)
from src.errors import UsageError
from src.quoting import escaped

SPINS = 5_000
"""How often a thread looks for more to do before it sleeps, where libgomp, which torch computes with, has 300,000.

While it looks no other process has its core, which may be the one that it waits for (docs/design.md).
"""
Program = tuple[ModuleSpec | None, str]
"""The command that was typed: what `python -m` found, and the file."""


def launch(config_name: str, task: Callable[[DictConfig], Any], together: str | None = None) -> None:
    """Run `task` with the configuration that the command line asks for. Exits with 2 if it asks for nonsense.

    Several values of the group `together` are no sweep, but all for one task (`overrides.expand_grid`).
    A UsageError from the task ends the process with one line; HYDRA_FULL_ERROR=1 shows where it comes from.
    """
    if "OMP_WAIT_POLICY" not in os.environ:  # read when torch is imported
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
    overrides, flags = split_arguments(sys.argv[1:])
    interruption = _Interruption()
    try:
        with handle_signals(interruption):
            _launch(config_name, task, overrides, flags, together, interruption)
    except KeyboardInterrupt:  # before there was anything to save
        kill_children()
        remove_empty_dirs()
        if rank() == 0:
            print("Interrupted", file=sys.stderr)
        leave(128 + (interruption.number or signal.SIGINT))
    finally:
        remove_empty_dirs()


class _Interruption:
    """As a handler, ends what is going on, and remembers the signal's `number`. A second signal ends the process."""

    number = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        signal.signal(number, signal.SIG_DFL)  # what waits within a library hears the first one too late
        sys.unraisablehook = self.again
        raise KeyboardInterrupt

    def again(self, unraisable: Any) -> None:
        """Interrupt once more where it was raised in a callback, of an import for example, which Python ignores."""
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            signal.signal(self.number, self)
            os.kill(os.getpid(), self.number)


def _launch(
    config_name: str,
    task: Callable[[DictConfig], Any],
    overrides: list[str],
    flags: list[str],
    together: str | None,
    interruption: _Interruption,
) -> None:
    multirun = bool({"-m", "--multirun"} & set(flags))
    record: Record | None = None
    folder = Path()
    try:
        if any(flag.startswith("--e") for flag in flags):  # --experimental-rerun, or as much of it as is enough
            raise UsageError("--experimental-rerun would unpickle a file: use resume=FOLDER")
        if rank() == 0:  # Lightning tells the processes that it starts some settings once more
            check_repeated(overrides)
        overrides = expand_sweep(overrides) if multirun else expand_resume(overrides)
        overrides = choose_none(overrides)
        check_unused(overrides, multirun)
        if together and not multirun:
            overrides = expand_grid(config_name, overrides, together)
        if rank() > 0:  # the first process writes down what was asked for, and the log
            overrides += ["hydra.output_subdir=null", "hydra/job_logging=stdout"]
            run_as_worker()
        if not any(flag in flags for flag in ("--help", "-h", "--hydra-help", "--version", "--info", "-i")):
            check_overrides(config_name, overrides, multirun)
            if not any(flag in flags for flag in ("--cfg", "-c", "--shell-completion", "-sc")):
                overrides, record, folder = defer_output(config_name, overrides, multirun)
                check_writable(overrides)
        sys.argv[1:] = [*flags, *overrides]
    except UsageError as error:
        sys.exit(_say(error, code=2))

    warnings.formatwarning = lambda message, *_, **__: f"\nwarning: {message}\n"  # not where in the code
    program = sys.modules["__main__"].__spec__, sys.argv[0]

    def guarded(cfg: DictConfig) -> Any:
        if record is not None:
            store_output(record, cfg)
        name_folder_for_children()
        try:
            return sweep_job(task, cfg, program) if HydraConfig.get().mode == RunMode.MULTIRUN else task(cfg)
        except UsageError as error:
            if interruption.number:  # what a library made of it
                raise KeyboardInterrupt from error
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            discard_output()
            if HydraConfig.get().mode == RunMode.MULTIRUN:  # the other jobs are still to run
                raise
            sys.exit(_say(error, code=2))
        except Exception as error:
            if interruption.number:
                raise KeyboardInterrupt from error
            for _ in range(100 if rank() > 0 else 0):
                if is_orphan():
                    os._exit(1)  # that the connection to the first process broke is no news
                time.sleep(0.1)
            raise
        finally:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                with suppress(OSError):  # the job's folder, if nothing was written into it
                    Path(HydraConfig.get().runtime.output_dir).rmdir()

    with sweep_kept(folder, record.output_subdir) if record and multirun else nullcontext(), heard_aside(multirun):
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(guarded)()


@contextmanager
def heard_aside(multirun: bool) -> Iterator[None]:
    """Have the processes in which a launcher runs jobs start with signals to stop blocked, which this one hears."""
    if not multirun:
        yield
        return
    with suppress(ImportError):  # started later, the trackers of resources would unblock them
        from multiprocessing import resource_tracker

        from joblib.externals.loky.backend import resource_tracker as tracker_of_loky

        resource_tracker.ensure_running()
        tracker_of_loky.ensure_running()
    threading.Thread(target=threading.Event().wait, daemon=True).start()  # it hears them for the main thread
    with signals_blocked():
        yield


def name_folder_for_children() -> None:
    """Give the run's folder as Lightning puts it on the command lines of its processes, between double quotes."""
    settings: Any = HydraConfig.get()
    with read_write(settings), read_write(settings.run):
        typed_overrides = QuotedString(escaped(settings.runtime.output_dir), Quote.double).with_quotes()[1:-1]
        settings.run.dir = escaped(typed_overrides)  # since it is looked up


@contextmanager
def as_a_single_run(program: Program) -> Iterator[None]:
    """A job of a sweep as if it had been started by itself, for the processes that it starts are told what it was told.

    What it leaves behind of them is taken away, so that the next job starts its own.
    """
    main = sys.modules["__main__"]  # which in a launcher's worker is the launcher's own
    arguments, environment, spec = sys.argv, dict(os.environ), main.__spec__
    main.__spec__, sys.argv = program[0], [program[1], *HydraConfig.get().overrides.task]
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


def sweep_job(task: Callable[[DictConfig], Any], cfg: DictConfig, program: Program) -> Any:
    """Run `task` as one job of a sweep, on its share of the devices. Gives the metric that `optimized_metric` names, if any."""
    settings = HydraConfig.get()
    if rank() > 0:  # of the tasks of a SLURM job
        run_as_worker()
    if settings.launcher._target_.endswith(".JoblibLauncher"):
        ignore_signals()  # until the job listens to them; the command itself ends its workers
        sweeps.assign_devices(Path(settings.sweep.dir), settings.launcher.n_jobs)
    with as_a_single_run(program):
        result = task(cfg)
    return (
        result.get(cfg.optimized_metric) if cfg.get("optimized_metric") else result
    )  # without validation there is none


def _say(error: Exception, code: int) -> int:
    print(f"{f'process {rank()}: ' if rank() else ''}error: {error}", file=sys.stderr)
    return code
