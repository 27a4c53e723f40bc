"""Sample by DDIM from the network in this folder: `python sample.py`. It needs torch only.

Source: Song et al. 2021 (arXiv 2010.02502), eq. 12 with eta = 0.
"""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parent


@torch.no_grad()
def sample(
    net: Callable[..., Tensor], info: dict[str, Any], noise: Tensor, cond: Tensor | None = None, steps: int = 50
) -> Tensor:
    """Return samples (N, *shape) from standard normal `noise` like them; `info` is network.json."""
    time, alpha, sigma, c_in, c_skip, c_out = info["levels"].values()
    rows = [round((len(time) - 1) * k / steps) - 1 for k in range(steps, -1, -1)]  # the last is -1, clean data
    conds = [] if cond is None else [cond]
    x: Tensor = noise * (alpha[rows[0]] ** 2 + sigma[rows[0]] ** 2) ** 0.5
    for t, s in pairwise(rows):
        out = net(c_in[t] * x, x.new_full((len(x),), time[t]), *conds)[:, : x.shape[1]]  # the rest is the variance
        x0 = clip(c_skip[t] * x + c_out[t] * out, info["clip_x0"], info["dynamic_threshold"])
        eps = (x - alpha[t] * x0) / sigma[t]
        x = alpha[s] * x0 + sigma[s] * eps
    return x


def clip(x0: Tensor, limit: float | None, quantile: float | None) -> Tensor:
    """Limit |x_0| to `limit`: by clamping, or where the quantile exceeds it by scaling."""
    if limit is None:
        return x0
    if quantile is None:
        return x0.clamp(-limit, limit)
    size = torch.quantile(x0.abs().flatten(1), quantile, dim=1).clamp(min=limit).view(-1, *[1] * (x0.ndim - 1))
    return x0.clamp(-size, size) * (limit / size)


if __name__ == "__main__":
    info = json.loads((FOLDER / "network.json").read_text())
    net = torch.export.load(FOLDER / "network.pt2").module()
    noise = torch.randn(16, *info["shape"], generator=torch.Generator().manual_seed(0))
    cond = None
    if info["cond"]:
        examples = torch.tensor(info["cond_examples"])
        cond = examples[torch.arange(len(noise)) % len(examples)]
    samples = sample(net, info, noise, cond)
    if info["decoder"]:
        with torch.no_grad():
            decode = torch.export.load(FOLDER / info["decoder"]).module()
            parts = [samples[k : k + 32] for k in range(0, len(samples), 32)]  # it takes at most 63
            samples = torch.cat([decode(part) for part in parts])
    torch.save(samples, FOLDER / "samples.pt")
    print(f"{len(samples)} samples of shape {tuple(samples.shape[1:])}: {FOLDER / 'samples.pt'}")
