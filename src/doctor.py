"""Inspect data before training: `python -m src.doctor data=folder data.root=path/to/images`."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from src.config.cli import launch
from src.config.output import relative, start_output
from src.config.overrides import check_overrides
from src.config.rules import check_values
from src.config.search_path import search_path_overrides, user_folders
from src.config.words import key_of
from src.data.array_files import KINDS
from src.errors import UsageError, command, counted, format_override, printable, shell_word, usage_errors
from src.viz.tables import format_duration

if TYPE_CHECKING:
    from src.data.images import ImageDataModule
    from src.data.module import BaseDataModule

FOLDERS = ("src.data.folder.folder", "src.data.captions.captioned")
"""Sources whose files suggest a number of channels and a size."""
MAX_VALUES = 20_000_000
"""Largest number of values in the statistics and the histogram of arrays and images."""
PICTURES = ("images.png", "values.png", "columns.png")


def examine(cfg: DictConfig) -> Path:
    """Print a summary of the data and a training command for them; return the output folder.

    Reports duplicates and measures some training steps. Writes `images.png`, a grid, and `values.png`, a histogram; of
    points and tables `columns.png`, histograms.
    """
    with usage_errors():
        check_values(cfg)
        words = [word for word in HydraConfig.get().overrides.task if not word.startswith(("run_dir", "steps"))]
        check_overrides("train", words, added=user_folders())
        typed = {key_of(word) for word in words}
        import torch

        from src.runs import advice
        from src.runs.nodes import inline_aliases, instantiate_node

        on_gpu = torch.cuda.is_available()
        from_files = OmegaConf.select(cfg, "data.source._target_") in FOLDERS
        suggested: dict[str, Any] = {"data.missing": "drop"} if "missing" in cfg.data else {}
        suggested |= advice.probe(cfg.data, on_gpu) if from_files else {}
        suggested = {name: value for name, value in suggested.items() if name not in typed}
        for name, value in suggested.items():
            OmegaConf.update(cfg, name, value)
        data = instantiate_node(inline_aliases(cfg.data, "data"))
        data.prepare_once_per_node()
    source, num_train, has_rows = data.source, len(data.train_indices), len(data.shape) == 1
    print_summary(data)
    folder = start_output(Path(cfg.run_dir))
    if has_rows:
        if not report_rows(data, folder):
            suggested.pop("data.missing", None)
    else:
        report_duplicates(data)
        write_pictures(data, folder, print_channels=not from_files)
    suggestions = [f"{name}={value}" for name, value in suggested.items()]
    suggestions += advice.suggest(data.shape[1:], num_train, on_gpu, from_files)
    if source.labels is not None or source.captions is not None or source.covariates is not None:
        kind = "continuous" if source.covariates is not None else "class" if source.captions is None else "text"
        suggestions.append(f"conditioning={kind}")
    words += accepted([each for each in suggestions if key_of(each) not in typed], words)
    usual = cfg.recipe.max_steps if has_rows else None
    steps = usual or advice.suggest_steps(num_train, on_gpu)
    with usage_errors():
        seconds, memory = advice.measure_step(words, str(folder), cfg.steps)
    if cfg.steps > 0:
        steps = usual or advice.suggest_steps(num_train, on_gpu, seconds)
        device, time = "GPU" if on_gpu else "CPU", format_duration(steps * seconds)
        print(
            f"A step takes {seconds:.3g} s on this {device} and {memory / 2**30:.1f} GiB, so {steps:,} steps "
            f"take about {time}"
        )
    if "trainer.max_steps" not in typed:
        words.append(f"trainer.max_steps={steps}")
    if len(data.shape) == 3:
        print(f"What to expect: {advice.expectation(num_train, bool(cfg.data.get('flip')))}")
    pictures = [relative(path) for name in PICTURES if (path := folder / name).exists()]
    print(f"Look at {' and '.join(map(str, pictures))}, then train:")
    print(command("train", *search_path_overrides(), *map(shell_word, words)))
    return folder


def accepted(suggestions: Sequence[str], words: Sequence[str]) -> list[str]:
    """Return the suggested overrides that src.train accepts beside the typed `words`."""

    def accepts(*more: str) -> bool:
        with warnings.catch_warnings(action="ignore"):
            try:
                check_overrides("train", [*words, *more], added=user_folders())
            except UsageError:
                return False
        return True

    if accepts(*suggestions):
        return list(suggestions)
    kept: list[str] = []
    for each in suggestions:
        kept += [each] if accepts(*kept, each) else []
    return kept


def print_summary(data: "BaseDataModule") -> None:
    """Print what the data are, the sizes of the split, and how unequal the classes are."""
    source: Any = data.source
    if summary := getattr(source, "summary", ""):
        print(summary)
    noun = KINDS.get(len(data.shape) - 1, "row")
    print(f"{counted(len(data.train_indices), noun)} for training and {len(data.val_indices):,} for validation")
    if source.labels is not None:
        classes = source.labels.classes
        counts = source.labels.targets[data.train_indices].bincount(minlength=len(classes))
        least, most = (f"{int(counts[k]):,} {classes[k]}" for k in (int(counts.argmin()), int(counts.argmax())))
        fix = "; data.balance_classes=true draws all classes equally often" if counts.max() > 10 * counts.min() else ""
        if counts.max() > 1.5 * counts.min():
            print(f"The classes have from {least} to {most} for training{fix}")


def report_rows(data: "BaseDataModule", folder: Path) -> int:
    """Print statistics of the columns of points or a table, and nearly equal rows; draw histograms, `columns.png`.

    Returns the number of rows that `data.missing=drop` left out.
    """
    import torch

    from src.data.column_summary import count_near_rows, summarize_columns
    from src.data.column_types import parse_column
    from src.data.columns import Column
    from src.data.table import TableDataModule
    from src.viz.distributions import marginals

    parts = [data.preprocess(data.fetch(indices)[0]) for indices in (data.train_indices, data.val_indices)]
    train, val = (data.postprocess(part).double() for part in parts)
    columns, missing, left_out = [Column(f"column {k + 1}") for k in range(data.shape[0])], [0], 0
    if isinstance(data, TableDataModule):
        table, columns = data.read(), data.encoders
        missing = [int(parse_column(table, column.name, known=column).missing.sum()) for column in columns]
        left_out = len(table) - len(train) - len(val)
    encoded = [part.double().numpy() for part in parts]
    text, names = summarize_columns(columns, torch.cat([train, val]).numpy(), np.concatenate(encoded), missing)
    print(text)
    if isinstance(data, TableDataModule):
        if names:
            transforms = format_override("data.transforms", [f"{name}=quantile" for name in names])
            print(f"Correct those that are errors; for columns with rare large values add {transforms}")
        if near := count_near_rows(encoded[1], encoded[0]):
            print(f"{counted(near, 'validation row')} nearly equal to a training row: remove those that are copies")
    categories = [column.category_names for column in columns]
    picture = marginals(val, train, [column.label for column in columns], categories, ("validation", "training"))
    picture.save(folder / "columns.png")
    return left_out


def report_duplicates(data: "ImageDataModule") -> None:
    """Print the number of duplicate and near-duplicate samples, and how many of them cross the split."""
    from src.data.duplicates import across_split, find_duplicates
    from src.data.split import sample_ids

    source: Any = data.source
    noun = KINDS[len(data.shape) - 1]
    duplicates = find_duplicates(source.fetch, len(source))
    is_val = np.zeros(len(source), bool)
    is_val[data.val_indices] = True
    copies = sum(len(group) - 1 for group in duplicates.exact)
    if not copies and not duplicates.near:
        print(f"No duplicates among {counted(duplicates.compared, noun)}")
        return
    names = source.found.names if hasattr(source, "found") else [*sample_ids(source)]
    first, second, *_ = (duplicates.exact or duplicates.near)[0]
    crossing = across_split(duplicates, is_val)
    print(
        f"{counted(copies, noun)} equal to another and {counted(len(duplicates.near), 'pair')} of nearly equal ones "
        f"among {counted(duplicates.compared, noun)}, such as {printable(names[first])} and "
        f"{printable(names[second])}; {counted(crossing, f'validation {noun}')} equal or similar to a training {noun}"
    )
    if crossing:
        print(f"Remove one of each pair, or set data.val_root to other {noun}s: these lower the validation loss")


def write_pictures(data: "ImageDataModule", folder: Path, print_channels: bool) -> None:
    """Write a grid of training samples as the network sees them, and a histogram of their values; print statistics."""
    from src.data.column_summary import summarize_columns
    from src.data.columns import Column
    from src.viz.distributions import value_histogram
    from src.viz.images import image_grid

    count = min(64, len(data.train_indices))
    x = data.preprocess(data.fetch(data.train_indices[:count])[0])
    image_grid(data.postprocess(x)).save(folder / "images.png")
    count = min(1000, 1 + MAX_VALUES // x[0].numel())
    values = data.fetch(data.train_indices[:count])[0].double().transpose(0, 1).flatten(1).numpy()
    limits = data.inferred.get("value_range", (values.min(), values.max()))
    value_histogram(values, limits).save(folder / "values.png")
    if print_channels:
        text, names = summarize_columns([Column(f"channel {k + 1}") for k in range(len(values))], values.T, values.T)
        low, high = np.quantile(values, [0.001, 0.999])
        fix = f"\nCorrect those that are errors; 'data.value_range=[{low:.3g},{high:.3g}]' scales by the other values"
        print(text + (fix if names else ""))


if __name__ == "__main__":
    launch("doctor", examine)
