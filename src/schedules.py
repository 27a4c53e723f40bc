"""Compare noise schedules: `python -m src.schedules` or `... names=[linear,cosine] num_steps=1000`."""

from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, ListConfig

from src.config.cli import launch
from src.config.output import start_output
from src.config.rules import check_values
from src.config.search_path import config_groups, load_option, unknown_option
from src.errors import UsageError, usage_errors

if TYPE_CHECKING:
    from torch import Tensor

    from src.diffusion.noise import NoiseLevel


def show_schedules(cfg: DictConfig) -> Path:
    """Print and write a table of the chosen schedules, plot their curves, and draw a strip of noised data for each."""
    available = [name for name in config_groups()["schedule"] if name != "custom"]
    names = available if cfg.names is None else list(cfg.names) if isinstance(cfg.names, ListConfig) else [cfg.names]
    if not names:
        raise UsageError("names=[] must name at least one schedule; leave it out for all")
    for name in names:
        if name not in available:
            raise UsageError(unknown_option("schedule", str(name), available))

    import torch

    from src.config.arguments import check_arguments
    from src.diffusion.noise import NoiseLevel, terminal_alpha_bar
    from src.rng import StepRng
    from src.runs.components import build_schedule
    from src.runs.nodes import inline_aliases, instantiate_node
    from src.viz import figures, images, line_plots

    tables = {}
    with usage_errors():
        check_values(cfg)
        for name in names:
            node = load_option("schedule", name)
            node = node.get("schedule", node)  # some files also set other groups
            node.num_steps = cfg.num_steps
            tables[name] = build_schedule(node, cfg.snr_shift, cfg.zero_terminal_snr)
        node = inline_aliases(cfg.data, "data")
        check_arguments(node, "data")
        data = instantiate_node(node)
        data.prepare_data()
        image = data.examples(1)

    lines = [f"{'schedule':<18}{'beta_1':>11}{'beta_T':>11}{'alpha_bar_T':>13}{'log-SNR from':>14}{'to':>9}"]
    curves = {}
    for name, schedule in tables.items():
        rows = [schedule.row(t) for t in range(-1, cfg.num_steps)]
        alpha, sigma, _ = NoiseLevel(*(torch.stack(field) for field in zip(*rows, strict=True)))
        betas, log_snr = 1 - (alpha[1:] / alpha[:-1]).square(), 2 * (alpha.log() - sigma.log())[1:]
        curves[name] = betas, alpha[1:], sigma[1:]
        left = terminal_alpha_bar(schedule)
        lines.append(
            f"{name:<18}{betas[0].item():>11.3g}{betas[-1].item():>11.3g}{left:>13.3g}"
            f"{log_snr[0].item():>14.2f}{log_snr[-1].item():>9.2f}" + ("  does not reach noise" if left > 0.01 else "")
        )
    table = "\n".join(lines)
    print(table)

    folder = start_output(Path(cfg.run_dir))
    (folder / "schedules.txt").write_text(table + "\n")
    line_plots.schedule_curves(curves).save(folder / "schedules.png")
    # One row per schedule, from clean data to the last step, all with the same noise.
    eps = StepRng(cfg.seed, 0, 0, 1, image.device).normal("eps", image.shape[1:])
    shown = [-1, *figures.evenly_spaced_indices(cfg.num_steps, cfg.frames - 1)]
    strips = [torch.cat([_noised(image, eps, s.row(t)) for t in shown]) for s in tables.values()]
    images.labeled_rows([data.postprocess(row) for row in strips], list(tables)).save(folder / "noising.png")
    print(f"Look at {folder / 'schedules.png'} and {folder / 'noising.png'}")
    return folder


def _noised(image: "Tensor", eps: "Tensor", t: "NoiseLevel") -> "Tensor":
    """Return x_t (B, *data) divided by its scale if that exceeds 1, so that images keep their contrast."""
    return (t.alpha * image + t.sigma * eps) / t.norm.clamp(min=1)


if __name__ == "__main__":
    launch("schedules", show_schedules)
