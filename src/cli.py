"""Start a command: what was typed is checked before anything heavy is imported, then Hydra takes over."""

import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, read_write

from src import resolvers, sweeps  # noqa: F401 - conf/ needs what the first registers
from src.errors import UsageError
from src.overrides import check_overrides, split_arguments, take_together
from src.ranks import FRESH, close_log, follow, is_orphan, rank
from src.resuming import check_unused, check_writable, expand_resume, expand_sweep
from src.trust import CONF

SPINS = 5_000
"""How often a thread looks for more to do before it sleeps, where libgomp, which torch computes with, has 300,000.

While it looks no other process has its core, which may be the one that it waits for (docs/design.md).
"""
Program = tuple[ModuleSpec | None, str]
"""The command that was typed: what `python -m` found, and the file."""


def launch(config_name: str, task: Callable[[DictConfig], Any], together: str | None = None) -> None:
    """Run `task` with the configuration that the command line asks for. Exits with 2 if it asks for nonsense.

    Several values of the group `together` are no sweep, but all for one task (`overrides.take_together`).
    A UsageError from the task ends the process with one line; HYDRA_FULL_ERROR=1 shows where it comes from.
    """
    if "OMP_WAIT_POLICY" not in os.environ:  # read when torch is imported
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
    overrides, flags = split_arguments(sys.argv[1:])
    try:
        if any(flag.startswith("--e") for flag in flags):  # --experimental-rerun, or as much of it as is enough
            raise UsageError("--experimental-rerun would unpickle a file: use resume=FOLDER")
        multirun = bool({"-m", "--multirun"} & set(flags))
        overrides = expand_sweep(overrides) if multirun else expand_resume(overrides)
        check_unused(overrides)
        if together and not multirun:
            overrides = take_together(config_name, overrides, together)
        if rank() > 0:  # the first process writes down what was asked for, and the log
            overrides += ["hydra.output_subdir=null", "hydra/job_logging=stdout"]
            follow()
        sys.argv[1:] = [*flags, *overrides]
        if not any(flag in flags for flag in ("--help", "-h", "--hydra-help", "--version", "--info", "-i")):
            check_overrides(config_name, overrides, multirun)
            check_writable(overrides)
    except UsageError as error:
        sys.exit(_say(error, code=2))

    warnings.formatwarning = lambda message, *_, **__: f"\nwarning: {message}\n"  # not where in the code
    program = sys.modules["__main__"].__spec__, sys.argv[0]

    def guarded(cfg: DictConfig) -> Any:
        try:
            return sweep_job(task, cfg, program) if HydraConfig.get().mode == RunMode.MULTIRUN else task(cfg)
        except UsageError as error:
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            if rank() == 0:
                remove_traces(Path(HydraConfig.get().runtime.output_dir))
            if HydraConfig.get().mode == RunMode.MULTIRUN:  # the other jobs are still to run
                raise
            sys.exit(_say(error, code=2))
        except Exception:
            for _ in range(100 if rank() > 0 else 0):
                if is_orphan():
                    os._exit(1)  # that the connection to the first process broke is no news
                time.sleep(0.1)
            raise

    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(guarded)()
    except KeyboardInterrupt:  # before there was anything to save
        sys.exit(130)


@contextmanager
def as_a_single_run(program: Program) -> Iterator[None]:
    """A job of a sweep as if it had been started by itself, for the processes that it starts are told what it was told.

    What it leaves behind of them is taken away, so that the next job starts its own.
    """
    hydra_config: Any = HydraConfig.get()
    with read_write(hydra_config), read_write(hydra_config.run):
        hydra_config.run.dir = hydra_config.runtime.output_dir
    main = sys.modules["__main__"]  # which in a launcher's worker is the launcher's own
    arguments, environment, spec = sys.argv, dict(os.environ), main.__spec__
    main.__spec__, sys.argv = program[0], [program[1], *hydra_config.overrides.task]
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
    """Run `task` as one job of a sweep, on its share of the devices. Gives the metric that `optimize` names, if any."""
    settings = HydraConfig.get()
    if rank() > 0:  # of the tasks of a SLURM job, to whom Hydra has given the log too
        close_log()
        follow()
    if settings.launcher._target_.endswith(".JoblibLauncher"):
        sweeps.take_devices(Path(settings.sweep.dir), settings.launcher.n_jobs)
    with as_a_single_run(program):
        result = task(cfg)
    return result.get(cfg.optimize) if cfg.get("optimize") else result  # without validation there is none


def remove_traces(folder: Path) -> None:
    """Remove the output folder of a refused command, if this process made it and nothing but Hydra wrote into it."""
    made = {Path(path).resolve() for name, path in os.environ.items() if name.startswith(FRESH)}
    if folder.resolve() in made and {f.name for f in folder.iterdir() if f.suffix != ".log"} <= {".hydra", ".lock"}:
        shutil.rmtree(folder)


def _say(error: Exception, code: int) -> int:
    print(f"{f'process {rank()}: ' if rank() else ''}error: {error}", file=sys.stderr)
    return code
