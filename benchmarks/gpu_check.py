"""Check training in every precision, resuming and sampling on a GPU against float32: `python -m benchmarks.gpu_check`.

Takes less than 8 minutes. Each row runs in its own process, so that peak memory is that of the row and a crash or hang
affects no other row. Without a GPU a tiny network runs the same code.
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
from src.config.search_path import CONF
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
"""Vendors' peak TFLOP/s in bf16, dense with float32 accumulation; the first name that matches applies."""

REFERENCE = "32-true, no TF32"
TOLERANCE, MEMORY_TOLERANCE, MAX_PIXEL_DIFFERENCE = 0.05, 0.15, 2
ROW_SECONDS, MIN_SECONDS = 150, 12
"""Time limit of a row, and the minimum of the remaining budget for a row to start."""

Results = dict[str, Any]


class Row(NamedTuple):
    """Task and settings of one process; `source` names the row whose checkpoint it starts from."""

    name: str
    settings: tuple[str, ...] = ()
    does: Literal["train", "overflow", "resume", "sample"] = "train"
    source: str = ""


class Scale(NamedTuple):
    """Amount of work: after `warmup` steps, time segments of `segment` steps; sample in two batch sizes."""

    settings: tuple[str, ...]
    steps: int
    warmup: int
    segment: int
    batches: tuple[int, int]
    sampling_steps: int
    matrix: int

    @property
    def saved_at(self) -> int:
        """Step of the only checkpoint of a run."""
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
    """Return all rows in running order, the slowest last."""
    bf16, fp16, fp32 = (f"trainer.precision={name}" for name in ("bf16-mixed", "16-mixed", "32-true"))
    several = sorted({2, 1 << (devices.bit_length() - 1)}) if devices > 1 else []  # powers of two divide the batch size
    return [
        Row(REFERENCE, (fp32,)),
        Row("32-true", (fp32,)),
        Row("bf16-mixed", (bf16,)),
        Row("16-mixed", (fp16,)),
        Row("bf16-true", ("trainer.precision=bf16-true",)),
        Row("bf16-mixed, gradient checkpointing", (bf16, "model.gradient_checkpointing=true")),
        Row("bf16-mixed, fsdp on 1", ("trainer=fsdp", bf16)),
        *(Row(f"bf16-mixed, ddp on {n}", ("trainer=ddp", bf16, f"trainer.devices={n}")) for n in several),
        *(Row(f"bf16-mixed, fsdp on {n}", ("trainer=fsdp", bf16, f"trainer.devices={n}")) for n in several),
        Row("sampling", (), "sample", "32-true"),
        Row("16-mixed, overflow", (fp16,), "overflow"),
        Row("32-true to bf16-mixed", (bf16,), "resume", "32-true"),
        Row("bf16-mixed to 32-true", (fp32,), "resume", "bf16-mixed"),
        Row("16-mixed to 32-true", (fp32,), "resume", "16-mixed"),
        Row("bf16-mixed, compile", (bf16, "compile=true")),
        Row("compiled to eager", (bf16,), "resume", "bf16-mixed, compile"),
    ]


class StepRecorder(L.Callback):
    """Record loss and gradient norm of each step, and seconds per step and peak memory of each segment.

    Must be the last callback. Synchronizes with the device between segments only, as training runs asynchronously.
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
        """Average the losses over the processes."""
        mean = trainer.strategy.reduce(torch.stack(self.losses), reduce_op="mean")
        assert isinstance(mean, Tensor)
        self.losses = list(mean)


def compose(name: str, settings: Sequence[str]) -> DictConfig:
    """Compose the configuration of a command."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return hydra.compose(name, list(settings))


def run_folder(parent: Path, name: str) -> Path:
    """Return the run folder of a row."""
    return parent / re.sub(r"\W+", "_", name)


def train(row: Row, scale: Scale, device: str, folder: Path) -> Results:
    """Train as `src.train` does, without the final pictures; resume or provoke an fp16 overflow as the row requires."""
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
        torch.backends.cudnn.allow_tf32 = False  # for convolutions; matrix products do not use it by default
    cfg = compose("train", settings)
    run = build(cfg)
    if row.does == "overflow":  # at scales 2^40 and 2^28, not at the usual 2^16
        scaler = torch.amp.GradScaler(device, init_scale=2.0**40, backoff_factor=2.0**-12)
        run.trainer.strategy.precision_plugin = MixedPrecision("16-mixed", device, scaler)
    recorder = StepRecorder(scale)
    run.trainer.callbacks.append(recorder)  # type: ignore[attr-defined]
    resume_from = run.resume_from and str(run.resume_from)
    run.trainer.fit(run.module, datamodule=run.data, ckpt_path=resume_from, weights_only=True)
    record = run.directory / "nonfinite.jsonl"
    recorded = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    metrics = {
        "first_step": recorder.first_step,
        "losses": [loss.item() for loss in recorder.losses],
        "val_loss": float(run.trainer.callback_metrics.get("val/loss", 0)),
        "skipped": sum(not norm.isfinite() for norm in recorder.norms),
        "recorded": len(recorded),
        "recorded_fp16": sum(bool(line["fp16_scale"]) for line in recorded),
        "ends_finite": bool(recorder.norms[-1].isfinite()),
        "weights": sorted(read_checkpoint(run.resume_from)["state_dict"]) if run.resume_from else [],
    }
    if row.does != "train":
        return metrics
    assert isinstance(run.module, DiffusionModule)
    return metrics | {
        "images_per_second": cfg.data.batch_size / statistics.median(recorder.seconds),
        "flops_per_image": flops_per_image(
            components.meta_network(cfg, run.module.diffusion.outputs), run.module.shape
        ),
        "devices": run.trainer.world_size,
        "peak": statistics.median(recorder.peaks) if recorder.peaks else None,
        "estimate": out_of_memory.step_memory(run),
    }


def flops_per_image(net: nn.Module, shape: Sequence[int]) -> int:
    """Return the FLOP of a forward and backward pass for one image, without recomputation."""
    net.gradient_checkpointing = False  # type: ignore[assignment]
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, *shape, device="meta"), torch.zeros(1, device="meta")).sum().backward()
    return int(counter.get_total_flops())


def sample(row: Row, scale: Scale, device: str, folder: Path) -> Results:
    """Open a run as `src.sample` does and sample by DDIM, in float32 and in bf16."""
    opened = open_run(str(run_folder(folder, row.source)), trust=True)
    module = opened.module.to(device)
    sampler = components.build_sampler(
        compose("sample", ["sampler=ddim", f"sampler.steps={scale.sampling_steps}"]).sampler
    )
    speeds, differences = {}, {}
    for name in ("32-true", "bf16-mixed"):
        configure_inference(opened, name, None)
        images = []
        for count in scale.batches:
            for _ in module.sample(range(count), 0, sampler._replace(steps=2)):
                pass
            start = now().wall
            *_, x = module.sample(range(count), 0, sampler)
            speeds[f"{name}, batch of {count}"] = count / (now().wall - start)
            images.append(opened.data.postprocess(x).cpu().int())
        few, many = images
        differences[name] = int((few - many[: len(few)]).abs().max())
    return {"speeds": speeds, "pixel_differences": differences}


def describe(device: str) -> Results:
    """Return the hardware and versions, and the speed of a product of large bf16 matrices."""
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
    """Return the vendor's peak FLOP/s in bf16 for a GPU name, None if it is unknown."""
    return next((1e12 * peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)


def output(*command: str) -> str:
    """Return the output of a command, or "unknown" if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def isolated(work: Callable[[], Results], log: Path, seconds: float) -> Results | str:
    """Run `work` in its own process and return its result or the reason of its failure; kill all its subprocesses.

    The process is forked, since imports take longer than most rows. The parent must not have initialized CUDA.
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
        except BaseException as error:  # includes SystemExit and Lightning's interrupts
            traceback.print_exc()
            send.send(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    process = context.Process(target=begin)
    process.start()
    assert process.pid is not None
    send.close()
    try:
        answer = receive.recv() if receive.poll(seconds) else f"timed out after {seconds:.0f} s"
    except EOFError:
        answer = "the process died"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    assert isinstance(answer, dict | str)
    return answer


def run_row(row: Row, device: str, devices: int, folder: Path) -> Results:
    """Run a row in this process and in those that Lightning starts for further devices."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(run_folder(folder, row.name) / "inductor")
    sys.argv[1:] = ["--row", row.name, "--folder", str(folder), "--device", device, "--devices", str(devices)]
    return (sample if row.does == "sample" else train)(row, CPU if device == "cpu" else GPU, device, folder)


def check_row(row: Row, metrics: Results, done: Mapping[str, Results], machine: Results) -> tuple[list[str], list[str]]:
    """Return the cells of a row, and its failures."""
    if row.does == "sample":
        differences = metrics["pixel_differences"]
        listed = ", ".join(f"{difference} of 255 in {name}" for name, difference in differences.items())
        wrong = differences["32-true"] > MAX_PIXEL_DIFFERENCE
        cells = [f"maximum pixel difference between small and large batches: {listed}"]
        return cells, ["samples depend on the batch size"] if wrong else []
    faults = []
    if not all(map(math.isfinite, [*metrics["losses"], metrics["val_loss"]])) or not metrics["ends_finite"]:
        faults.append("loss or gradient is not finite")
    if not metrics["skipped"] == metrics["recorded"] == metrics["recorded_fp16"]:
        faults.append(
            "{skipped} steps skipped, {recorded} recorded, {recorded_fp16} of them as fp16 overflows".format_map(
                metrics
            )
        )
    if row.does == "overflow":
        faults += [] if metrics["skipped"] else ["no step overflowed"]
        return ["{skipped} steps overflowed, {recorded_fp16} were skipped and recorded".format_map(metrics)], faults

    first, losses = metrics["first_step"], metrics["losses"]
    drift, reference = math.nan, row.source or REFERENCE
    late = -(len(losses) if first else len(losses) // 2)  # the second half of a full run, after it has learned
    if reference in done:
        drift = statistics.mean(losses[late:]) / statistics.mean(done[reference]["losses"][late:]) - 1
        if not abs(drift) <= TOLERANCE:
            faults.append(f"loss differs by {drift:+.1%} from {reference}")
    if row.does == "resume":
        names = [other["weights"] for other in done.values() if other.get("weights")]
        if first + len(losses) != len(done[row.source]["losses"]) or not first:
            faults.append("did not continue at the step of the checkpoint")
        if any(other != metrics["weights"] for other in names):
            faults.append("parameter names differ from those of other checkpoints")
        cells = [
            f"continued after step {first} with {len(metrics['weights'])} weights, loss {drift:+.2%} from {reference}"
        ]
        return cells, faults

    speed, peak, estimate = metrics["images_per_second"], metrics["peak"], metrics["estimate"]
    share, memory = "-", ["-", gib(estimate), "-", "-"]
    if peak:
        peak_share = speed * metrics["flops_per_image"] / metrics["devices"] / (machine["peak"] or machine["matmul"])
        ratio = peak / estimate
        within = abs(ratio - 1) <= MEMORY_TOLERANCE
        share, memory = f"{peak_share:.1%}", [gib(peak), gib(estimate), f"{ratio:.2f}", "yes" if within else "no"]
        # For a compiled network the estimate is an upper bound. Convolutions without TF32 need extra workspace.
        if not within and row.name != REFERENCE and not (ratio < 1 and "compile=true" in row.settings):
            faults.append(f"memory is {ratio:.2f} times its estimate")
    skipped = str(metrics["skipped"])
    deviation = "-" if math.isnan(drift) else f"{drift:+.2%}"
    return [f"{statistics.mean(losses[late:]):.4f}", deviation, skipped, f"{speed:.4g}", share, *memory], faults


def report(machine: Results, rows: Sequence[Row], results: Mapping[str, Results | str]) -> tuple[str, list[str]]:
    """Return the tables as Markdown, and all failures."""
    done = {name: metrics for name, metrics in results.items() if isinstance(metrics, dict)}
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
    stated = (
        f"{machine['peak'] / 1e12:.0f} stated by the vendor"
        if machine["peak"]
        else "used as the peak, which is unknown"
    )
    lines = [
        "{devices} x {name}, driver {driver}, torch {torch}, commit {commit}; ".format_map(machine)
        + f"product of bf16 matrices {machine['matmul'] / 1e12:.3g} TFLOP/s, {stated}.",
        f"Each run: `{' '.join(scale.settings)}`, {scale.steps} steps; the loss is that of the second half.",
        "",
        f"| run | loss | from {REFERENCE} | skipped steps | images/s | of bf16 peak | memory, GiB | estimate "
        "| ratio | within 15% |",
        *[f"|{'---|' * 10}", *training],
        *["", "| check | result |", "|---|---|", *checks],
        *["", f"| samples in {scale.sampling_steps} DDIM steps | images/s |", "|---|---|", *speeds],
        *["", *([f"- {line}" for line in wrong] or ["No failures."])],
    ]
    return "\n".join(lines), wrong


def check(device: str, devices: int | None, chosen: Sequence[str], budget: float, folder: Path) -> list[str]:
    """Run all rows, or those `chosen` and their sources, write the tables, and return all failures."""
    start = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    machine = isolated(partial(describe, device), folder / "machine.log", ROW_SECONDS)
    if isinstance(machine, str):
        print(f"failed: {machine} (see {folder / 'machine.log'})")
        return [machine]
    machine["devices"] = devices = devices or machine["devices"]
    rows = all_rows(devices)
    if unknown := set(chosen) - {row.name for row in rows}:
        sys.exit(f"error: --rows={sorted(unknown)} must be among {[row.name for row in rows]}")
    needed = {*chosen, REFERENCE, *(row.source for row in rows if row.name in chosen)}
    rows = [row for row in rows if not chosen or row.name in needed]
    results: dict[str, Results | str] = {}
    with tempfile.TemporaryDirectory(dir=folder, prefix="runs_") as runs_folder:  # gigabytes
        for row in rows:
            left = budget - (time.monotonic() - start)
            if row.source and not isinstance(results[row.source], dict):
                results[row.name] = f"not run: needs the checkpoint of {row.source}"
            elif left < MIN_SECONDS:
                results[row.name] = f"not run: the budget of {budget:.0f} s is spent"
            else:
                work = partial(run_row, row, machine["device"], devices, Path(runs_folder))
                log = run_folder(folder, row.name).with_suffix(".log")
                answer = isolated(work, log, min(ROW_SECONDS, left))
                over = isinstance(answer, str) and answer.startswith("timed out") and left < ROW_SECONDS
                cut = f"not completed: the budget of {budget:.0f} s is spent"
                results[row.name] = answer if isinstance(answer, dict) else cut if over else f"failed: {answer}"
            print(f"{time.monotonic() - start:4.0f} s  {row.name}", file=sys.stderr, flush=True)
    text, wrong = report(machine, rows, results)
    (folder / "table.md").write_text(f"{text}\n")
    (folder / "results.json").write_text(json.dumps({"machine": machine, "rows": results, "wrong": wrong}, indent=2))
    print(text)
    return wrong


def main() -> None:
    """Run all rows, or one row in a process that Lightning started."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--rows", nargs="+", default=[], metavar="NAME", help="rows to run; default: all")
    parser.add_argument("--budget", type=float, default=450, help="time limit of all rows in seconds")
    parser.add_argument("--folder", type=Path, help="output folder; default: outputs/gpu_check/<time>")
    parser.add_argument("--devices", type=int, help="number of GPUs; default: all")
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
