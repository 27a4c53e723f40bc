"""Start a command: check what was typed before anything heavy is imported, then hand over to Hydra.

Hydra refuses a misspelt `key=value` but lets `+key=value` and `++key=value` through, and does not suggest the key
that was meant. Here every override is held against the configuration files first, in about a second.
"""

import difflib
import logging
import os
import re
import shutil
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib.machinery import ModuleSpec
from itertools import count
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from src import sweeps
from src.trust import CONF as CONF

Program = tuple[ModuleSpec | None, str]
"""The command that was typed: what `python -m` found, and the file."""
FRESH = "FRESH_FOLDER_"
HOW = re.compile(r"[+\s]*(resume|trust)\s*=")
"""Overrides that say how a run goes on, not what it is."""
CHOICE = re.compile(r"\w*|\[[\w,]*\]")
"""Of files under conf/, by their names."""
NUMBER_OR_SWITCH = re.compile(r"|[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|true|false|null", re.IGNORECASE)
PLUGINS = {"joblib", "optuna", "ray", "ray_aws", "submitit_local", "submitit_slurm"}
"""Hydra's launchers and sweepers that come with an extra, which is the first word of the name."""


def launch(config_name: str, task: Callable[[DictConfig], Any]) -> None:
    """Run `task` with the configuration that the command line asks for. Exits with 2 if it asks for nonsense.

    A UsageError from the task ends the process with one line; HYDRA_FULL_ERROR=1 shows where it comes from.
    """
    overrides, flags = split_arguments(sys.argv[1:])
    try:
        if any(flag.startswith("--e") for flag in flags):  # --experimental-rerun, or as much of it as is enough
            raise UsageError("--experimental-rerun would unpickle a file: use resume=FOLDER")
        multirun = bool({"-m", "--multirun"} & set(flags))
        overrides = expand_sweep(overrides) if multirun else expand_resume(overrides)
        check_unused(overrides)
        if rank() > 0:  # the first process writes down what was asked for, and the log
            overrides += ["hydra.output_subdir=null", "hydra/job_logging=stdout"]
            follow()
        sys.argv[1:] = [*flags, *overrides]
        if not any(flag in flags for flag in ("--help", "-h", "--hydra-help", "--version", "--info", "-i")):
            check_overrides(config_name, overrides, multirun)
    except UsageError as error:
        sys.exit(_say(error, code=2))

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
    return result[cfg.optimize] if cfg.get("optimize") else result


def remove_traces(folder: Path) -> None:
    """Remove the output folder of a refused command, if this process made it and nothing but Hydra wrote into it."""
    made = {Path(path).resolve() for name, path in os.environ.items() if name.startswith(FRESH)}
    if folder.resolve() in made and {f.name for f in folder.iterdir() if f.suffix != ".log"} <= {".hydra", ".lock"}:
        shutil.rmtree(folder)


class UsageError(Exception):
    """What the user asked for cannot be done; the message says why and what to do instead, in one line."""


USER_ERRORS = (ValueError, TypeError, OSError, ImportError, InstantiationException, OmegaConfBaseException)


@contextmanager
def usage_errors() -> Iterator[None]:
    """Within this, nothing has been computed yet: what constructors and loaders refuse is for the user to mend."""
    try:
        yield
    except USER_ERRORS as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        what = " ".join(str(cause).split())
        if isinstance(cause, TypeError):
            what = f"a setting has a value of the wrong type ({what}); HYDRA_FULL_ERROR=1 shows which"
        raise UsageError(what) from error


@contextmanager
def memory_errors(explain: Callable[[], str]) -> Iterator[None]:
    """Within this, running out of memory ends in one line, that of `explain`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        from src.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold what took the room
        raise UsageError(explain()) from error


def level_size(image_size: int, level: int) -> int:
    """The resolution of level `level` of a U-Net, 0 being the image's own."""
    size: int = -(-image_size // 2**level)
    return size


def wandb_offline() -> bool:
    """Whether W&B has no account to log to: no key in the environment or where `wandb login` leaves it."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    logged_in = netrc.is_file() and "wandb" in netrc.read_text(errors="ignore")
    return not (os.environ.get("WANDB_API_KEY") or logged_in)


def fresh_folder(parent: str) -> str:
    """A new folder under `parent` named after the time; of runs that start in the same second each has its own.

    Asked again, also by the processes that this one starts, the same: the environment remembers.
    """
    memory = f"{FRESH}{Path(parent).resolve()}"
    if memory in os.environ:
        return os.environ[memory]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        os.environ[memory] = _agreed_folder(parent)
        return os.environ[memory]
    if slurm_tasks() > 1:
        # Its processes know no more of each other yet than the job that they belong to.
        name = "slurm_{SLURM_JOB_ID}_{SLURM_STEP_ID}".format_map(os.environ)
        os.environ[memory] = str(Path(parent) / name)
        return os.environ[memory]
    os.environ[memory] = _made_folder(parent)
    return os.environ[memory]


def _made_folder(parent: str) -> str:
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in count(1):
        path = Path(parent) / (stamp if attempt == 1 else f"{stamp}_{attempt}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return str(path)
    raise AssertionError


def _agreed_folder(parent: str) -> str:
    """The folder that the first process of `torchrun` makes, which tells the others through the store they share."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and rank() == 0)
    name = f"folder of {parent}, attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    if rank() == 0:
        store.set(name, _made_folder(parent))
    return str(store.get(name).decode())


def slurm_tasks() -> int:
    """The processes of the step that this one is of; 1 also within a job's script, which srun did not start."""
    return int(os.environ.get("SLURM_NTASKS", "1")) if "SLURM_STEP_ID" in os.environ else 1


def rank() -> int:
    """This process's number among those of the run: as torchrun, SLURM or Lightning's launcher says."""
    names = ["RANK", *(["SLURM_PROCID"] if slurm_tasks() > 1 else []), "LOCAL_RANK"]
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


def close_log() -> None:
    """Leave the log to the first process."""
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, logging.FileHandler)]:
        root.removeHandler(handler)
        handler.close()


def follow() -> None:
    """Be one of the processes that leave it to the first to warn, and do not outlive it."""
    warnings.simplefilter("ignore")
    end_with_parent()


def end_with_parent(seconds: float = 5.0) -> None:
    """Have this process end when the one that started it is gone, which it might wait for in vain for half an hour."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(seconds)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


OmegaConf.register_new_resolver("fresh_folder", fresh_folder, replace=True)
OmegaConf.register_new_resolver("gpus_per_job", lambda: min(1, len(sweeps.gpus())), replace=True)
OmegaConf.register_new_resolver("level_size", level_size, replace=True)
OmegaConf.register_new_resolver("parallel_jobs", sweeps.parallel_jobs, replace=True)
OmegaConf.register_new_resolver("wandb_offline", wandb_offline, replace=True)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides, and Hydra's own flags with the values that they take."""
    overrides: list[str] = []
    flags: list[str] = []
    valued = {"--cfg", "-c", "--package", "-p", "--config-name", "-cn", "--config-path", "-cp", "--config-dir", "-cd"}
    valued |= {"--experimental-rerun", "--info", "-i", "--shell-completion", "-sc"}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word.startswith("-"):
            flags.append(word)
            if word in valued and rest and "=" not in rest[0]:
                flags.append(rest.pop(0))
        else:
            overrides.append(word)
    return overrides, flags


def expand_resume(overrides: list[str]) -> list[str]:
    """`resume=DIR` stands for the overrides of the run in DIR, what else is typed, and DIR as its run folder.

    `resume=auto` is the unfinished run that was started with just what is typed, and nothing if there is none.
    """
    folder = next((_unquoted(o.removeprefix("resume=")) for o in overrides if o.startswith("resume=")), None)
    if folder in (None, "", "null"):
        return overrides
    if folder == "auto":
        overrides = [o for o in overrides if not o.startswith("resume=")]
        if (folder := unfinished_run(overrides)) is None:
            return overrides
        overrides = [*overrides, f"resume='{_quoted(folder)}'"]
    if not (Path(folder) / ".hydra" / "overrides.yaml").is_file():
        raise UsageError(
            f"no run to resume in {Path(folder).resolve()}: give a folder that holds .hydra and checkpoints"
        )
    before = saved_overrides(Path(folder))
    if not any(o.lower() == "trust=true" for o in overrides):
        check_saved(Path(folder), before)
    given = [o for o in overrides if not o.startswith("hydra.run.dir=")]
    return [*(o for o in before if o not in given), *given, f"hydra.run.dir='{_quoted(folder)}'"]


def expand_sweep(overrides: list[str]) -> list[str]:
    """Of a sweep, `resume=auto` stands for the folder of the newest one that was started with what is typed.

    Its jobs then look for themselves which of them are finished, begun or still to do (`checkpoints.take_up`).
    """
    if not any(o.startswith("resume=") for o in overrides):
        return overrides
    if "resume=auto" not in overrides:
        raise UsageError("a sweep goes on by resume=auto, with hydra.sweep.dir=... if it is not the newest of its kind")
    if any(o.startswith("hydra.sweep.dir=") for o in overrides):
        return overrides
    for saved in sorted(Path("outputs/sweeps").glob("*/multirun.yaml"), reverse=True):
        try:
            # Not by OmegaConf, which would look `${...}` up.
            before = yaml.safe_load(saved.read_text())["hydra"]["overrides"]
            typed = {*before["task"], *before["hydra"]} - {"hydra.mode=MULTIRUN"}
        except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError):  # of a sweep that died as it began
            continue
        of_place = "hydra.sweep.dir="
        if {o for o in typed if not (HOW.match(o) or o.startswith(of_place))} == {
            o for o in overrides if not HOW.match(o)
        }:
            return [*overrides, f"{of_place}'{_quoted(str(saved.parent))}'"]
    return overrides


def unfinished_run(overrides: Sequence[str]) -> str | None:
    """The folder named by hydra.run.dir, else the newest under outputs/train that had these overrides and no end.

    None if it holds no checkpoint, so that there is nothing to go on from.
    """
    given = [_unquoted(o.removeprefix("hydra.run.dir=")) for o in overrides if o.startswith("hydra.run.dir=")]
    folders = [Path(given[-1])] if given else sorted(Path("outputs/train").glob("*/"), reverse=True)
    for folder in folders:
        saved = folder / ".hydra" / "overrides.yaml"
        if not (saved.is_file() and any((folder / "checkpoints").glob("*.ckpt"))):
            continue
        typed = {o for o in overrides if not HOW.match(o)}
        if given or (set(saved_overrides(folder)) == typed and not (folder / "metrics.json").exists()):
            return str(folder)
    return None


def saved_overrides(folder: Path) -> list[str]:
    """What was typed for the run in `folder`, but for what it resumed and whether that was trusted."""
    path = folder / ".hydra" / "overrides.yaml"
    try:
        lines = yaml.safe_load(path.read_text())  # as it stands: OmegaConf would look up what is in ${...}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read ({_first_line(error)}): start a new run") from error
    if not (isinstance(lines, list) and all(isinstance(line, str) and line.isprintable() for line in lines)):
        raise UsageError(f"{path} is not the list of overrides that Hydra writes: start a new run")
    return [line for line in lines if not HOW.match(line)]


def check_saved(folder: Path, overrides: Sequence[str]) -> None:
    """Raise UsageError if going on with the run could do more than train in its folder, since it may be a stranger's.

    What is built is held against conf/ when it is known (`runs.build`).
    """
    remedy = f": add trust=true if you started {folder} yourself, else start a new run"
    for line in overrides:
        try:
            (override,) = OverridesParser.create().parse_overrides([line])
        except HydraException as error:
            raise UsageError(f"{folder} was started with {line!r:.100}, which is no override{remedy}") from error
        key, value = override.key_or_group, line.partition("=")[2]
        if re.match(r"hydra\b|run_dir\b", key) or override.package is not None:
            what = "says how and where to start"
        elif "${" in value:
            what = "would be looked up"
        elif re.match(r"(callbacks|logger)\b", key) and not (NUMBER_OR_SWITCH if "." in key else CHOICE).fullmatch(
            value
        ):
            what = "may say where to write, or to whom"
        elif key not in ("data.root", "schedule.betas") and re.search(r"[/\\]|\.\.", value):
            what = "may be a path to write to"
        else:
            continue
        raise UsageError(f"{folder} was started with {line!r:.100}, which {what}{remedy}")
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise UsageError(f"{path} leads out of the run's folder{remedy}")


def _quoted(folder: str) -> str:
    """As it may stand between single quotes."""
    return str(Path(folder).resolve()).replace("'", "\\'")


def _unquoted(value: str) -> str:
    return value.strip("'\"").replace("\\'", "'")


def check_unused(overrides: Sequence[str]) -> None:
    """Raise UsageError if hydra.run.dir is a run already: Hydra would write over what that one was told."""
    given = [_unquoted(o.removeprefix("hydra.run.dir=")) for o in overrides if o.startswith("hydra.run.dir=")]
    resumes = any(o.startswith("resume=") for o in overrides)
    if given and not resumes and any((Path(given[-1]) / "checkpoints").glob("*.ckpt")):
        raise UsageError(f"{given[-1]} already holds a run: go on with resume={given[-1]}, or choose another folder")


def check_overrides(config_name: str, overrides: Sequence[str], multirun: bool = False) -> None:
    """Raise UsageError for an override that names no group, option or key, with the nearest that exists."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise UsageError(f"cannot read the override: {_first_line(error)} (overrides look like key=value)") from error
    groups = config_groups()
    chosen: list[str] = []
    for override in parsed:
        name = override.key_or_group
        if name in groups and override.is_add() and not override.is_force_add():
            raise UsageError(f"{override.input_line}: {name} is chosen already, drop the +")
        if name in groups and not override.is_delete():
            for option in _options(override):
                _check_option(name, option, groups[name])
            chosen.append(_one_value(override))
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        base = _compose(config_name, chosen)
        for override in parsed:
            if override.key_or_group not in groups:
                _check_key(override, base, groups)
            elif override.is_delete() and override.key_or_group in base:
                raise UsageError(
                    f"~{override.key_or_group} leaves no {override.key_or_group}: choose one of "
                    f"{', '.join(groups[override.key_or_group])}"
                )
            if override.is_interval_sweep() and not {"hydra/sweeper", "sweep"} & {o.key_or_group for o in parsed}:
                raise UsageError(f"{override.input_line} has no values to go through: add hydra/sweeper=search")
            if override.is_sweep_override() and not multirun:
                raise UsageError(
                    f"{override.input_line} is a sweep: add -m to run one job per value, or quote the value"
                )
        final = _compose(config_name, [_one_value(o) for o in parsed])
    names = {o.key_or_group for o in parsed if o.value() is not None}
    if "sweep" in names and not multirun and "resume" not in names:  # a job of a sweep is resumed by itself
        raise UsageError("sweep=... names the values of a sweep: add -m to run one job for each")
    for override in parsed:
        if override.key_or_group not in groups and not override.is_delete():
            _check_type(override.key_or_group, base, final)
    for name in flatten(final):
        parent, _, last = name.rpartition(".")
        if OmegaConf.is_missing(OmegaConf.select(final, parent) if parent else final, last):
            raise UsageError(f"{name} has no default: add {name}=...")


def config_groups() -> dict[str, list[str]]:
    """Every config group of ours and its options, from the folders of conf/; Hydra's own are its affair."""
    folders = {f.parent for f in CONF.rglob("*.yaml") if f.parent not in (CONF, *(CONF / "hydra").iterdir())}
    return {str(d.relative_to(CONF)): sorted(f.stem for f in d.glob("[!_]*.yaml")) for d in sorted(folders)}


def nearest(word: str, known: Sequence[str]) -> str:
    """A question after the known word nearest to `word`, to end an error with; empty if none is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _check_option(group: str, option: str, options: Sequence[str]) -> None:
    if option not in options:
        hint = nearest(option, options).replace("?", "? The")
        raise UsageError(f"unknown {group} '{option}'{hint or ': the'} choices are {', '.join(options)}")


def _check_key(override: Override, base: DictConfig, groups: dict[str, list[str]]) -> None:
    key = override.key_or_group
    parts = key.split(".")
    if parts[0].split("/")[0] == "hydra":
        return
    node: Any = base
    for depth, part in enumerate(parts):
        if isinstance(node, DictConfig) and part in node.keys():  # keys() also names what is still to be given
            node = node._get_node(part)
            if isinstance(node, DictConfig) or depth == len(parts) - 1:
                continue
        # A `+` may give a third-party class an argument that its YAML does not list, or a free dictionary a key;
        # the YAMLs of our own classes list every argument.
        target = str(OmegaConf.select(node, "_target_", default="")) if isinstance(node, DictConfig) else "src."
        adds = override.is_add() or override.is_force_add()
        if adds and depth > 0 and not target.startswith("src."):
            return
        known = [*flatten(base), *groups]
        local = [k for k in known if k.startswith(".".join(parts[:depth]) + ".")] if depth else known
        hint = nearest(key, local) or nearest(key, known)
        if not hint and isinstance(node, DictConfig) and depth:
            hint = f": {'.'.join(parts[:depth])} has {', '.join(str(k) for k in node)}"
        hint = hint or "; --cfg job prints all that there are"
        raise UsageError(f"unknown setting '{key}' in {override.input_line}{hint}")


def _check_type(name: str, base: DictConfig, final: DictConfig) -> None:
    """Raise UsageError if a value is of another type than the default's; a text or null as default says nothing."""
    default, value = _raw(base, name), _raw(final, name)
    if (value is None and "." in name) or (isinstance(value, str) and "${" in value):
        return
    for kind, fits, rule in (
        (bool, bool, "true or false"),
        (int, int, "a whole number"),
        (float, (int, float), "a number"),
        (list, list, "a list"),
    ):
        if isinstance(default, kind):
            if not isinstance(value, fits) or isinstance(value, bool) != isinstance(default, bool):
                example = "" if "${" in str(default) else f", such as {default}"
                raise UsageError(f"{name}={value} is of the wrong type: it must be {rule}{example}")
            return


def _raw(cfg: DictConfig, name: str) -> Any:
    """The value at a dotted name, interpolations as they stand; None if there is none."""
    value: Any = OmegaConf.to_container(cfg, resolve=False)
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def flatten(cfg: DictConfig, prefix: str = "") -> list[str]:
    """The dotted names of all keys."""
    names: list[str] = []
    for key in cfg:
        name = f"{prefix}{key!s}"
        names.append(name)
        child = cfg._get_node(key)
        if isinstance(child, DictConfig):
            names += flatten(child, f"{name}.")
    return names


def _options(override: Override) -> list[str]:
    """The option or options that an override of a group names, one by one."""
    if override.is_sweep_override():
        values = [str(v) for v in override.sweep_string_iterator()] if override.is_choice_sweep() else []
    else:
        values = [override.get_value_element_as_str()]
    return [part.strip().strip("'\"") for v in values for part in v.strip("[]").split(",") if part.strip()]


def _one_value(override: Override) -> str:
    """The override itself, or with the first of its values if it is a sweep."""
    if not override.is_sweep_override():
        return str(override.input_line)
    prefix = {"ADD": "+", "FORCE_ADD": "++"}.get(override.type.name if override.type else "", "")
    value = override.value()
    first = value.start if isinstance(value, IntervalSweep) else next(iter(override.sweep_string_iterator()))
    return f"{prefix}{override.key_or_group}={first}"


def _compose(config_name: str, overrides: Sequence[str]) -> DictConfig:
    try:
        return hydra.compose(config_name, list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        line = _first_line(error)
        if match := re.match(r"In '(.+)': Could not override '(.+)'\.", line):
            what = match[1].replace("/_", "=").replace("/", "=")
            line = f"{what} is not for src.{config_name}, which has no {match[2]}: choose another {what.split('=')[0]}"
        elif match := re.search(r"Could not (?:find|load) '(hydra/launcher|hydra/sweeper)/(\w+)'", line):
            line = _missing_plugin(match[1], match[2])
        elif "Could not override 'hydra." in line:
            line += " Settings of a launcher or sweeper need it chosen; --cfg hydra prints all that there are"
        raise UsageError(line) from error


def _missing_plugin(group: str, name: str) -> str:
    """What to say if a launcher or sweeper of that name is not there."""
    if name in PLUGINS:
        extra = name.split("_")[0]
        return f"{group}: {name} comes with the extra {extra}, which is not installed: pip install -e '.[{extra}]'"
    known = GlobalHydra.instance().config_loader().get_group_options(group)
    hint = nearest(name, known).replace("?", "? The")
    return f"unknown {group} '{name}'{hint or ': the'} choices are {', '.join(known)}"


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _say(error: Exception, code: int) -> int:
    print(f"{f'process {rank()}: ' if rank() else ''}error: {error}", file=sys.stderr)
    return code
