"""Compare noise schedules: `python -m src.schedules` or `... names=[linear,cosine] num_steps=1000`."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from src.cli import CONF, UsageError, config_groups, launch, nearest, usage_errors


def show_schedules(cfg: DictConfig) -> Path:
    """Print a table of the chosen schedules; write it, plots of their course, and a strip of noised data for each."""
    available = [name for name in config_groups()["schedule"] if name != "custom"]
    names = available if cfg.names is None else [cfg.names] if isinstance(cfg.names, str) else list(cfg.names)
    if not names or cfg.frames < 2:
        raise UsageError(f"needs at least one of names and two frames, got names={names} frames={cfg.frames}")
    for name in names:
        if name not in available:
            raise UsageError(
                f"unknown schedule '{name}'{nearest(name, available) or ': choose from ' + ', '.join(available)}"
            )

    import torch
    from hydra.utils import instantiate

    from src import plots
    from src.arguments import check_arguments
    from src.diffusion import schedules
    from src.diffusion.noise import NoiseSchedule
    from src.draws import Draws

    tables = {}
    with usage_errors():
        for name in names:
            node = OmegaConf.load(CONF / "schedule" / f"{name}.yaml")
            node.num_steps = cfg.num_steps
            betas = instantiate(node)
            if cfg.snr_shift != 1:
                betas = schedules.snr_shift(betas, cfg.snr_shift)
            if cfg.zero_terminal_snr:
                betas = schedules.zero_terminal_snr(betas)
            tables[name] = NoiseSchedule(betas, dtype=torch.float64), betas
        check_arguments(cfg.data, "data")
        data = instantiate(cfg.data)
        data.prepare_data()
        image = data.examples(1)

    lines = [f"{'schedule':<16}{'beta_1':>11}{'beta_T':>11}{'alpha_bar_T':>13}{'log-SNR from':>14}{'to':>9}"]
    for name, (schedule, betas) in tables.items():
        log_snr = 2 * (schedule.alpha[:-1].log() - schedule.sigma[:-1].log())
        lines.append(
            f"{name:<16}{betas[0].item():>11.3g}{betas[-1].item():>11.3g}{schedule.terminal_alpha_bar:>13.3g}"
            f"{log_snr[0].item():>14.2f}{log_snr[-1].item():>9.2f}"
            + ("  does not reach noise" if schedule.terminal_alpha_bar > 0.01 else "")
        )
    table = "\n".join(lines)
    print(table)

    folder = Path(cfg.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "schedules.txt").write_text(table + "\n")
    plots.schedule_curves({n: (b, s.alpha[:-1], s.sigma[:-1]) for n, (s, b) in tables.items()}).save(
        folder / "schedules.png"
    )
    # The same noise under every schedule: a row each, from clean data to the last step.
    eps = Draws(cfg.seed, 0, 0, 1, image.device).normal("eps", image.shape[1:])
    shown = [-1, *plots.evenly(cfg.num_steps, cfg.frames - 1)]
    rows = [
        torch.cat([schedule.alpha[t].float() * image + schedule.sigma[t].float() * eps for t in shown])
        for schedule, _ in tables.values()
    ]
    plots.labelled_rows([data.to_display(row) for row in rows], list(tables)).save(folder / "noising.png")
    print(f"Look at {folder / 'schedules.png'} and {folder / 'noising.png'}")
    return folder


if __name__ == "__main__":
    launch("schedules", show_schedules)
