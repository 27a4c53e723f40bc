"""Write a network to files that torch, or onnxruntime, runs without this project."""

import copy
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from src.diffusion.gaussian_diffusion import GaussianDiffusion
from src.diffusion.noise import CLEAN, NoiseLevel, Schedule
from src.errors import one_line
from src.models.winograd import Conv3x3

Format = Literal["torch_export", "aot", "onnx"]
FILES: dict[Format, str] = {"torch_export": "network.pt2", "aot": "network_compiled.pt2", "onnx": "network.onnx"}
INPUTS = ("x", "time", "cond")
TOLERANCE = 1e-4

CONDITIONS = {
    "src.data.conditions.Classes": "index into config.conditioning.encode.names; their number is the empty class",
    "src.data.conditions.Continuous": "values of config.conditioning.encode.names minus its mean over its std, or NaN",
    "src.data.text.Tokens": "1, then the ids by the tokenizer config.conditioning.encode.tokenizer of the lowercase "
    "text plus 3, then 2, then 0 as padding",
    "src.data.pretrained.Pretrained": "last hidden states of the text encoder config.conditioning.encode.model, then "
    "rows of 0 as padding",
}
"""What the input `cond` is, by the `_target_` of config.conditioning.encode."""


def trace(net: nn.Module, inputs: tuple[Tensor, ...], max_batch: int | None = None) -> ExportedProgram:
    """Return the program of a network for `inputs`, each (B, ...), with any B up to `max_batch`.

    Raises ValueError if the network cannot be traced, as with control flow that depends on values.
    """
    net = copy.deepcopy(net)
    for module in net.modules():
        if isinstance(module, Conv3x3):
            module.backend = "torch"  # the other algorithm is for training on CPUs
    batch = Dim("batch", min=1, max=max_batch)
    try:
        with torch.no_grad():
            return torch.export.export(net, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))
    except Exception as error:  # torch raises many kinds
        raise ValueError(
            f"torch.export cannot trace {type(net).__name__} ({one_line(error)}); change model.*, or use another format"
        ) from error


def example_inputs(shape: Sequence[int], conditions: Tensor | None, batch: int) -> tuple[Tensor, ...]:
    """Return x (B, *shape), time (B,) in (0, 1) and, if there are `conditions` (N, ...), B of them."""
    x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))
    index = torch.arange(batch)
    time = (index + 0.5) / batch
    return (x, time) if conditions is None else (x, time, conditions[index % len(conditions)])


def describe_network(
    diffusion: GaussianDiffusion, schedule: Schedule, shape: Sequence[int], config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what a person needs to sample, as plain values. `config` has the settings of the model.

    `levels` has a row for each step of the schedule, and clean data in the last row. The prediction of x_0 is
    c_skip x_t + c_out out, where out is the output of the network at c_in x_t and `time`.
    """
    conditioning = config.get("conditioning")
    encoder = conditioning and conditioning["encode"]["_target_"]
    return {
        "x": f"float32 (B, {', '.join(map(str, shape))}), c_in x_t with x_t = alpha x_0 + sigma eps",
        "time": "float32 (B,) in [0, 1], see levels",
        "cond": encoder and CONDITIONS.get(encoder, f"as {encoder} encodes it"),
        "output": diffusion.prediction
        + (f" in the first half of the channels, {diffusion.variance} in the other" if diffusion.outputs == 2 else ""),
        "shape": list(shape),
        "clip_x0": diffusion.clip_x0,
        "dynamic_threshold": diffusion.dynamic_threshold,
        "levels": _level_table(diffusion, schedule),
        "config": config,
    }


def _level_table(diffusion: GaussianDiffusion, schedule: Schedule) -> dict[str, list[float]]:
    u = torch.arange(1, schedule.num_steps + 1, dtype=torch.float64) / schedule.num_steps
    t = NoiseLevel(*(torch.stack(values)[:, None] for values in zip(*schedule.at(u), CLEAN, strict=True)))
    ones = torch.ones_like(t.alpha)
    out = ones.expand(-1, diffusion.outputs)
    columns = {
        "time": t.time,
        "alpha": t.alpha,
        "sigma": t.sigma,
        "c_in": diffusion.scale_input(ones, t),
        # x_0 is linear in x_t and out.
        "c_skip": diffusion.interpret(0 * out, ones, t, clipped=False).x0,
        "c_out": diffusion.interpret(out, 0 * ones, t, clipped=False).x0,
    }
    return {name: column.flatten().tolist() for name, column in columns.items()}


def write_network(
    folder: Path,
    name: Format,
    program: ExportedProgram,
    net: nn.Module,
    check: Sequence[tuple[Tensor, ...]],
    part: str = "network",
) -> Path:
    """Write the program of `net` into `folder` and return its file, if it computes what `net` does for inputs `check`.

    `part` is the stem of the name of the file. A network takes as many of the inputs as its program.

    Raises ValueError, and removes the file, if the outputs differ.
    """
    path = folder / FILES[name].replace("network", part)
    run: Callable[..., Tensor]
    match name:
        case "torch_export":
            with warnings.catch_warnings():
                # Weights in channels-last layout are not contiguous, but are saved completely.
                warnings.filterwarnings("ignore", "No complete tensor found")
                torch.export.save(program, path)
            run = torch.export.load(path).module()
        case "aot":
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
            run = torch._inductor.aoti_load_package(str(path))
        case "onnx":
            run = _write_onnx(path, program)
    for inputs in check:
        inputs = inputs[: len(program.graph_signature.user_inputs)]
        with torch.no_grad():
            ours, theirs = net(*inputs), run(*inputs)
        if not torch.allclose(theirs, ours, rtol=TOLERANCE, atol=TOLERANCE):
            for file in folder.glob(f"{path.name}*"):
                file.unlink()
            raise ValueError(
                f"format={name}: the outputs of {path.name} differ by {(ours - theirs).abs().max():.2g} for a batch of "
                f"{len(ours)}, so it was removed; use another format"
            )
    return path


def write_guide(folder: Path, name: Format, info: Mapping[str, Any]) -> Path:
    """Write `network.json`, and a script that samples with it; return the script."""
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in info.items()]  # a table in a line
    (folder / "network.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    script = Path(__file__).with_name("sample_onnx.py" if name == "onnx" else "sample_torch.py")
    return Path(shutil.copyfile(script, folder / "sample.py"))


def _write_onnx(path: Path, program: ExportedProgram) -> Callable[..., Tensor]:
    import onnxruntime

    for library in ("onnx_ir", "onnxscript"):
        logging.getLogger(library).setLevel(logging.WARNING)  # hundreds of lines about simplifications
    names = INPUTS[: len(program.graph_signature.user_inputs)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(program, dynamo=True, verbose=False, input_names=names, output_names=["output"])
    assert exported is not None
    exported.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> Tensor:
        values = {name: each.numpy() for name, each in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, values)[0])

    return run
