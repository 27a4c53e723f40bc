"""Decode a folder with one file per sample once, into one array of equal sizes in the cache."""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from src.data.array_files import (
    AUDIO_SUFFIXES,
    NIFTI_SUFFIXES,
    Sample,
    arrange,
    array_suffix,
    orientation,
    read_file,
    reorient,
)
from src.data.decoded import Array
from src.data.found_images import FoundImages
from src.data.image_source import check_readable
from src.data.pixel_store import check_space, default_cache_dir, fill_cache, store_key
from src.errors import DataReadError, format_override

log = logging.getLogger(__name__)


def decode_all(
    found: FoundImages,
    channels: int,
    size: tuple[int, ...],
    key: str | None,
    cache_dir: str | None,
    affine: Any = None,
) -> Path:
    """Decode all files once into the cache and return the folder with `samples.npy` and `about.json`.

    Volumes are turned to the axes of `affine`, or of the first file if it is None. Raises ValueError if the cache
    cannot be written, and DataReadError if no file can be read.
    """
    cache = default_cache_dir().with_name("arrays") if cache_dir is None else Path(cache_dir)
    affine = affine or _first_affine(found, key)
    axes = () if affine is None else (orientation(affine).tolist(),)
    folder = cache / store_key(found, (channels, size, key, *axes))
    write = partial(_decode_into, found=found, channels=channels, size=size, key=key, affine=affine)
    try:
        return _complete(folder) or fill_cache(folder, _complete, write)
    except OSError as error:
        setting = format_override("data.cache_dir", str(cache))
        raise ValueError(f"{setting} cannot hold the decoded files ({error}); set it to a folder with room") from error


def _complete(folder: Path) -> Path | None:
    return folder if (folder / "about.json").exists() else None


def _first_affine(found: FoundImages, key: str | None) -> Any:
    """Return the affine of the first file that can be read; None if it is not a NIfTI file."""
    for k, name in enumerate(found.names):
        if array_suffix(name) not in NIFTI_SUFFIXES:
            break
        with suppress(DataReadError):
            return read_file(found, k, key).header["affine"]
    return None


def _decode_into(
    folder: Path, found: FoundImages, channels: int, size: tuple[int, ...], key: str | None, affine: Any
) -> None:
    from tqdm import tqdm

    errors: dict[int, str] = {}
    out: Any = None
    low, high, header = np.inf, -np.inf, {}
    changes: Counter[str] = Counter()
    bar = tqdm(range(len(found)), "Decoding once", unit="file", disable=None if len(found) >= 512 else True)
    for k, (sample, reason) in zip(bar, _read_all(found, channels, size, key, affine), strict=True):
        if sample is not None and out is None:
            header = sample.header
            needed = len(found) * sample.values.nbytes
            log.info(f"Decoding {len(found):,} files once ({needed / 1e6:,.1f} MB in {folder.parent})")
            check_space(folder, needed)
            out = np.lib.format.open_memmap(
                folder / "samples.npy", "w+", sample.values.dtype, (len(found), *sample.values.shape)
            )
        if sample is not None and out is not None:
            if sample.values.dtype != out.dtype:
                reason = f"its values have type {sample.values.dtype}, and those of others {out.dtype}"
            elif sample.header.get("sample_rate") != header.get("sample_rate"):
                rates = sample.header.get("sample_rate"), header.get("sample_rate")
                reason = f"its sample rate is {rates[0]}, and that of others {rates[1]}"
            else:
                out[k] = sample.values
                if sample.header.get("subtype") != header.get("subtype"):
                    header = {key: value for key, value in header.items() if key != "subtype"}  # the most precise type
                changes.update(sample.changes)
                low, high = min(low, float(sample.values.min())), max(high, float(sample.values.max()))
        if reason:
            errors[k] = reason
    if out is None:
        check_readable(found, errors, 1.0, "files")  # raises, since none is left
    assert out is not None
    out.flush()
    about = {"low": low, "high": high, "header": header or None, "errors": errors, "changes": changes}
    (folder / "about.json").write_text(json.dumps(about))


def _read_all(
    found: FoundImages, channels: int, size: tuple[int, ...], key: str | None, affine: Any
) -> Iterator[tuple[Sample | None, str]]:
    """Yield each sample as (C, *size), or None and why it cannot be read or used."""
    for k in range(len(found)):
        try:
            sample = read_file(found, k, key)
            if affine is not None and "affine" in sample.header:
                sample = reorient(sample, affine)
            mixed = mix(found.names[k], sample.values, channels)
            values = arrange(Path("it"), mixed, channels, size, batched=False)
            header = fit_header(sample.header, values.shape[1:], size)
        except (DataReadError, ValueError) as error:
            yield None, str((error.__cause__ and " ".join(str(error.__cause__).split())) or error)
        else:
            changes = [*sample.changes, *(["mixed down"] if len(mixed) < len(sample.values) else [])]
            if values.shape[1:] != size:
                cut = "cut" if values.shape[1] > size[0] else "zero-padded"
                changes.append(cut if len(size) == 1 else "resampled")
            yield Sample(fit(values, size), header, changes), ""


def mix(name: str, values: Array, channels: int | None) -> Array:
    """Mix audio (C, L) down to (1, L) if `channels` is 1; return other data unchanged."""
    if array_suffix(name) in AUDIO_SUFFIXES and channels == 1 < len(values):
        mixed: Array = values.mean(0, keepdims=True).astype(values.dtype)
        return mixed
    return values


def fit(values: Array, size: tuple[int, ...]) -> Array:
    """Return values (C, *any size) as (C, *size): signals are cut or zero-padded, others resampled.

    Resampling averages if every side shrinks, and interpolates linearly otherwise. It keeps the data type.
    """
    if values.shape[1:] == size:
        return values
    if len(size) == 1:
        cut = values[:, : size[0]]
        return np.pad(cut, ((0, 0), (0, size[0] - cut.shape[1])))
    shrinks = all(n <= m for n, m in zip(size, values.shape[1:], strict=True))
    mode = "area" if shrinks else ("bilinear" if len(size) == 2 else "trilinear")
    x = torch.from_numpy(values.astype(np.float64))[None]
    resampled = F.interpolate(x, size, mode=mode)[0].numpy()
    return (np.rint(resampled) if values.dtype.kind in "biu" else resampled).astype(values.dtype)


def fit_header(header: Mapping[str, Any], before: Sequence[int], size: Sequence[int]) -> dict[str, Any]:
    """Return the header after resampling from the size `before` to `size`: the affine keeps the corners in place."""
    if "affine" not in header or tuple(before) == tuple(size):
        return dict(header)
    steps = np.array([m / n for m, n in zip(before, size, strict=True)])
    change = np.diag([*steps, 1.0])
    change[:3, 3] = (steps - 1) / 2
    return {"affine": (np.asarray(header["affine"]) @ change).tolist()}
