"""Compile networks, and run them in autocast precision."""

import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor, nn

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Lightning's names and the autocast type of each."""


def compile_network(net: nn.Module, mode: str | bool | None) -> Callable[..., Tensor] | None:
    """Return `net` compiled in a mode of torch.compile (true: default), once per input size; None without a mode.

    Weights, hooks and names stay those of `net`. Raises ValueError for another mode, or without a C++ compiler.
    """
    if not mode:
        return None
    mode = "default" if mode is True else mode
    if mode not in MODES:
        raise ValueError(f"compile={mode} must be true, false or a mode of torch.compile: {', '.join(MODES)}")
    check_compiler("compile")
    # By default the compiler leaves channels-last layout if any convolution has at least twice as many input as output
    # channels, as those after a skip connection do, and copies every input: a tenth of a step on a GPU.
    options = {**torch._inductor.list_mode_options(mode), "force_layout_optimization": True}
    # With dynamic shapes, a second batch size would make the code slower for all sizes.
    fast = torch.compile(net, options=options, dynamic=False)
    return lambda *inputs: fast(*inputs)  # a module would register its parameters a second time


def check_compiler(setting: str) -> None:
    """Raise ValueError if there is no C++ compiler, which the `setting` needs."""
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))):
        raise ValueError(f"{setting}=true needs a C++ compiler: install g++, or set {setting}=false")


def check_cuda_graphs(mode: str | bool | None, batches: int | str) -> None:
    """Raise ValueError for a mode with CUDA graphs and gradient accumulation over `batches` (a number or "auto").

    Replaying a graph overwrites its gradients.
    """
    if mode in ("reduce-overhead", "max-autotune") and batches != 1:
        raise ValueError(
            f"compile={mode} uses CUDA graphs, which cannot accumulate the gradients of {batches} batches: set "
            "compile=true, or trainer.accumulate_grad_batches=1 data.microbatch_size=null"
        )


def autocast_dtype(name: str) -> torch.dtype | None:
    """Return the autocast type of `precision=name`, None for none. Raises ValueError for unknown names."""
    if name not in PRECISIONS:
        raise ValueError(f"precision={name} must be one of {', '.join(PRECISIONS)}; bf16-mixed needs a recent GPU")
    return PRECISIONS[name]
