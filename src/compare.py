"""Compare runs: `python -m src.compare outputs/sweeps/...`, or any list of run folders; a page, tables and plots."""

import functools
import hashlib
import json
import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf

from src.arguments import check_counts, check_names, check_seeds
from src.checkpoints import find_checkpoint, newest_run, read_checkpoint
from src.cli import launch
from src.comparison import Record, data_of, flat, grouped, metrics_of, ranked, without_repeats
from src.errors import UsageError, data_errors, memory_errors, usage_errors
from src.output import begin
from src.overrides import key_of, quoted, split_arguments
from src.ranks import rank
from src.resolvers import wandb_offline
from src.resuming import saved_overrides
from src.trust import CONF

if TYPE_CHECKING:
    from src.measuring import Measurements
    from src.module import Sampler
    from src.processes import Processes
    from src.quality import Yardstick
    from src.runs import OpenedRun

MEASURING = ("measuring", "evaluation", "quality", "module", "draws")
"""Files of src, beside diffusion, models, data and metrics, on which it depends what is measured."""


class Found(NamedTuple):
    """A run that is to be compared."""

    record: Record
    checkpoint: Path
    settings: dict[str, Any]
    """As the checkpoint has them, nested."""
    folder: Path


def compare(cfg: DictConfig) -> dict[str, Any]:
    """Measure every run, and write the page, tables and plots into the output folder. Returns all figures."""
    with usage_errors():
        check_counts(cfg, "n", "batch_size", "keep", "near", "held_out", "links", "sampler.steps")
        check_seeds(cfg)
        check_names(cfg, "features")
        folders = run_folders(list(cfg.runs or []))
        from src.evaluation import check_halves, check_reverse_variance

        check_reverse_variance(cfg.reverse_variance, "reverse_variance")
        found, notes = survey(folders)
        if rank() == 0:
            for note in notes:
                print(f"left out: {note}")
        if len(found) < 2:
            raise ValueError(
                f"a comparison needs two finished runs, got {len(found)} of {len(folders)}: give more folders, or "
                "finish what was left out"
            )
        check_data(found, cfg.data.root is None)
        if cfg.wandb:
            wandb_of(found)
        from src import out_of_memory, runs
        from src.processes import start_processes

        first = opened_run(found[0], cfg)
        samplers = [sampler_of(each, cfg) for each in found]
        first.module.check_sampler(samplers[0])
        if rank() == 0:
            first.data.prepare_data()
        processes = start_processes(runs.pick_device(cfg.device), cfg.devices, cfg.num_nodes)
        first.data.setup()
        check_halves(cfg.reverse_variance, held_out_count(first, cfg), "reverse_variance")
    with memory_errors(lambda: out_of_memory.at_batch_size(first, cfg.batch_size, processes.device)), data_errors():
        measured = measure_all(found, samplers, first, cfg, processes)
    if processes.rank > 0:
        return {}
    return write_report(found, measured, notes, cfg, processes)


def write_report(
    found: Sequence[Found],
    measured: Sequence["Measurements"],
    notes: list[str],
    cfg: DictConfig,
    processes: "Processes",
) -> dict[str, Any]:
    """Put together what is known of the runs, write it into the output folder and say where. Returns all figures."""
    from src import plots, report, report_page, runs
    from src.measuring import floors_of, with_figures

    records = [with_figures(run.record, each) for run, each in zip(found, measured, strict=True)]
    of_record = {id(record): (run, each) for record, run, each in zip(records, found, measured, strict=True)}
    groups, implied = grouped(records)
    seen = []
    for group in groups:
        of_group = [of_record[id(record)] for record in group.records]
        logs = [sorted((run.folder / "logs").glob("version_*/metrics.csv")) for run, _ in of_group]
        seen.append(
            [
                report.Seen(each["samples"], each["error"].numpy(), plots.read_logs(log, ("train/loss", "val/loss")))
                for (_, each), log in zip(of_group, logs, strict=True)
            ]
        )
    page = report.Report(
        title=f"{len(records)} runs compared: {', '.join(map(str, cfg.runs))}",
        groups=groups,
        implied=implied,
        rankings=[ranked(groups, metric) for metric in metrics_of(groups)],
        floors=floors_of(measured[0]),
        seen=seen,
        real=measured[0]["real"],
        notes=notes,
        how=how_measured(cfg, processes),
    )
    folder = begin(Path(cfg.run_dir))
    path = report_page.write(folder, page)
    results = report.as_json(page)
    runs.write_json(folder / "comparison.json", results)
    print(f"\n{results['headline']}\nLook at:")
    for name in (path.name, "comparison.md", "runs.csv", "groups.csv", "comparison.json"):
        print(f"  {folder / name}")
    if cfg.wandb:
        from src.loggers import log_comparison

        where = wandb_of(found)
        in_group = where.get("group") or folder.resolve().parent.name
        log_comparison(results["runs"], where["project"], in_group, folder, where.get("entity"), wandb_offline())
        print(f"The runs are a table in the W&B project {where['project']}, group {in_group}")
    return results


def with_runs(arguments: Sequence[str]) -> list[str]:
    """Folders among the arguments, which are neither overrides nor flags, as `runs=[...]`."""
    overrides, flags = split_arguments(arguments)
    folders = [
        word
        for word in overrides
        if os.path.isdir(word) or ("=" not in word.split("/")[0] and not word.startswith(("~", "+")))
    ]
    if not folders:
        return [*flags, *overrides]
    others = [word for word in overrides if word not in folders]
    if "runs" in map(key_of, others):
        raise UsageError(f"{folders[0]} and runs=... both name runs: put all folders into one of them")
    return [*flags, *others, f"runs=[{','.join(map(quoted, folders))}]"]


def run_folders(named: Sequence[str]) -> list[Path]:
    """The run folders that are named; for a sweep's folder those of its jobs, by number."""
    if not named:
        raise ValueError(
            "name runs to compare: folders under outputs/train, or of a sweep under outputs/sweeps"
            + newest_run("runs", Path("outputs"))
        )
    folders: list[Path] = []
    for name in named:
        if not str(name).strip():
            raise ValueError("runs=[''] names no folder: give folders of runs or of sweeps")
        folder = Path(str(name))
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder.resolve()}: give folders of runs or of sweeps")
        inside = [folder] if is_run(folder) else sorted(filter(is_run, folder.iterdir()), key=_by_number)
        if not inside:
            hint = newest_run("runs", folder) or ": give folders of runs or of sweeps"
            raise ValueError(f"{folder} is no run and holds none{hint}")
        folders += inside
    return list({folder.resolve(): folder for folder in folders}.values())


def is_run(folder: Path) -> bool:
    """Whether a run was started in this folder."""
    return (folder / "checkpoints").is_dir() or (folder / "train.log").is_file()


def _by_number(folder: Path) -> tuple[float, str]:
    return (int(folder.name) if folder.name.isdecimal() else math.inf, folder.name)


def survey(folders: Sequence[Path]) -> tuple[list[Found], list[str]]:
    """The runs that can be compared, and a line for each that is left out."""
    found: dict[str, Found] = {}
    notes = []
    for folder in folders:
        try:
            metrics = json.loads((folder / "metrics.json").read_text())
        except FileNotFoundError:
            notes.append(f"{folder}: unfinished, it has no metrics.json")
            continue
        except (OSError, ValueError) as error:
            notes.append(f"{folder}: its metrics.json cannot be read ({' '.join(str(error).split())})")
            continue
        if not isinstance(metrics, dict) or metrics.get("val/loss", 0.0) is None:
            notes.append(f"{folder}: training diverged, val/loss is not finite")
            continue
        try:
            checkpoint = find_checkpoint(str(folder), None)
            settings = read_checkpoint(checkpoint)["hyper_parameters"]
        except (OSError, ValueError) as error:
            notes.append(" ".join(str(error).split()))
            continue
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        typed, choices = asked_for(folder)
        record = Record(
            name=str(folder),
            seed=settings.get("seed", 0),
            settings=flat(settings),
            values={k: v for k, v in numbers.items() if k.startswith("val/")},
            choices=choices,
            typed=typed,
            costs={k: v for k, v in numbers.items() if not k.startswith("val/")},
        )
        found[record.name] = Found(record, checkpoint, settings, folder)
    kept, repeats = without_repeats([run.record for run in found.values()])
    notes += [f"{old.name}: {new.name} has the same settings and seed, and a seed counts once" for old, new in repeats]
    return [found[record.name] for record in kept], notes


def asked_for(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The names of what was typed for a run, and the files chosen of the groups of conf/, as far as it says so."""
    try:
        typed = [line.lstrip("+~").partition("=")[0] for line in saved_overrides(folder)]
        saved = yaml.safe_load((folder / ".hydra" / "hydra.yaml").read_text())
        choices = saved["hydra"]["runtime"]["choices"]
        return typed, {k: str(v) for k, v in choices.items() if "/" not in k and k not in ("sweep", "logger")}
    except (UsageError, OSError, ValueError, yaml.YAMLError, LookupError, TypeError, AttributeError):
        return [], {}


def check_data(found: Sequence[Found], with_root: bool) -> None:
    """Raise ValueError if the runs are on different data, against which no figures can be compared."""
    first = data_of(found[0].record.settings, with_root)
    for run in found[1:]:
        other = data_of(run.record.settings, with_root)
        for name in {**first, **other}:
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"the runs are on different data, whose figures cannot be compared: data.{name} is "
                    f"{first.get(name)} in {found[0].folder} and {other.get(name)} in {run.folder}; compare those apart"
                    + (", or give data.root=... if it is the same data in two places" if name == "root" else "")
                )


def opened_run(run: Found, cfg: DictConfig) -> "OpenedRun":
    from src import runs

    return runs.open_run(None, str(run.checkpoint), cfg.ema, cfg.trust, cfg.data.root)


def sampler_settings(run: Found, cfg: DictConfig) -> DictConfig:
    """The sampler that is asked for, or the run's own."""
    from src import building

    return building.sampler_settings(cfg.sampler, OmegaConf.create(run.settings["sampler"]))


def sampler_of(run: Found, cfg: DictConfig) -> "Sampler":
    """The same, built."""
    from src import building
    from src.arguments import check_arguments
    from src.trust import check_targets, known_targets

    if not cfg.trust:
        check_targets({"sampler": run.settings["sampler"]}, known_targets(), run.checkpoint)
    settings = sampler_settings(run, cfg)
    check_arguments(settings, "sampler")
    return building.build_sampler(settings, run.settings.get("guidance") and OmegaConf.create(run.settings["guidance"]))


def measure_all(
    found: Sequence[Found], samplers: Sequence["Sampler"], first: "OpenedRun", cfg: DictConfig, processes: "Processes"
) -> list["Measurements"]:
    """What is measured of each run, in their order; of processes beyond the first nothing.

    What is in the cache is read; each process measures a share of the other runs.
    """
    from tqdm import tqdm

    from src import building
    from src.evaluation import network_passes
    from src.measuring import measured
    from src.metrics.cache import cached
    from src.quality import Settings, Yardstick

    folder = Path(cfg.cache)
    code = code_digest()
    data = data_digest(first)
    keys = [measurement_key(run, cfg, data, code, processes.device.type) for run in found]
    # As the first process saw it, before any wrote.
    missing = processes.gather([k for k, key in enumerate(keys) if not (folder / f"{key}.safetensors").is_file()])[0]
    settings = Settings(
        features=building.names_of(cfg.features),
        n=cfg.n,
        seed=cfg.seed,
        batch_size=cfg.batch_size,
        keep=cfg.keep,
        near=cfg.near,
        against=cfg.against,
        cache=folder,
        inception_weights=cfg.inception_weights and Path(cfg.inception_weights),
        dinov2_model=cfg.dinov2_model,
    )

    @functools.cache
    def yardstick() -> tuple["Yardstick", "Measurements"]:
        """With the figures of real data."""
        import torch

        with usage_errors():
            made = Yardstick(first.data, settings, type(processes)(processes.device))
        return made, {f"floor/{name}": torch.tensor(figure) for name, figure in made.floor().items()}

    mine = processes.share(missing)
    if cfg.sampler._target_ is not None:  # a run's own sampler was tried when it was trained
        with usage_errors():
            for k in mine:
                opened_run(found[k], cfg).module.check_sampler(samplers[k])
    total = 0
    if missing:
        if processes.rank == 0:  # what is downloaded or trained, the others find
            yardstick()
        processes.gather(None)
        passes = network_passes(first.module.schedule, cfg.links, cfg.reverse_variance)
        bound = passes * held_out_count(first, cfg)
        total = sum(cfg.n * samplers[k].steps + bound for k in mine)
        announce(len(found), len(missing), samplers[missing[0]], bound, first, cfg, processes)
    bar = tqdm(total=total, unit="step", unit_scale=True, desc="Runs", disable=processes.rank > 0 or not missing)

    def measure(k: int) -> "Measurements":
        def compute() -> "Measurements":
            run = first if k == 0 else opened_run(found[k], cfg)
            run.module.to(processes.device)
            tools, floor = yardstick()
            of_bound = cfg.held_out, cfg.links, cfg.reverse_variance
            own = run.data.condition
            return floor | measured(
                run.module, samplers[k], tools, *of_bound, cfg.batch_size, cfg.seed, bar.update, own
            )

        bar.set_postfix_str(found[k].folder.name)
        return cached(folder, keys[k], compute)

    with bar:
        done: dict[int, Measurements] = {}
        for part in processes.gather({k: measure(k) for k in mine}):
            done |= part
        return [done[k] if k in done else measure(k) for k in range(len(found))] if processes.rank == 0 else []


def held_out_count(opened: "OpenedRun", cfg: DictConfig) -> int:
    """The number of held-out samples of which the bound is measured."""
    count = len(opened.data.val_indices)
    return min(cfg.held_out or count, count)


def announce(
    runs: int, missing: int, sampler: "Sampler", bound: int, first: "OpenedRun", cfg: DictConfig, processes: "Processes"
) -> None:
    """One line on what is about to be measured, and how long it will take."""
    from src.quality import seconds_of_call
    from src.tables import duration

    if processes.rank > 0:
        return
    module = first.module.to(processes.device)
    size = min(cfg.batch_size, cfg.n)
    calls = module.network_calls(sampler)
    seconds = seconds_of_call(module, size) / size * (cfg.n * calls + bound) * -(-missing // processes.count)
    before = f" ({runs - missing} others were measured before)" if missing < runs else ""
    print(
        f"Measuring {missing} runs{before}: {cfg.n} samples of {calls} network calls each, and the bound of held-out "
        f"data; about {duration(seconds)} on {processes.count} x {processes.device.type}",
        flush=True,
    )


def data_digest(opened: "OpenedRun") -> str:
    """Of the held-out data, and of how many there are in all."""
    from src.metrics.cache import digest

    opened.data.setup()
    source, places = opened.data.source, opened.data.val_indices
    assert source is not None
    parts = (digest(source.fetch(places[start : start + 256])) for start in range(0, len(places), 256))
    return digest(len(source), *parts)


def measurement_key(run: Found, cfg: DictConfig, data: str, code: str, device: str) -> str:
    """Stands for all that measurements of a run depend on: its weights, how they are measured, and by which code."""
    import torch

    with run.checkpoint.open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    names = ["n", "features", "inception_weights", "dinov2_model", "against", "keep", "near", "held_out", "links"]
    asked = {name: cfg[name] for name in (*names, "reverse_variance", "batch_size", "seed", "ema")}
    sampler = OmegaConf.to_container(sampler_settings(run, cfg))
    root = cfg.data.root or run.record.settings.get("data.root")
    how = [weights, asked, sampler, root, data, code, device, torch.__version__]
    return "compare-" + hashlib.sha256(repr(how).encode()).hexdigest()[:32]


def code_digest() -> str:
    """Of the files that compute what is measured."""
    src = CONF.parent / "src"
    folders = [
        path for name in ("diffusion", "models", "data", "metrics") for path in sorted((src / name).glob("*.py"))
    ]
    return hashlib.sha256(
        b"".join(f.read_bytes() for f in [*folders, *(src / f"{n}.py" for n in MEASURING)])
    ).hexdigest()


def how_measured(cfg: DictConfig, processes: "Processes") -> dict[str, str]:
    """What someone else would need to measure it again."""
    import torch

    from src.provenance import code_version, device_name

    chosen = {k: v for k, v in cfg.sampler.items() if v is not None and not str(k).startswith("_")}
    name = "each run's own" if cfg.sampler._target_ is None else str(cfg.sampler._target_).rpartition(".")[2]
    links = "all links" if cfg.links is None else f"{cfg.links} links and the decoder's, drawn for each sample"
    return {
        "samples": f"{cfg.n} of each run, from the noise of seed {cfg.seed}",
        "sampler": ", ".join([name, *(f"{k} {v}" for k, v in chosen.items())]),
        "weights": "averaged" if cfg.ema else "raw",
        "reference": "training data" if cfg.against == "train" else "held-out data, which no run has seen",
        "bits/dim": f"the variational bound of {cfg.held_out or 'all'} held-out samples by {links}, "
        f"reverse variance {cfg.reverse_variance}",
        "device": f"{processes.count} x {device_name(processes.device)}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "code": commit_of(code_version()),
    }


def commit_of(code: Mapping[str, Any]) -> str:
    """Which commit it is, and whether files have changed since."""
    if code["commit"] is None:
        return "no git"
    return f"commit {code['commit'][:12]}{', with changes' if code['dirty'] else ''}"


def wandb_of(found: Sequence[Found]) -> dict[str, Any]:
    """Where the first of the runs that was logged by W&B is. Raises ValueError if none was."""
    for run in found:
        if settings := (run.settings.get("logger") or {}).get("wandb"):
            return dict(settings)
    raise ValueError("wandb=true logs the tables where the runs are, and none of them was logged by W&B: leave it out")


if __name__ == "__main__":
    try:
        sys.argv[1:] = with_runs(sys.argv[1:])
    except UsageError as error:
        sys.exit(f"error: {error}")
    launch("compare", compare)
