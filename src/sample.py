"""Draw samples from a trained run: `python -m src.sample run=outputs/train/... n=64 sampler=ddim sampler.steps=50`."""

from pathlib import Path

from omegaconf import DictConfig

from src.checkpoints import find_checkpoint
from src.cli import launch
from src.errors import memory_errors, usage_errors


def sample(cfg: DictConfig) -> Path:
    """Write `n` samples of the run as PNGs, a grid and `samples.npz` (and a GIF of the first) into the output folder.

    Sample k depends on (seed, k) alone: not on `n`, `batch_size` or `devices`. (A GPU draws other noise than a CPU.)
    """
    from src import building, out_of_memory, runs
    from src.arguments import check_arguments

    with usage_errors():
        find_checkpoint(cfg.run, cfg.ckpt)  # before anything heavy is imported
        if min(cfg.n, cfg.batch_size) < 1:
            raise ValueError(f"n and batch_size must be at least 1, got {cfg.n} and {cfg.batch_size}")
        opened = runs.open_run(cfg.run, cfg.ckpt, cfg.ema, cfg.trust)
        settings = building.sampler_settings(cfg.sampler, opened.config.sampler)
        check_arguments(settings, "sampler")
        sampler = building.build_sampler(settings)
        opened.module.check_sampler(sampler)
        from src.processes import start_processes

        processes = start_processes(runs.pick_device(cfg.device), cfg.devices, cfg.num_nodes)

    import numpy as np
    import torch
    from PIL import Image
    from tqdm import tqdm

    from src import plots

    folder = Path(cfg.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    batch_size = min(cfg.batch_size, -(-cfg.n // processes.count))
    batches = [range(start, min(start + batch_size, cfg.n)) for start in range(0, cfg.n, batch_size)]
    parts: list[torch.Tensor] = []
    with (
        memory_errors(lambda: out_of_memory.at_batch_size(opened, batch_size, processes.device)),
        tqdm(total=cfg.n * sampler.steps, unit="image-step", desc="Sampling", disable=processes.rank > 0) as bar,
    ):
        module, show = opened.module.to(processes.device), opened.data.to_display
        for first in range(0, len(batches), processes.count):
            turn = batches[first : first + processes.count]  # a batch for each process; at last perhaps not for all
            drawn = None
            for indices in processes.share(turn):
                film = []
                for step, x in enumerate(module.sample(indices, cfg.seed, sampler)):
                    bar.update(sum(map(len, turn)) if step else 0)
                    if cfg.gif and indices.start == 0:
                        film.append(show(x[:8] if x.ndim == 4 else x).cpu())
                if film:
                    plots.save_gif(film, folder / "film.gif")
                drawn = show(x).cpu()
            gathered = processes.gather(drawn)
            if processes.rank == 0:  # who writes them
                parts += [part for part in gathered if part is not None]
    if processes.rank > 0:
        return folder
    samples = torch.cat(parts)
    if samples.ndim == 4:
        for k, image in enumerate(samples.permute(0, 2, 3, 1).numpy()):
            Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(folder / f"{k:05d}.png")
        # Channels last, as FID tools expect it: (N, H, W, C) uint8.
        np.savez_compressed(folder / "samples.npz", samples.permute(0, 2, 3, 1).numpy())
    else:
        np.savez_compressed(folder / "samples.npz", samples.numpy())
    plots.draw(samples[:256] if samples.ndim == 4 else samples).save(folder / "grid.png")
    name = str(settings._target_).rpartition(".")[2]
    own = [f"{k!s} {v}" for k, v in settings.items() if not str(k).startswith("_") and v is not None]
    print(f"{cfg.n} samples of {opened.checkpoint} by {name}, {', '.join(own)}")
    print(f"Look at {folder / 'grid.png'}; all of them: {folder / 'samples.npz'}")
    return folder


if __name__ == "__main__":
    launch("sample", sample)
