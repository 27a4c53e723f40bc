"""The rules of thumb of `src.doctor`."""

import warnings
from itertools import product

import numpy as np

from src.data.decoded import Decoded
from src.runs.advice import expectation, file_stats, suggest, suggest_steps


def decoded(*shape: int, alpha: bool = False, rgb: bool = True, dtype: str = "uint8") -> Decoded:
    pixels = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    return Decoded(pixels, alpha, rgb, (shape[1], shape[0]))


def test_channels_follow_the_files():
    """Opacity is kept if it is used; bands are kept."""
    assert file_stats([decoded(40, 50, 3)] * 3).suggested_channels == 3
    assert file_stats([decoded(40, 50, 4, alpha=True)]).suggested_channels == 4
    opaque = decoded(40, 50, 4, alpha=True)
    opaque.pixels[..., 3] = 255
    assert file_stats([opaque]).suggested_channels == 3
    assert file_stats([decoded(40, 50, 4, rgb=False)]).suggested_channels == 4
    assert file_stats([decoded(40, 50, 12, rgb=False, dtype="uint16")]).suggested_channels == 12


def test_sizes_are_powers_of_two_within_limits():
    """Below the files and the limit of the device."""
    large = file_stats([decoded(500, 300, 3)])
    assert (large.suggested_size(on_gpu=True), large.suggested_size(on_gpu=False)) == (256, 32)
    assert file_stats([decoded(63, 90, 3)]).suggested_size(on_gpu=True) == 32


def test_suggestions_follow_size_and_number():
    assert "experiment=folder_256" in suggest((256, 256), 5000, on_gpu=True)
    assert "snr_shift=0.5" in suggest((128, 128), 5000, on_gpu=True)
    assert {"model=unet_patched", "data.batch_size=16"} <= {*suggest((32, 32), 70, on_gpu=False)}
    assert "data.batch_size=2" in suggest((32, 32), 2, on_gpu=False)
    assert suggest_steps(10**6, on_gpu=False, seconds=2.0) == 1800
    assert "data.flip" in expectation(50, flipped=False) and "data.flip" in expectation(500, flipped=False)
    assert "data.flip" not in expectation(50, flipped=True) + expectation(500, flipped=True)


def test_suggested_networks_have_their_attention():
    """Without a warning about `model.attention_resolutions`."""
    from hydra.utils import instantiate

    from tests.conftest import compose

    for on_gpu, size in product((False, True), (8, 16, 32)):
        words = [each for each in suggest((size, size), 5000, on_gpu) if each.startswith("model")]
        cfg = compose("train", "data=folder", "data.root=x", f"data.image_size={size}", *words, "run_dir=x")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            instantiate(cfg.model, channels=3, image_size=size, model_channels=32)
