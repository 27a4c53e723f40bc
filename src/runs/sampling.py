"""Read the prompts of a sampling command, draw batches on several devices, and write samples."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import ListConfig, OmegaConf

from src.errors import format_override

if TYPE_CHECKING:
    from torch import Tensor

    from src.data.conditions import Condition
    from src.data.module import BaseDataModule
    from src.distributed.processes import Processes
    from src.runs.open import OpenedRun
    from src.training.module import Sampler


def read_prompts(condition: "Condition | None", cond: Any, negative: Any) -> Sequence[Any]:
    """Return the conditions that `cond` names: one, a list, or a text file with one per line; null for examples.

    Raises ValueError for an unconditional run or without a condition, FileNotFoundError without the file.
    """
    if condition is None:
        for name, value in (("cond", cond), ("negative", negative)):
            if value is not None:
                raise ValueError(
                    f"{format_override(name, value)} needs a conditional run: leave it out, or train one with "
                    "conditioning=class or conditioning=text"
                )
        return []
    if cond is None:
        return condition.examples or [None]
    if isinstance(cond, str) and cond.endswith(".txt"):
        path = Path(cond)
        if not path.is_file():
            raise FileNotFoundError(f"no file {path.resolve()}: cond=FILE.txt has one condition per line")
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"{path} is empty: write one condition per line into it")
        return lines
    if not isinstance(cond, ListConfig):
        return [cond]
    if not cond:
        raise ValueError("cond=[] is empty: list conditions, or leave it out")
    return [OmegaConf.to_container(each) if isinstance(each, ListConfig) else each for each in cond]


def resize_samples(opened: "OpenedRun", image_size: int | Sequence[int] | None) -> None:
    """Let the run draw samples of another size, one number or one per side, than in training; None keeps that.

    Latents are smaller by the factor of the autoencoder. Raises ValueError for a wrong size and for a run on points.
    """
    if image_size is None:
        return
    override = format_override("image_size", image_size)
    dims = len(opened.module.shape) - 1
    if not dims:
        raise ValueError(f"{override} is for images, and the run was trained on points; leave it out")
    size = list(image_size) if isinstance(image_size, Sequence) else [image_size] * dims
    if len(size) != dims or not all(type(side) is int and side >= 1 for side in size):
        sides = ("[length]", "[height,width]", "[depth,height,width]")[dims - 1]
        raise ValueError(f"{override} must be a number, or {sides}, of at least 1")
    factor = opened.data.displayed.shape[1] // opened.data.shape[1]
    if any(side % factor for side in size):
        near = [max(1, round(side / factor)) * factor for side in size]
        raise ValueError(
            f"{override} must be a multiple of {factor}, the factor of the autoencoder; type "
            f"{format_override('image_size', near[0] if len({*near}) == 1 else near)}"
        )
    opened.module.shape = (opened.module.shape[0], *(side // factor for side in size))


def draw_batches(
    opened: "OpenedRun",
    sampler: "Sampler",
    processes: "Processes",
    batches: Sequence[range],
    seed: int,
    batch_size: int | None,
    cond_of: Callable[[range], "Tensor | None"],
    on_step: Callable[[range, int, "Tensor", int], None],
) -> Iterator["Tensor"]:
    """Draw batches of sample indices on all processes, and yield the samples (B, *data) in the first process, in order.

    `batch_size` fills up the last batch for a compiled network. `cond_of` returns the conditions of the indices.
    `on_step` gets the indices, the step, the current samples and the number of samples over all processes.
    """
    module, denormalize = opened.module.to(processes.device), opened.data.denormalize
    for first in range(0, len(batches), processes.count):
        group = batches[first : first + processes.count]  # one batch per process; the last group may be smaller
        drawn = None
        for indices in processes.share(group):
            for step, x in enumerate(module.sample(indices, seed, sampler, batch_size, cond_of(indices))):
                on_step(indices, step, x, sum(map(len, group)))
            drawn = denormalize(x).cpu()
        gathered = processes.gather(drawn)
        if processes.rank == 0:
            yield from (part for part in gathered if part is not None)


def write_samples(folder: Path, samples: "Tensor", data: "BaseDataModule") -> Path:
    """Write `samples.npz`, or `samples.npy` for data=array, and return it; of a table, return the file of its rows.

    Each image is also written to a file like those of the data, and rows of a table to one in its format.
    `samples` are images (N, C, H, W), arrays (N, C, *size), or rows (N, D), as `data.denormalize` returns them.
    """
    import numpy as np

    from src.data.arrays import ArrayDataModule
    from src.data.table import TableDataModule
    from src.data.write import write_arrays, write_image

    if isinstance(data, ArrayDataModule):
        return write_arrays(folder, samples.numpy(), data)
    array = samples.movedim(1, -1).numpy()  # Tools that compute FID expect channels last.
    if samples.ndim == 4:
        dtype, suffix = getattr(data, "dtype", None) or "uint8", getattr(data, "file_type", None) or ".png"
        array = array if array.dtype == np.uint8 else array.astype(dtype)
        with ThreadPoolExecutor() as pool:  # On one thread, encoding the PNGs would take as long as sampling on a GPU.
            list(pool.map(lambda k: write_image(folder, f"{k:05d}", array[k], suffix), range(len(array))))
    np.savez_compressed(folder / "samples.npz", array)
    if isinstance(data, TableDataModule):
        data.write_samples(folder / "samples", samples)
        if (folder / "samples.csv").exists():
            return folder / "samples.csv"
    return folder / "samples.npz"
