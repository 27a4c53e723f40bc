"""What CI cannot run: training in every precision, resuming and sampling on a GPU, held against float32.

`python -m benchmarks.gpu_check` takes less than 8 minutes. Each row of its tables is a process of its own, so that peak
memory is the row's, and a crash or hang is told in its row. Without a GPU a tiny network goes through the same code.
"""

import argparse
import json
import math
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import hydra
import lightning as L
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.training import RANDOM_IMAGES, now
from src.config.overrides import CONF
from src.distributed.ranks import end_with_parent, fresh_folder
from src.runs import components, out_of_memory
from src.runs.build import build
from src.runs.open import configure_inference, open_run
from src.training.checkpoints import read_checkpoint
from src.training.memory import gib
from src.training.module import DiffusionModule

ROOT = Path(__file__).resolve().parents[1]
PEAKS = {
    "B200": 2250, "GH200": 989, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362,
    "L40": 181, "L4": 121, "A10G": 70, "A10": 125, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip
"""10^12 operations a second in bf16, dense and summed in float32, as the makers state them; the first that fits."""

REFERENCE = "32-true, no TF32"
TOLERANCE, MEMORY_TOLERANCE, GREY_LEVELS = 0.05, 0.15, 2
ROW_SECONDS, SHORTEST = 150, 12
"""The most that a row may take, and what must be left of the budget for one to begin."""

Figures = dict[str, Any]


class Row(NamedTuple):
    """What one process does, with which settings; `source` is the row whose checkpoint it starts from."""

    name: str
    settings: tuple[str, ...] = ()
    does: Literal["train", "overflow", "resume", "sample"] = "train"
    source: str = ""


class Scale(NamedTuple):
    """How much is done: `segment` steps are timed at once after `warmup` of them; samples in two sizes of batch."""

    settings: tuple[str, ...]
    steps: int
    warmup: int
    segment: int
    batches: tuple[int, int]
    sampling_steps: int
    matrix: int

    @property
    def saved_at(self) -> int:
        """The step of the one checkpoint that a run leaves."""
        return self.steps // 2 + 1


GPU = Scale(("model=unet_ddpm", *RANDOM_IMAGES, "data.batch_size=128"), 40, 10, 5, (64, 256), 50, 8192)
TINY = (
    "model=unet_tiny",
    "model.model_channels=8",
    "model.channel_mult=[1]",
    "model.attention_resolutions=[]",
    "model.num_head_channels=8",
)
CPU = Scale((*TINY, *RANDOM_IMAGES, "data.image_size=8", "data.batch_size=16"), 10, 4, 2, (2, 4), 3, 256)


def all_rows(devices: int) -> list[Row]:
    """In the order in which they run: what takes longest comes last."""
    bf16, fp16, fp32 = (f"trainer.precision={name}" for name in ("bf16-mixed", "16-mixed", "32-true"))
    several = sorted({2, 1 << (devices.bit_length() - 1)}) if devices > 1 else []  # powers of 2 divide the batch
    return [
        Row(REFERENCE, (fp32,)),
        Row("32-true", (fp32,)),
        Row("bf16-mixed", (bf16,)),
        Row("16-mixed", (fp16,)),
        Row("bf16-true", ("trainer.precision=bf16-true",)),
        Row("bf16-mixed, checkpointing", (bf16, "model.gradient_checkpointing=true")),
        Row("bf16-mixed, fsdp on 1", ("trainer=fsdp", bf16)),
        *(Row(f"bf16-mixed, ddp on {n}", ("trainer=ddp", bf16, f"trainer.devices={n}")) for n in several),
        *(Row(f"bf16-mixed, fsdp on {n}", ("trainer=fsdp", bf16, f"trainer.devices={n}")) for n in several),
        Row("sampling", (), "sample", "32-true"),
        Row("16-mixed, made to overflow", (fp16,), "overflow"),
        Row("32-true to bf16-mixed", (bf16,), "resume", "32-true"),
        Row("bf16-mixed to 32-true", (fp32,), "resume", "bf16-mixed"),
        Row("16-mixed to 32-true", (fp32,), "resume", "16-mixed"),
        Row("bf16-mixed, compile", (bf16, "compile=true")),
        Row("compiled to not compiled", (bf16,), "resume", "bf16-mixed, compile"),
    ]


class Watch(L.Callback):
    """Keeps each step's loss and gradient norm, and of each segment seconds a step and peak memory. Must stand last.

    The device is waited for between segments alone, as training lets it run behind.
    """

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self.first_step = 0
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.seconds: list[float] = []
        self.peaks: list[int] = []
        self._start = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, DiffusionModule)
        self.losses.append(outputs["loss"].detach())
        self.norms.append(pl_module.grad_norm)
        timed = len(self.losses) - self.scale.warmup
        if timed < 0 or timed % self.scale.segment:
            return
        stop, cuda = now().wall, pl_module.device.type == "cuda"
        if timed:
            self.seconds.append((stop - self._start) / self.scale.segment)
            self.peaks += [torch.cuda.max_memory_allocated()] if cuda else []
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        self._start = now().wall

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The losses of the processes' shares of the batch become those of the batch."""
        mean = trainer.strategy.reduce(torch.stack(self.losses), reduce_op="mean")
        assert isinstance(mean, Tensor)
        self.losses = list(mean)


def compose(name: str, settings: Sequence[str]) -> DictConfig:
    """The configuration of a command, as the command line composes it."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return hydra.compose(name, list(settings))


def run_folder(parent: Path, name: str) -> Path:
    return parent / re.sub(r"\W+", "_", name)


def train(row: Row, scale: Scale, device: str, folder: Path) -> Figures:
    """Train as `src.train` does but for the pictures at its end; resume, or have fp16 overflow, if the row says so."""
    settings = [
        *scale.settings,
        "trainer.devices=1",
        *row.settings,
        f"trainer.accelerator={'cpu' if device == 'cpu' else 'gpu'}",
        f"trainer.max_steps={scale.steps}",
        "lr_scheduler.warmup_steps=5",  # so that the weights move, and with them the loss
        f"validate_every={scale.steps}",
        f"checkpoint_every={scale.saved_at if row.does == 'train' else 2 * scale.steps}",
        "~callbacks.best",
        "callbacks.samples.num_samples=2",
        "sampler.steps=2",
        "callbacks.progress.refresh_rate=0",
        f"run_dir='{run_folder(folder, row.name)}'",
        *([f"resume='{run_folder(folder, row.source)}'", "trust=true"] if row.does == "resume" else []),
    ]
    if row.name == REFERENCE:
        torch.backends.cudnn.allow_tf32 = False  # that of convolutions; that of matrices is off as it is
    cfg = compose("train", settings)
    run = build(cfg)
    if row.does == "overflow":  # at scales 2^40 and 2^28, and no more at the usual 2^16
        scaler = torch.amp.GradScaler(device, init_scale=2.0**40, backoff_factor=2.0**-12)
        run.trainer.strategy.precision_plugin = MixedPrecision("16-mixed", device, scaler)
    watch = Watch(scale)
    run.trainer.callbacks.append(watch)  # type: ignore[attr-defined]
    resume_from = run.resume_from and str(run.resume_from)
    run.trainer.fit(run.module, datamodule=run.data, ckpt_path=resume_from, weights_only=True)
    record = run.directory / "nonfinite.jsonl"
    said = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    figures = {
        "first_step": watch.first_step,
        "losses": [loss.item() for loss in watch.losses],
        "val_loss": float(run.trainer.callback_metrics.get("val/loss", 0)),
        "skipped": sum(not norm.isfinite() for norm in watch.norms),
        "said": len(said),
        "said_of_fp16": sum(bool(line["fp16_scale"]) for line in said),
        "ends_finite": bool(watch.norms[-1].isfinite()),
        "weights": sorted(read_checkpoint(run.resume_from)["state_dict"]) if run.resume_from else [],
    }
    if row.does != "train":
        return figures
    return figures | {
        "images_per_second": cfg.data.batch_size / statistics.median(watch.seconds),
        "flops_per_image": flops_per_image(
            components.meta_network(cfg, run.module.diffusion.outputs), run.module.shape
        ),
        "devices": run.trainer.world_size,
        "peak": statistics.median(watch.peaks) if watch.peaks else None,
        "estimate": sum(out_of_memory.step_memory(run)),
    }


def flops_per_image(net: nn.Module, shape: Sequence[int]) -> int:
    """Operations of a forward and backward pass for one image: the model's own, without what is computed again."""
    net.checkpointing = False  # type: ignore[assignment]
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, *shape, device="meta"), torch.zeros(1, device="meta")).sum().backward()
    return int(counter.get_total_flops())


def sample(row: Row, scale: Scale, device: str, folder: Path) -> Figures:
    """Open a run as `src.sample` does and draw by DDIM, in float32 and in bf16."""
    opened = open_run(str(run_folder(folder, row.source)), trust=True)
    module = opened.module.to(device)
    sampler = components.build_sampler(
        compose("sample", ["sampler=ddim", f"sampler.steps={scale.sampling_steps}"]).sampler
    )
    speeds, apart = {}, {}
    for name in ("32-true", "bf16-mixed"):
        configure_inference(opened, name, None)
        images = []
        for count in scale.batches:
            for _ in module.sample(range(count), 0, sampler._replace(steps=2)):
                pass
            start = now().wall
            *_, x = module.sample(range(count), 0, sampler)
            speeds[f"{name}, {count} at once"] = count / (now().wall - start)
            images.append(opened.data.postprocess(x).cpu().int())
        few, many = images
        apart[name] = int((few - many[: len(few)]).abs().max())
    return {"speeds": speeds, "grey_levels": apart}


def describe(device: str) -> Figures:
    """The machine, and what a product of large bf16 matrices reaches on it."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    cuda = device == "cuda"
    size = (GPU if cuda else CPU).matrix
    a = torch.randn(size, size, device=device).bfloat16()
    seconds = []
    for _ in range(15):
        start = now().wall
        a @ a
        seconds.append(now().wall - start)
    name = torch.cuda.get_device_name() if cuda else "CPU"
    driver = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    return {
        "device": device,
        "devices": torch.cuda.device_count() if cuda else 1,
        "name": name,
        "driver": output(*driver) if cuda else "-",
        "torch": torch.__version__,
        "commit": output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "matmul": 2 * size**3 / statistics.median(seconds[5:]),
        "peak": stated_peak(name),
    }


def stated_peak(name: str) -> float | None:
    """What the maker of a GPU of this name states for bf16, in operations a second; None if it is not known here."""
    return next((1e12 * peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)


def output(*command: str) -> str:
    """What a command prints, "unknown" if it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def isolated(work: Callable[[], Figures], log: Path, seconds: float) -> Figures | str:
    """What `work` returns in a process of its own, or why it did not; all that it has started ends with it.

    Forked, since importing takes longer than most rows: the process that forks must never have touched a GPU.
    """
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def begin() -> None:
        os.setsid()
        end_with_parent()
        sys.stdout = sys.stderr = file = log.open("w", buffering=1)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            send.send(work())
        except BaseException as error:  # also what ends a process, such as Lightning's answer to an interrupt
            traceback.print_exc()
            send.send(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    process = context.Process(target=begin)
    process.start()
    assert process.pid is not None
    send.close()
    try:
        answer = receive.recv() if receive.poll(seconds) else f"no end after {seconds:.0f} s"
    except EOFError:
        answer = "the process died"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    assert isinstance(answer, dict | str)
    return answer


def run_row(row: Row, device: str, devices: int, folder: Path) -> Figures:
    """Do what a row says in this process, and in those that Lightning starts for further devices."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(run_folder(folder, row.name) / "inductor")
    sys.argv[1:] = ["--row", row.name, "--folder", str(folder), "--device", device, "--devices", str(devices)]
    return (sample if row.does == "sample" else train)(row, CPU if device == "cpu" else GPU, device, folder)


def check_row(row: Row, figures: Figures, done: Mapping[str, Figures], machine: Figures) -> tuple[list[str], list[str]]:
    """A row's cells, and what is wrong with it."""
    if row.does == "sample":
        levels = figures["grey_levels"]
        seen = ", ".join(f"{apart} of 255 gray levels in {name}" for name, apart in levels.items())
        cells = [f"an image that is drawn with few and with many others differs by at most {seen}"]
        return cells, ["an image is not the same among others"] if levels["32-true"] > GREY_LEVELS else []
    faults = []
    if not all(map(math.isfinite, [*figures["losses"], figures["val_loss"]])) or not figures["ends_finite"]:
        faults.append("loss or gradient is not finite")
    if not figures["skipped"] == figures["said"] == figures["said_of_fp16"]:
        faults.append("{skipped} steps skipped, {said} said, {said_of_fp16} of them as of fp16".format_map(figures))
    if row.does == "overflow":
        faults += [] if figures["skipped"] else ["nothing overflowed"]
        return ["{skipped} steps overflowed, {said_of_fp16} were skipped and said".format_map(figures)], faults

    first, losses = figures["first_step"], figures["losses"]
    apart, against = math.nan, row.source or REFERENCE
    late = -(len(losses) if first else len(losses) // 2)  # of a whole run the second half, where it has learned
    if against in done:
        apart = statistics.mean(losses[late:]) / statistics.mean(done[against]["losses"][late:]) - 1
        if not abs(apart) <= TOLERANCE:
            faults.append(f"loss {apart:+.1%} from that of {against}")
    if row.does == "resume":
        names = [other["weights"] for other in done.values() if other.get("weights")]
        if first + len(losses) != len(done[row.source]["losses"]) or not first:
            faults.append("it did not go on where the checkpoint was")
        if any(other != figures["weights"] for other in names):
            faults.append("the weights have other names in this checkpoint than in others")
        cells = [f"went on after step {first} from {len(figures['weights'])} weights, loss {apart:+.2%} from {against}"]
        return cells, faults

    speed, peak, estimate = figures["images_per_second"], figures["peak"], figures["estimate"]
    share, memory = "-", ["-", gib(estimate), "-", "-"]
    if peak:
        of_peak = speed * figures["flops_per_image"] / figures["devices"] / (machine["peak"] or machine["matmul"])
        ratio = peak / estimate
        within = abs(ratio - 1) <= MEMORY_TOLERANCE
        share, memory = f"{of_peak:.1%}", [gib(peak), gib(estimate), f"{ratio:.2f}", "yes" if within else "no"]
        # Of a compiled network it is a bound; and without TF32, as nobody trains, convolutions ask for room to work in.
        if not within and row.name != REFERENCE and not (ratio < 1 and "compile=true" in row.settings):
            faults.append(f"memory is {ratio:.2f} of its estimate")
    skipped = str(figures["skipped"])
    drift = "-" if math.isnan(apart) else f"{apart:+.2%}"
    return [f"{statistics.mean(losses[late:]):.4f}", drift, skipped, f"{speed:.4g}", share, *memory], faults


def report(machine: Figures, rows: Sequence[Row], results: Mapping[str, Figures | str]) -> tuple[str, list[str]]:
    """The tables as Markdown, and all that is wrong."""
    done = {name: figures for name, figures in results.items() if isinstance(figures, dict)}
    training: list[str] = []
    checks: list[str] = []
    speeds: list[str] = []
    wrong: list[str] = []
    for row in rows:
        if row.name in done:
            cells, faults = check_row(row, done[row.name], done, machine)
        else:
            cells = [str(results[row.name])]
            faults = [cell for cell in cells if cell.startswith("failed")]
        (training if row.does == "train" else checks).append(f"| {row.name} | {' | '.join(cells)} |")
        speeds += [f"| {k} | {v:.4g} |" for k, v in done.get(row.name, {}).get("speeds", {}).items()]
        wrong += [f"{row.name}: {fault}" for fault in faults]
    scale = CPU if machine["device"] == "cpu" else GPU
    stated = f"{machine['peak'] / 1e12:.0f} by its maker" if machine["peak"] else "which stands for its peak, not known"
    lines = [
        "{devices} x {name}, driver {driver}, torch {torch}, commit {commit}; ".format_map(machine)
        + f"product of bf16 matrices {machine['matmul'] / 1e12:.3g} TFLOP/s, {stated}.",
        f"Each run: `{' '.join(scale.settings)}`, {scale.steps} steps; the loss is that of the second half.",
        "",
        f"| run | loss | against {REFERENCE} | steps skipped | images/s | of bf16 peak | memory, GiB | estimate "
        "| ratio | within 15% |",
        *[f"|{'---|' * 10}", *training],
        *["", "| check | what was seen |", "|---|---|", *checks],
        *["", f"| samples in {scale.sampling_steps} DDIM steps | images/s |", "|---|---|", *speeds],
        *["", *([f"- {line}" for line in wrong] or ["Nothing is wrong."])],
    ]
    return "\n".join(lines), wrong


def check(device: str, devices: int | None, chosen: Sequence[str], budget: float, folder: Path) -> list[str]:
    """Run the rows, or those `chosen` and what they need, and write the tables. Gives all that is wrong."""
    start = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    machine = isolated(partial(describe, device), folder / "machine.log", ROW_SECONDS)
    if isinstance(machine, str):
        print(f"failed: {machine} (see {folder / 'machine.log'})")
        return [machine]
    machine["devices"] = devices = devices or machine["devices"]
    rows = all_rows(devices)
    if unknown := set(chosen) - {row.name for row in rows}:
        sys.exit(f"error: no rows {sorted(unknown)}: there are {[row.name for row in rows]}")
    needed = {*chosen, REFERENCE, *(row.source for row in rows if row.name in chosen)}
    rows = [row for row in rows if not chosen or row.name in needed]
    results: dict[str, Figures | str] = {}
    with tempfile.TemporaryDirectory(dir=folder, prefix="runs_") as runs_folder:  # gigabytes
        for row in rows:
            left = budget - (time.monotonic() - start)
            if row.source and not isinstance(results[row.source], dict):
                results[row.name] = f"not run: it begins with a checkpoint of {row.source}"
            elif left < SHORTEST:
                results[row.name] = f"not run: the {budget:.0f} s were over"
            else:
                work = partial(run_row, row, machine["device"], devices, Path(runs_folder))
                log = run_folder(folder, row.name).with_suffix(".log")
                answer = isolated(work, log, min(ROW_SECONDS, left))
                over = isinstance(answer, str) and answer.startswith("no end") and left < ROW_SECONDS
                cut = f"not run to its end: the {budget:.0f} s were over"
                results[row.name] = answer if isinstance(answer, dict) else cut if over else f"failed: {answer}"
            print(f"{time.monotonic() - start:4.0f} s  {row.name}", file=sys.stderr, flush=True)
    text, wrong = report(machine, rows, results)
    (folder / "table.md").write_text(f"{text}\n")
    (folder / "figures.json").write_text(json.dumps({"machine": machine, "rows": results, "wrong": wrong}, indent=2))
    print(text)
    return wrong


def main() -> None:
    """Run all rows, or as a process that another one started, one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--rows", nargs="+", default=[], metavar="NAME", help="of the first column; default: all")
    parser.add_argument("--budget", type=float, default=450, help="seconds, after which no row begins or goes on")
    parser.add_argument("--folder", type=Path, help="for tables, figures and logs; default: outputs/gpu_check/<time>")
    parser.add_argument("--devices", type=int, help="default: all; with 2 or more, runs on 2 and on as many as can")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        end_with_parent()
        row = next(row for row in all_rows(args.devices or 1) if row.name == args.row)
        run_row(row, args.device, args.devices or 1, args.folder)
        return
    folder = (args.folder or Path(fresh_folder("outputs/gpu_check"))).resolve()
    if check(args.device, args.devices, args.rows, args.budget, folder):
        sys.exit(1)


if __name__ == "__main__":
    main()
