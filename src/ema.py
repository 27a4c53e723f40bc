"""Write averages of the weights of any length: `python -m src.ema run=outputs/train/... length=0.1`."""

from pathlib import Path

from omegaconf import DictConfig, ListConfig

from src.config.cli import launch
from src.config.output import relative
from src.config.search_path import search_path_overrides
from src.errors import command, format_override, usage_errors
from src.runs.checkpoints import find_checkpoint


def ema(cfg: DictConfig) -> list[Path]:
    """Write a model with the average of each `length` next to the snapshots of a run, and return the files."""
    with usage_errors():
        path = find_checkpoint(cfg.run, cfg.ckpt, takes_models=False)
        from src.training.checkpoints import exportable_settings, read_checkpoint, weights_of, write_exported
        from src.training.power_ema import averaged_checkpoint, averages_folder, tracked_averages

        checkpoint = read_checkpoint(path)
        several = isinstance(cfg.length, ListConfig)
        lengths = list(cfg.length) if several else [cfg.length]
        tracked = tracked_averages(checkpoint, path, format_override("length", cfg.length))
        if not lengths:
            raise ValueError("length=[] must list at least one length, such as 0.1")
        results = [tracked.reconstruct(length, "length", lengths if several else None) for length in lengths]
        folder = averages_folder(path)
        folder.mkdir(exist_ok=True)
        settings, left_out = exportable_settings(checkpoint["hyper_parameters"])
    files = []
    for length, result in zip(lengths, results, strict=True):
        file = folder / f"length_{length:g}.safetensors"
        weights = weights_of(averaged_checkpoint(checkpoint, tracked, result), True, path)
        write_exported(file, weights, True, settings)
        error = max(result.error, 1e-6)  # float32 rounds
        print(f"{relative(file)}: each weight is exact up to {error:.0e} of its range during training")
        files.append(file)
    words = [*search_path_overrides(), format_override("ckpt", relative(files[-1]))]
    if "autoencoder.path" in left_out:
        words.append(format_override("autoencoder", checkpoint["hyper_parameters"]["autoencoder"]["path"]))
    print(f"Sample from it with: {command('sample', *words, 'n=64')}")
    return files


if __name__ == "__main__":
    launch("ema", ema)
