"""Draw samples from a trained run: `python -m src.sample run=outputs/train/... n=64 sampler=ddim sampler.steps=50`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from src.config.cli import launch
from src.config.output import relative, start_output
from src.config.rules import check_values
from src.errors import format_override, memory_errors, usage_errors
from src.runs.checkpoints import find_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from src.distributed.processes import Processes
    from src.runs.open import OpenedRun
    from src.training.module import Sampler


def sample(cfg: DictConfig) -> Path:
    """Draw `n` samples from a run, write them to the output folder, and return the folder.

    Writes `samples.npz`, a grid of images, and an animation if `gif` is true. Images are also written as PNGs, and rows
    of a table as `samples.csv`. Sample k depends only on (seed, k) and its condition, not on `n`, `batch_size` or
    `devices`. A GPU draws other random numbers than a CPU. The conditions in `cond` get equal shares of the samples.
    """
    from src.runs import components, out_of_memory
    from src.runs.open import configure_inference, open_run, pick_device, sampler_of
    from src.runs.sampling import read_prompts, resize_samples, write_samples

    with usage_errors():
        find_checkpoint(cfg.run, cfg.ckpt, cfg.init_from.path)  # before the slow imports
        check_values(cfg)
        device = pick_device(cfg.device)
        places = {"encoder": cfg.encoder, "autoencoder": cfg.autoencoder, "device": str(device)}
        opened = open_run(cfg.run, cfg.ckpt, cfg.ema, cfg.trust, init_from=cfg.init_from, **places)
        configure_inference(opened, cfg.precision, cfg.compile)
        settings = components.sampler_settings(cfg.sampler, opened.config.sampler)
        sampler = sampler_of(opened, settings, cfg.get("guidance"))
        resize_samples(opened, cfg.image_size)
        condition = opened.data.condition
        prompts = read_prompts(condition, cfg.cond, cfg.negative)
        check_prompt_settings(cfg, sampler, len(prompts))
        embedded = condition(prompts) if condition else None
        if condition and cfg.negative is not None:
            opened.module.null = condition([cfg.negative])
        from src.distributed.processes import start_processes

        processes = start_processes(device, cfg.devices, cfg.num_nodes)

    import torch

    from src.viz import images

    folder = start_output(Path(cfg.run_dir))
    prompt_of = [k * len(prompts) // cfg.n for k in range(cfg.n)] if prompts else []
    batch_size = min(cfg.batch_size, -(-cfg.n // processes.count))
    batches = [range(start, min(start + batch_size, cfg.n)) for start in range(0, cfg.n, batch_size)]

    def cond_of(indices: range) -> "Tensor | None":
        return None if embedded is None else embedded[prompt_of[indices.start : indices.stop]]

    with memory_errors(lambda: out_of_memory.sampling_oom_message(batch_size, processes.device)):
        parts, frames = draw(cfg, opened, sampler, processes, batches, cond_of)
    if processes.rank > 0:
        return folder
    if frames:
        images.save_gif(frames, folder / "trajectory.gif")
    samples = torch.cat(parts)
    path = write_samples(folder, samples, opened.data.displayed)
    shown = opened.data.display(samples[:256] if samples.ndim > 2 else samples)
    titles = [condition.title(prompts[k]) for k in prompt_of] if condition else []
    images.draw_samples(shown, titles=titles[: len(shown)], columns=opened.data.columns).save(folder / "grid.png")
    if condition:
        lines = [each if isinstance(each, str) else condition.title(each) for each in prompts]
        (folder / "conditions.txt").write_text("".join(f"{lines[k]}\n" for k in prompt_of), encoding="utf-8")
    summary = sampler_summary(settings, sampler, opened.module.schedule)
    weights = "" if opened.length is None else f" (average of length {opened.length:g})"
    print(f"{cfg.n} samples of {relative(opened.checkpoint)}{weights} by {summary}")
    each = "".join(f", and one by one from {relative(file)}" for file in folder.glob("00000.*"))
    print(f"Look at {relative(folder / 'grid.png')}; all of them: {relative(path)}{each}")
    return folder


def draw(
    cfg: DictConfig,
    opened: "OpenedRun",
    sampler: "Sampler",
    processes: "Processes",
    batches: "Sequence[range]",
    cond_of: "Callable[[range], Tensor | None]",
) -> "tuple[list[Tensor], list[Tensor]]":
    """Draw all samples; return them in parts, and the first samples at each noise level for an animation."""
    from tqdm import tqdm

    from src.data.array_files import KINDS
    from src.runs.sampling import draw_batches

    frames: list[Tensor] = []
    unit = f"{KINDS.get(len(opened.module.shape) - 1, 'row')}-step"
    with tqdm(total=cfg.n * sampler.steps, unit=unit, desc="Sampling", disable=processes.rank > 0) as bar:

        def on_step(indices: range, step: int, x: "Tensor", count: int) -> None:
            bar.update(count if step else 0)
            if cfg.gif and indices.start == 0:
                frames.append(opened.data.postprocess(x[:8] if x.ndim > 2 else x).cpu())

        filled = len(batches[0]) if cfg.compile else None
        return [*draw_batches(opened, sampler, processes, batches, cfg.seed, filled, cond_of, on_step)], frames


def check_prompt_settings(cfg: DictConfig, sampler: "Sampler", num_prompts: int) -> None:
    """Raise ValueError if `n` is smaller than the number of conditions, or a setting needs guidance that is off."""
    if cfg.cond is not None and cfg.n < num_prompts:
        raise ValueError(f"n={cfg.n} must be at least {num_prompts}, the number of conditions in cond")
    if sampler.guidance.model and sampler.guidance.scale == 1:
        raise ValueError(
            f"{format_override('guidance.model', cfg.guidance.model)} has no effect at guidance.scale=1: set "
            "guidance.scale=2, or leave it out"
        )
    if cfg.negative is not None and (sampler.guidance.scale == 1 or sampler.guidance.model):
        raise ValueError(
            f"{format_override('negative', cfg.negative)} has no effect at guidance.scale=1 or with guidance.model: "
            "set guidance.scale=3, or leave it out"
        )


def sampler_summary(settings: DictConfig, sampler: "Sampler", schedule: object) -> str:
    """Return the sampler's name and settings for display."""
    name = str(settings._target_).rpartition(".")[2]
    spacing = sampler.spacing if isinstance(sampler.spacing, str) else sampler.spacing.on(schedule)  # type: ignore[arg-type]
    words = [
        f"{k!s} {v}" for k, v in settings.items() if k != "spacing" and not str(k).startswith("_") and v is not None
    ]
    guidance = [f"guidance {sampler.guidance.scale:g}"] if sampler.guidance.scale != 1 else []
    return ", ".join([name, *words, f"spacing {spacing}", *guidance])


if __name__ == "__main__":
    launch("sample", sample)
