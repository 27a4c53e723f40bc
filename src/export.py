"""Export a trained model to one file: `python -m src.export run=outputs/train/...`."""

from pathlib import Path

from omegaconf import DictConfig

from src.config.cli import launch
from src.config.output import relative, start_output
from src.config.search_path import search_path_overrides
from src.errors import usage_errors
from src.quoting import command, format_override
from src.runs.checkpoints import find_checkpoint
from src.training.checkpoints import exportable_settings, write_exported


def export(cfg: DictConfig) -> Path:
    """Write `model.safetensors`, the weights and the model configuration, into the output folder; return its path."""
    from src.runs import components
    from src.runs.open import open_run

    with usage_errors():
        find_checkpoint(cfg.run, cfg.ckpt, cfg.init_from.path)  # before the slow imports
        opened = open_run(cfg.run, cfg.ckpt, cfg.ema, cfg.trust, init_from=cfg.init_from)
        config, left_out = exportable_settings(components.to_plain(opened.config))
    path = start_output(Path(cfg.run_dir)) / "model.safetensors"
    write_exported(path, opened.module.state_dict(), opened.averaged, config)
    print(f"{relative(opened.checkpoint)} exported to {relative(path)} ({path.stat().st_size / 1e6:.1f} MB)")
    if left_out:
        print(f"Left out paths and names of this machine: {', '.join(left_out)}")
    sample = command("sample", *search_path_overrides(), format_override("ckpt", path), "n=64")
    print(f"Sample from it with: {sample}")
    return path


if __name__ == "__main__":
    launch("export", export)
