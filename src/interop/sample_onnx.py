"""Sample by DDIM from the network in this folder: `python sample.py`. It needs numpy and onnxruntime.

Source: Song et al. 2021 (arXiv 2010.02502), eq. 12 with eta = 0.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FOLDER = Path(__file__).parent
Array = npt.NDArray[Any]


def sample(net: Any, info: dict[str, Any], noise: Array, cond: Array | None = None, steps: int = 50) -> Array:
    """Return samples (N, *shape) from standard normal `noise` like them; `info` is network.json."""
    time, alpha, sigma, c_in, c_skip, c_out = info["levels"].values()
    rows = [round((len(time) - 1) * k / steps) - 1 for k in range(steps, -1, -1)]  # the last is -1, clean data
    inputs = {} if cond is None else {"cond": cond}
    x: Array = noise.astype(np.float32) * (alpha[rows[0]] ** 2 + sigma[rows[0]] ** 2) ** 0.5
    for t, s in pairwise(rows):
        inputs |= {"x": c_in[t] * x, "time": np.full(len(x), time[t], np.float32)}
        out = net.run(None, inputs)[0][:, : x.shape[1]]  # the rest is the variance
        x0 = clip(c_skip[t] * x + c_out[t] * out, info["clip_x0"], info["dynamic_threshold"])
        eps = (x - alpha[t] * x0) / sigma[t]
        x = alpha[s] * x0 + sigma[s] * eps
    return x


def clip(x0: Array, limit: float | None, quantile: float | None) -> Array:
    """Limit |x_0| to `limit`: by clamping, or where the quantile exceeds it by scaling."""
    if limit is None:
        return x0
    if quantile is None:
        return x0.clip(-limit, limit)
    size = np.quantile(np.abs(x0), quantile, axis=tuple(range(1, x0.ndim)), keepdims=True).clip(min=limit)
    return (x0.clip(-size, size) * (limit / size)).astype(np.float32)


if __name__ == "__main__":
    import onnxruntime

    info = json.loads((FOLDER / "network.json").read_text())
    net = onnxruntime.InferenceSession(FOLDER / "network.onnx")
    noise = np.random.default_rng(0).standard_normal((16, *info["shape"]))
    cond = None
    if info["cond"]:
        examples = np.array(info["cond_examples"])
        examples = examples if examples.dtype.kind == "i" else examples.astype(np.float32)
        cond = examples[np.arange(len(noise)) % len(examples)]
    samples = sample(net, info, noise, cond)
    if info["decoder"]:
        decoder = onnxruntime.InferenceSession(FOLDER / info["decoder"])
        parts = [samples[k : k + 32] for k in range(0, len(samples), 32)]  # it takes at most 63
        samples = np.concatenate([decoder.run(None, {"x": part})[0] for part in parts])
    np.save(FOLDER / "samples.npy", samples)
    print(f"{len(samples)} samples of shape {tuple(samples.shape[1:])}: {FOLDER / 'samples.npy'}")
