"""Inspect a dataset of images before training: `python -m src.doctor data=folder data.root=path/to/images`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from src.config.cli import launch
from src.config.output import relative, start_output
from src.config.rules import check_values
from src.config.words import key_of
from src.errors import UsageError, counted, usage_errors
from src.quoting import command, format_override, shell_word

if TYPE_CHECKING:
    from src.data.image_source import ImageSource
    from src.data.images import ImageDataModule
    from src.runs.advice import FileStats

SOURCES = ("src.data.folder.folder", "src.data.captions.captioned")
NUM_PROBED = 200
"""Number of files to decode unchanged, to find their channels and sizes."""


def examine(cfg: DictConfig) -> Path:
    """Print a summary of the data and a training command for them; return the output folder.

    Reports duplicates and measures some training steps. Writes `images.png`, a grid, and `values.png`, a histogram.
    """
    with usage_errors():
        check_values(cfg)
        words = [word for word in HydraConfig.get().overrides.task if not word.startswith(("run_dir", "steps"))]
        typed = {key_of(word) for word in words}
        if OmegaConf.select(cfg, "data.source._target_") not in SOURCES:  # before the slow imports
            raise UsageError(
                "src.doctor looks at folders of images only, data=folder and data=captions; the start of this command "
                f"describes other data: {command('train', *map(shell_word, words))}"
            )
        import torch

        from src.runs import advice
        from src.runs.components import instantiate_node

        on_gpu = torch.cuda.is_available()
        stats = probe(cfg)
        suggested = {"data.channels": stats.suggested_channels, "data.image_size": stats.suggested_size(on_gpu)}
        for name, value in suggested.items():
            if name not in typed:
                OmegaConf.update(cfg, name, value)
        data = instantiate_node(cfg.data)
        data.prepare_once_per_node()
    source, num_train = data.source, len(data.train_indices)
    print(source.summary)
    print(f"{counted(num_train, 'image')} for training and {len(data.val_indices):,} for validation")
    folder = start_output(Path(cfg.run_dir))
    report_duplicates(data, source)
    write_pictures(data, folder)
    suggestions = [f"{name}={value}" for name, value in suggested.items()]
    suggestions += advice.suggest(max(data.shape[1:]), num_train, on_gpu)
    if source.captions is not None or source.labels is not None:
        suggestions.append("conditioning=class" if source.captions is None else "conditioning=text")
    words += [suggestion for suggestion in suggestions if key_of(suggestion) not in typed]
    steps = advice.suggest_steps(num_train, on_gpu)
    if cfg.steps > 0:
        with usage_errors():
            cost = advice.measure_step(words, str(folder), cfg.steps)
        steps = advice.suggest_steps(num_train, on_gpu, cost.seconds)
        device = "GPU" if on_gpu else "CPU"
        print(
            f"A step takes {cost.seconds:.3g} s on this {device} and {cost.memory / 2**30:.1f} GiB, so {steps:,} steps "
            f"take about {steps * cost.seconds / 60:,.0f} minutes"
        )
    if "trainer.max_steps" not in typed:
        words.append(f"trainer.max_steps={steps}")
    print(f"What to expect: {advice.expectation(num_train, bool(cfg.data.get('flip')))}")
    print(f"Look at {relative(folder / 'images.png')} and {relative(folder / 'values.png')}, then train:")
    print(command("train", *map(shell_word, words)))
    return folder


def probe(cfg: DictConfig) -> "FileStats":
    """Return statistics of evenly spaced files, decoded unchanged. Raises ValueError if none can be read."""
    from src.data.decode import decode
    from src.data.folder import find
    from src.runs import advice

    root = cfg.data.root if isinstance(cfg.data.root, str) else list(cfg.data.root)
    source = cfg.data.source
    settings = {name: source.get(name) for name in ("pages", "channel_pattern", "channel_names") if name in source}
    files = find(root, cfg.data.get("val_root"), **settings)
    decode_image = getattr(files, "decode", None)  # of files with other than one image each
    decoded: list[Any] = []
    for k in range(0, len(files), -(-len(files) // NUM_PROBED)):
        try:
            if decode_image is not None:
                decoded.append(decode_image(k, source.pages))
            else:
                with files.open(k) as stream:
                    decoded.append(decode(stream))
        except Exception:  # decoders raise almost anything; reading all files reports the reason
            continue
    if not decoded:
        raise ValueError(f"{format_override('data.root', root)} has no image that can be read; set another folder")
    return advice.file_stats(decoded)


def report_duplicates(data: "ImageDataModule", source: "ImageSource") -> None:
    """Print the number of duplicate and near-duplicate images, and how many of them cross the split."""
    import numpy as np

    from src.data.duplicates import across_split, find_duplicates

    duplicates = find_duplicates(source.fetch, len(source))
    is_val = np.zeros(len(source), bool)
    is_val[data.val_indices] = True
    copies, names = sum(len(group) - 1 for group in duplicates.exact), source.found.names
    if not copies and not duplicates.near:
        print(f"No duplicates among {duplicates.compared:,} images")
        return
    first, second, *_ = (duplicates.exact or duplicates.near)[0]
    crossing = across_split(duplicates, is_val)
    print(
        f"{counted(copies, 'image')} equal to another and {counted(len(duplicates.near), 'pair')} of nearly equal ones "
        f"among {duplicates.compared:,} images, such as {names[first]} and {names[second]}; "
        f"{counted(crossing, 'validation image')} equal or similar to a training image"
    )
    if crossing:
        print("Remove one of each pair, or set data.val_root to other images: these lower the validation loss")


def write_pictures(data: "ImageDataModule", folder: Path) -> None:
    """Write a grid of training images as the network sees them, and a histogram of their values."""
    from src.viz.charts import value_histogram
    from src.viz.images import image_grid

    count = min(64, len(data.train_indices))
    x = data.preprocess(data.fetch(data.train_indices[:count])[0])
    image_grid(data.postprocess(x)).save(folder / "images.png")
    more = data.preprocess(data.fetch(data.train_indices[:1000])[0]).numpy()
    low, high = data.inferred["value_range"]
    values = (more + 1) / 2 * (high - low) + low
    value_histogram(values.swapaxes(0, 1).reshape(values.shape[1], -1), (low, high)).save(folder / "values.png")


if __name__ == "__main__":
    launch("doctor", examine)
