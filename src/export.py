"""Write a trained model as one file to share: `python -m src.export run=outputs/train/...`."""

from pathlib import Path

from omegaconf import DictConfig

from src.config.cli import launch
from src.config.output import begin
from src.errors import usage_errors
from src.quoting import command, format_override
from src.runs.checkpoints import find_checkpoint
from src.training.checkpoints import exportable_settings, write_exported


def export(cfg: DictConfig) -> Path:
    """Write `model.safetensors` into the output folder: the weights, and what others need of the configuration."""
    from src.runs import components
    from src.runs.open import open_run

    with usage_errors():
        find_checkpoint(cfg.run, cfg.ckpt)  # before anything heavy is imported
        opened = open_run(cfg.run, cfg.ckpt, cfg.ema, cfg.trust)
        config, left_out = exportable_settings(components.plain(opened.config))
    path = begin(Path(cfg.run_dir)) / "model.safetensors"
    write_exported(path, opened.module.state_dict(), cfg.ema, config)
    print(f"{opened.checkpoint} as one file to share: {path} ({path.stat().st_size / 1e6:.1f} MB)")
    if left_out:
        print(f"Left out, since it would tell of this machine: {', '.join(left_out)}")
    print(f"Sample from it with: {command('sample', format_override('ckpt', path), 'n=64')}")
    return path


if __name__ == "__main__":
    launch("export", export)
