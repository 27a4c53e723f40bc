"""Save the pictures of a finished training run."""

import math
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
from PIL import Image
from torch import Tensor

from src.data.module import BaseDataModule
from src.diffusion.noise import make_time_grid
from src.metrics.neighbors import Nearest, nearest_neighbors
from src.training.autoencoder import AutoencoderModule
from src.training.checkpoint_io import tolerate_full_disk
from src.training.loggers import log_picture, log_table
from src.training.module import DiffusionModule
from src.viz import images, line_plots
from src.viz.figures import evenly_spaced_indices

MAX_DECODED = 40
"""Steps of a trajectory of latents that are decoded, as many as an animation shows."""


def nearest_training(data: BaseDataModule, samples: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Return the nearest training sample of each of samples (N, *data), and its distance (N,).

    The distance is the root mean square difference of preprocessed values, for latents those of their images. The
    search covers the first `limit` training samples, which are in random order, and reads 1024 at a time.
    """
    shown = data.displayed
    flat = data.decode(samples).flatten(1).cpu()
    best = Nearest.none(flat)
    indices: list[int] = []
    for start in range(0, len(data.train_indices[:limit]), 1024):
        samples_read, ids = shown.fetch(data.train_indices[start : min(start + 1024, limit)])
        best = best.or_nearer(nearest_neighbors(flat, shown.preprocess(samples_read).cpu().flatten(1), start))
        indices += ids
    neighbors = shown.preprocess(shown.fetch([indices[k] for k in best.numbers.tolist()])[0]).cpu()
    return neighbors, best.distances / math.sqrt(flat.shape[1])


class Trajectory(NamedTuple):
    """Samples drawn at the end of training."""

    frames: list[Tensor]  # the first few samples at each step, postprocessed
    final: Tensor  # all samples, as the network returns them (N, *data)
    sigmas: list[float]  # noise level sigma of each frame; empty if the levels of the sampler differ from its time grid


def sample_trajectory(trainer: L.Trainer, module: DiffusionModule, data: BaseDataModule, seed: int) -> Trajectory:
    """Sample from noise to data and keep every step. Collective."""
    count, shown = {1: (2000, 2000), 4: (16, 8)}.get(len(module.shape), (64, 8))  # points, volumes, images
    module.to(trainer.strategy.root_device)  # Lightning moves it to the CPU after training
    frames = []
    for x in module.sample_distributed(count, seed):
        frames.append(x[:shown])
    _, steps, spacing, _ = module.sampler
    sigmas = [level.sigma.item() for level in make_time_grid(module.schedule, steps, spacing)]
    if len(sigmas) != len(frames):
        sigmas = []
    if data.displayed is not data:  # decoding takes long
        chosen = evenly_spaced_indices(len(frames), MAX_DECODED)
        frames, sigmas = [frames[k] for k in chosen], [sigmas[k] for k in chosen if sigmas]
    return Trajectory([data.postprocess(frame).cpu() for frame in frames], x.cpu(), sigmas)


def save_pictures(
    directory: Path,
    trainer: L.Trainer,
    data: BaseDataModule,
    trajectory: Trajectory,
    num_neighbors: int,
    num_candidates: int,
) -> None:
    """Save the final samples, the trajectory as a strip and a GIF, neighbors and the curves."""
    final, titles = data.postprocess(trajectory.final), data.titles(len(trajectory.final))
    sigmas = [f"\N{GREEK SMALL LETTER SIGMA}={sigma:.2g}" for sigma in trajectory.sigmas]
    pictures = {
        "samples/final": images.draw_samples(final, data.displayed_examples(len(final)), titles, data.columns),
        "samples/trajectory": images.draw_trajectory(trajectory.frames, sigmas),
    }
    if final.ndim > 2 and num_neighbors and num_candidates:
        neighbors, distances = nearest_training(data, trajectory.final[:num_neighbors], num_candidates)
        neighbors, count = data.displayed.postprocess(neighbors), min(num_candidates, len(data.train_indices))
        pictures["samples/neighbors"] = images.neighbor_rows(final[:num_neighbors], neighbors, distances, count)
        grids = [[images.image_grid(x[k : k + 1]) for x in (final, neighbors)] for k in range(len(neighbors))]
        rows = [
            [k, titles[k] if titles else "", *pair, d, count]
            for k, (pair, d) in enumerate(zip(grids, distances.tolist(), strict=True))
        ]
        columns = ["index", "condition", "sample", "nearest", "rms_difference", "num_candidates"]
        log_table(trainer, "samples/table", columns, rows)
    _save(directory, trainer, pictures)
    images.save_gif(trajectory.frames, directory / "samples" / "trajectory.gif")
    if (table := directory / "loss_by_noise.csv").exists():  # already logged
        line_plots.loss_by_noise(table).save(table.with_suffix(".png"))


def save_reconstructions(directory: Path, trainer: L.Trainer, module: AutoencoderModule, data: BaseDataModule) -> None:
    """Save validation images above their reconstructions, and the curves."""
    module.to(trainer.strategy.root_device)  # Lightning moves it to the CPU after training
    _save(directory, trainer, {"samples/final": draw_reconstructions(module, data, 32)})


@torch.no_grad()
def draw_reconstructions(module: AutoencoderModule, data: BaseDataModule, count: int) -> Image.Image:
    """Draw rows of the first validation images above rows of their reconstructions, from the means of the posterior."""
    x = data.examples(count).to(module.device)
    size = data.microbatch_size(module.trainer)
    decoded = torch.cat([module.net.decode(module.net.encode(part)[0]) for part in torch.split(x, size)])
    columns = min(8, len(x))
    pairs = zip(*(torch.split(data.postprocess(each), columns) for each in (x, decoded)), strict=True)
    rows = [row for pair in pairs for row in pair if len(row) == columns]
    return images.labeled_rows(rows, ["validation data", "reconstructions"] * (len(rows) // 2))


def save_at_step(directory: Path, trainer: L.Trainer, picture: Image.Image) -> None:
    """Save and log the picture of a validation. A full disk causes a warning only."""
    with tolerate_full_disk(directory):
        directory.mkdir(parents=True, exist_ok=True)
        picture.save(directory / f"step_{trainer.global_step:06d}.png")
    log_picture(trainer, "samples", picture)


def _save(directory: Path, trainer: L.Trainer, pictures: dict[str, Image.Image]) -> None:
    """Save and log pictures by their names, and the curves."""
    if curves := line_plots.loss_curves(sorted((directory / "logs").glob("version_*/metrics.csv"))):
        pictures = {**pictures, "curves": curves}
    (directory / "samples").mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        picture.save(directory / f"{name}.png")
        log_picture(trainer, name, picture)
