"""What makes the network faster and leaves the mathematics as it is: compilation, and products in half precision."""

import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor, nn

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""In which type the network's products are computed, by the names that Lightning has for it."""


def compiled(net: nn.Module, mode: str | bool | None) -> Callable[..., Tensor] | None:
    """`net` compiled for each size of input by itself, in a mode of torch.compile (true: default); None without one.

    Its weights, hooks and names stay those of `net`. Raises ValueError for another mode, or without a C++ compiler.
    """
    if not mode:
        return None
    mode = "default" if mode is True else mode
    if mode not in MODES:
        raise ValueError(f"compile={mode} is no way to compile: true, or a mode of torch.compile, {', '.join(MODES)}")
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))):
        raise ValueError("compile=true needs a C++ compiler and there is none: install g++, or leave it out")
    # Left to itself the compiler takes channels last for slow if any convolution has twice as many channels going in as
    # out, as those after a skip connection have, and copies what goes into each: a tenth of a step on a GPU.
    options = {**torch._inductor.list_mode_options(mode), "force_layout_optimization": True}
    # Where sizes may vary, a second one has the compiler make slower code for all.
    fast = torch.compile(net, options=options, dynamic=False)
    return lambda *inputs: fast(*inputs)  # no module, whose weights would be found a second time


def check_graphs(mode: str | bool | None, batches: int | str) -> None:
    """Raise ValueError if a mode that replays CUDA graphs is to add up gradients, which do not outlive the next pass.

    Of so many batches, or "auto".
    """
    if mode in ("reduce-overhead", "max-autotune") and batches != 1:
        raise ValueError(
            f"compile={mode} replays CUDA graphs, which cannot add up the gradients of {batches} batches: use "
            "compile=true, or trainer.accumulate_grad_batches=1 data.microbatch_size=null"
        )


def product_dtype(name: str) -> torch.dtype | None:
    """The type that `precision=name` computes products in; None for the weights' own. Raises ValueError for another."""
    if name not in PRECISIONS:
        raise ValueError(f"precision={name} is none of {', '.join(PRECISIONS)}: bf16-mixed is for recent GPUs")
    return PRECISIONS[name]
