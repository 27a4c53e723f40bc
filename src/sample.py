"""Draw samples from a trained run: `python -m src.sample run=outputs/train/... n=64 sampler=ddim sampler.steps=50`."""

import csv
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from src.config.arguments import check_counts, check_seeds
from src.config.cli import launch
from src.config.output import begin
from src.errors import memory_errors, usage_errors
from src.quoting import format_override
from src.runs.checkpoints import find_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from src.data.conditions import Condition


def sample(cfg: DictConfig) -> Path:
    """Write `n` samples of the run, a grid and `samples.npz` (and a GIF of the first) into the output folder.

    Images are PNGs, too, and rows of a table a `samples.csv`.

    Sample k depends on (seed, k) and what it is asked to be alone: not on `n`, `batch_size` or `devices`. (A GPU draws
    other noise than a CPU.) What is asked for, in `cond`, is spread evenly over the samples.
    """
    from src.runs import components, out_of_memory
    from src.runs.open import configure_inference, open_run, pick_device, sampler_of

    with usage_errors():
        find_checkpoint(cfg.run, cfg.ckpt)  # before anything heavy is imported
        check_counts(cfg, "n", "batch_size", "sampler.steps")
        check_seeds(cfg)
        opened = open_run(cfg.run, cfg.ckpt, cfg.ema, cfg.trust, encoder=cfg.encoder)
        configure_inference(opened, cfg.precision, cfg.compile)
        settings = components.sampler_settings(cfg.sampler, opened.config.sampler)
        sampler = sampler_of(opened, settings, cfg.guidance)
        condition = opened.data.condition
        things = wanted(condition, cfg.cond, cfg.negative)
        if cfg.cond is not None and cfg.n < len(things):
            raise ValueError(f"n={cfg.n} leaves out some of the {len(things)} that cond asks for: set n={len(things)}")
        places = [k * len(things) // cfg.n for k in range(cfg.n)] if things else []
        embedded = condition(things) if condition else None
        if sampler.guidance.model and sampler.guidance.scale == 1:
            raise ValueError(
                f"{format_override('guidance.model', cfg.guidance.model)} is led away from by guidance alone: set "
                "guidance.scale=2, or leave it out"
            )
        if cfg.negative is not None and (sampler.guidance.scale == 1 or sampler.guidance.model):
            raise ValueError(
                f"{format_override('negative', cfg.negative)} is led away from by guidance alone, and not beside guidance.model: "
                "set guidance.scale=3, or leave it out"
            )
        if condition and cfg.negative is not None:
            opened.module.null = condition([cfg.negative])
        from src.distributed.processes import start_processes

        processes = start_processes(pick_device(cfg.device), cfg.devices, cfg.num_nodes)

    import torch
    from tqdm import tqdm

    from src.viz import images

    folder = begin(Path(cfg.run_dir))
    batch_size = min(cfg.batch_size, -(-cfg.n // processes.count))
    batches = [range(start, min(start + batch_size, cfg.n)) for start in range(0, cfg.n, batch_size)]
    parts: list[torch.Tensor] = []

    def cond_of(indices: range) -> torch.Tensor | None:
        return None if embedded is None else embedded[places[indices.start : indices.stop]]

    with (
        memory_errors(lambda: out_of_memory.at_batch_size(opened, batch_size, processes.device)),
        tqdm(total=cfg.n * sampler.steps, unit="image-step", desc="Sampling", disable=processes.rank > 0) as bar,
    ):
        module, show = opened.module.to(processes.device), opened.data.postprocess
        size = batch_size if cfg.compile else None  # which has the last batch filled up
        for first in range(0, len(batches), processes.count):
            turn = batches[first : first + processes.count]  # a batch for each process; at last perhaps not for all
            drawn = None
            for indices in processes.share(turn):
                film = []
                for step, x in enumerate(module.sample(indices, cfg.seed, sampler, size, cond_of(indices))):
                    bar.update(sum(map(len, turn)) if step else 0)
                    if cfg.gif and indices.start == 0:
                        film.append(show(x[:8] if x.ndim == 4 else x).cpu())
                if film:
                    images.save_gif(film, folder / "film.gif")
                drawn = show(x).cpu()
            gathered = processes.gather(drawn)
            if processes.rank == 0:  # who writes them
                parts += [part for part in gathered if part is not None]
    if processes.rank > 0:
        return folder
    samples = torch.cat(parts)
    write_samples(folder, samples, opened.data.columns)
    shown = samples[:256] if samples.ndim == 4 else samples
    titles = [condition.title(things[place]) for place in places] if condition else []
    images.draw_samples(shown, titles=titles[: len(shown)], columns=opened.data.columns).save(folder / "grid.png")
    if titles:
        lines = [each if isinstance(each, str) else condition.title(each) for each in things] if condition else []
        (folder / "asked.txt").write_text("".join(f"{lines[place]}\n" for place in places), encoding="utf-8")
    name = str(settings._target_).rpartition(".")[2]
    spacing = sampler.spacing if isinstance(sampler.spacing, str) else sampler.spacing.on(opened.module.schedule)
    own = [f"{k!s} {v}" for k, v in settings.items() if k != "spacing" and not str(k).startswith("_") and v is not None]
    own += [f"spacing {spacing}"]
    own += [f"guidance {sampler.guidance.scale:g}"] if sampler.guidance.scale != 1 else []
    print(f"{cfg.n} samples of {opened.checkpoint} by {name}, {', '.join(own)}")
    print(f"Look at {folder / 'grid.png'}; all of them: {folder / 'samples.npz'}")
    return folder


def write_samples(folder: Path, samples: "Tensor", columns: Sequence[str] | None) -> None:
    """Images (N, C, H, W) uint8, or points or rows (N, D), as `samples.npz`; PNGs beside it, or a `samples.csv`."""
    import numpy as np
    from PIL import Image

    if samples.ndim == 4:
        images = samples.permute(0, 2, 3, 1).numpy()  # channels last, as tools that compute FID expect them

        def write(k: int) -> None:
            image = images[k]
            Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(folder / f"{k:05d}.png")

        with ThreadPoolExecutor() as pool:  # of many, packing takes as long as a GPU takes to draw them
            list(pool.map(write, range(len(images))))
        np.savez_compressed(folder / "samples.npz", images)
    else:
        np.savez_compressed(folder / "samples.npz", samples.numpy())
    if columns:
        with (folder / "samples.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows([f"{x:.9g}" for x in row] for row in samples.tolist())  # all digits that float32 has


def wanted(condition: "Condition | None", cond: Any, negative: Any) -> Sequence[Any]:
    """What is asked for by `cond`: one thing, a list of them, or a file with one on each line; without it, examples.

    Raises ValueError if there is nothing that the run could be asked for.
    """
    if condition is None:
        for name, value in (("cond", cond), ("negative", negative)):
            if value is not None:
                raise ValueError(
                    f"{format_override(name, value)} asks for something of a run that takes no conditions: leave it out, or "
                    "train one with conditioning=class or conditioning=text"
                )
        return []
    if cond is None:
        return condition.examples or [None]
    if isinstance(cond, str) and cond.endswith(".txt"):
        path = Path(cond)
        if not path.is_file():
            raise FileNotFoundError(f"no file {path.resolve()}: cond=FILE.txt has what is asked for, one on each line")
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"{path} is empty: write what is asked for into it, one on each line")
        return lines
    things = (
        [OmegaConf.to_container(x) if isinstance(x, ListConfig) else x for x in cond]
        if isinstance(cond, ListConfig)
        else [cond]
    )
    if not things:
        raise ValueError("cond=[] asks for nothing: name what to draw, or leave it out")
    return things


if __name__ == "__main__":
    launch("sample", sample)
