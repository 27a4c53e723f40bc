"""A source of images in Hugging Face datasets: from the hub, or from a folder that their library reads."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
import torch

from src.data.decode import image_suffixes
from src.data.decoded import Pages
from src.data.encoded import ImageBytes, Names
from src.data.fit import Fit, ImageSpec, height_and_width
from src.data.folder import refuse_val_root
from src.data.image_source import ImageSource, open_images
from src.data.layout import SPLITS
from src.data.sources import Labels
from src.errors import counted, did_you_mean, first_names, format_override, one_line, optional_package

BATCH = 1000
"""Number of rows whose sizes are read at a time."""


def hub(
    root: str | None,
    image_size: int | Sequence[int],
    channels: int,
    prepare: bool = False,
    *,
    subset: str | None = None,
    revision: str | None = None,
    split: str | None = None,
    val_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    caption_column: str | None = None,
    streaming: bool = False,
    max_samples: int | None = None,
    fit: Fit = "crop",
    background: str = "white",
    pages: Pages = "first",
    value_range: Sequence[float] | None = None,
    skip_unreadable: bool | float = False,
    cache: bool = True,
    cache_dir: str | None = None,
    val_root: str | None = None,
) -> ImageSource:
    """Open the images of a dataset with their classes and captions.

    Args:
        root: `user/dataset` on the hub, or a folder: written by `Dataset.save_to_disk`, of Parquet files, of images,
            or in any other format of `datasets.load_dataset`.
        subset: the configuration of a dataset that has several.
        revision: the branch, tag or commit of the dataset.
        split, val_split: the splits for training and validation. None uses those with the usual names, and
            `data.val_fraction` if there is no validation split.
        image_column, label_column, caption_column: the columns to read. None uses the only column of images, of
            classes and of text.
        streaming: read the first `max_samples` of each split over the network, instead of downloading all files.
        max_samples: use only the first samples of each split, up to this number; None uses all.

    The other arguments are those of `src.data.folder.folder`; `val_root` must be None. Raises ValueError if the dataset
    cannot be opened, a column or split is unknown or ambiguous, the splits have the same images, or as `folder` does.
    """
    refuse_val_root(val_root, "leave it out, or set data.source.val_split")
    if root is None:
        raise ValueError("data.name=null is not a dataset; set data.name=user/dataset, or to a folder")
    if max_samples is not None and max_samples < 2:
        raise ValueError(f"data.source.max_samples={max_samples} must be at least 2")
    if streaming and max_samples is None:
        raise ValueError("data.source.streaming=true needs data.source.max_samples, the number of images to read")
    splits, key = _opened(root, partial(_open_splits, root, subset, revision, streaming, cache_dir))
    train, val = choose_splits(root, list(splits), split, val_split)
    chosen = [train] if val is None else [train, val]
    columns = choose_columns(root, splits[train].features, image_column, label_column, caption_column)
    parts = [
        _opened(root, partial(_first_rows, splits[name], f"{key} {name}", columns, max_samples, cache_dir))
        for name in chosen
    ]
    labels, about_labels = _labels(parts, columns, label_column)
    captions, about_captions = _captions(parts, columns, caption_column)
    found = _images(root, parts, chosen, columns)
    if found.repeats_training():
        raise ValueError(
            f"{format_override('data.name', root)} has the same images in its splits {' and '.join(chosen)}; set "
            "data.source.val_split to another one, or save the dataset with different splits"
        )
    about = f"; columns {', '.join(columns.used())}{columns.about}{about_labels}{about_captions}"
    if others := [name for name in splits if name not in chosen]:
        about += f"; splits that are not used: {', '.join(others)}"
    spec = ImageSpec(height_and_width(image_size), channels, fit, background, pages)
    return open_images(found, spec, labels, captions, value_range, skip_unreadable, cache, cache_dir, about)


class Columns(NamedTuple):
    """The columns to read; `about` reports ambiguous types of columns, which are not read."""

    image: str
    label: str | None
    caption: str | None
    about: str

    def used(self) -> list[str]:
        return list(dict.fromkeys(name for name in (self.image, self.label, self.caption) if name is not None))


def choose_splits(name: str, splits: Sequence[str], split: str | None, val_split: str | None) -> tuple[str, str | None]:
    """Return the names of the training and the validation split: as typed, or by the usual names in `SPLITS`.

    Raises ValueError for an unknown split, for a test split, and if the training split is ambiguous.
    """
    for setting, typed in (("split", split), ("val_split", val_split)):
        if typed is not None and typed not in splits:
            raise ValueError(
                f"{format_override(f'data.source.{setting}', typed)} is not a split of {name}; "
                f"{did_you_mean(typed, splits)}"
            )
        if typed is not None and SPLITS.get(typed.lower()) == "test":
            raise ValueError(
                f"{format_override(f'data.source.{setting}', typed)} is for testing; choose a split that is not"
            )
    role = {each: SPLITS.get(each.lower(), "other") for each in splits}
    candidates = [each for each in splits if role[each] == "train"] or [e for e in splits if role[e] == "other"]
    candidates = [each for each in candidates if each.lower() != "trainval"] or candidates
    if split is None and len(candidates) != 1:
        raise ValueError(
            f"data.source.split=null cannot choose between the splits of {name} ({', '.join(splits)}); set "
            "data.source.split to the one for training"
        )
    train = split or candidates[0]
    val = val_split or next((each for each in splits if role[each] == "validation" and each != train), None)
    if val == train:
        raise ValueError(f"data.source.val_split={val} must differ from the training split; leave it out, or change it")
    return train, val


def choose_columns(
    name: str, features: Mapping[str, Any] | None, image: str | None, label: str | None, caption: str | None
) -> Columns:
    """Return the columns to read: as typed, or the only one of each type.

    Raises ValueError for an unknown column, and unless there is exactly one column of images.
    """
    from datasets import ClassLabel, Image

    if not features:
        raise ValueError(
            f"{format_override('data.name', name)} does not declare its columns; leave out data.source.streaming"
        )
    for setting, typed in (("image_column", image), ("label_column", label), ("caption_column", caption)):
        if typed is not None and typed not in features:
            raise ValueError(
                f"{format_override(f'data.source.{setting}', typed)} is not a column of {name}; "
                f"{did_you_mean(typed, list(features))}"
            )
    free = {each: feature for each, feature in features.items() if each not in (image, label, caption)}
    of_type = {
        "image": [each for each, feature in free.items() if isinstance(feature, Image)],
        "label": [each for each, feature in free.items() if isinstance(feature, ClassLabel)],
        "caption": [each for each, feature in free.items() if _is_text(feature)],
    }
    if image is None and len(of_type["image"]) != 1:
        several = ", ".join(of_type["image"] or features)
        raise ValueError(
            f"data.source.image_column=null needs exactly one column of images in {name}, found "
            f"{len(of_type['image'])}; set data.source.image_column to one of {several}"
        )
    about = ""
    for kind, setting, typed in (("classes", "label", label), ("text", "caption", caption)):
        if typed is None and len(of_type[setting]) > 1:
            listed = first_names(of_type[setting])
            about += f"; several columns of {kind} ({listed}): none is used without data.source.{setting}_column"
    only = {kind: names[0] if len(names) == 1 else None for kind, names in of_type.items()}
    return Columns(image or of_type["image"][0], label or only["label"], caption or only["caption"], about)


def _is_text(feature: Any) -> bool:
    """Return whether a column holds a text, or a list of texts."""
    inner = getattr(feature, "feature", None)
    return any(getattr(each, "dtype", None) in ("string", "large_string") for each in (feature, inner))


def _opened(name: str, read: Callable[[], Any]) -> Any:
    """Call `read` and return its result. Raises a one-line ValueError if the library cannot open the dataset."""
    with optional_package("data=hub", "datasets"):
        import datasets  # noqa: F401
    try:
        return read()
    except Exception as error:  # the library and its network layer raise almost anything
        raise ValueError(
            f"{format_override('data.name', name)} cannot be opened ({one_line(error)}); check the name and "
            "the network, or set data.name to the folder of a saved dataset"
        ) from error


def _open_splits(
    name: str, subset: str | None, revision: str | None, streaming: bool, cache_dir: str | None
) -> tuple[dict[str, Any], str]:
    """Return the library's dataset of each split, and a cache key for streaming; it is empty otherwise."""
    from datasets import Dataset, load_dataset, load_dataset_builder, load_from_disk

    folder = Path(name).expanduser()
    if any((folder / each).is_file() for each in ("dataset_dict.json", "state.json")):
        opened, key = load_from_disk(folder), ""
    else:
        place = str(folder.resolve()) if folder.is_dir() else name
        options = {"cache_dir": _library_cache(cache_dir), "revision": None if folder.is_dir() else revision}
        if streaming:
            builder = load_dataset_builder(place, subset, **options)
            opened, key = builder.as_streaming_dataset(), f"{place} {builder.cache_dir}"
        else:
            opened, key = load_dataset(place, subset, **options), ""
    return {str(opened.split or "train"): opened} if isinstance(opened, Dataset) else dict(opened), key


def _library_cache(cache_dir: str | None) -> str | None:
    """Return the folder for files of the library; None is its own default."""
    return None if cache_dir is None else str(Path(cache_dir) / "hub")


def _first_rows(dataset: Any, key: str, columns: Columns, max_samples: int | None, cache_dir: str | None) -> Any:
    """Return the first rows of a split with the columns to read, with images as bytes."""
    from datasets import Dataset, Image

    dataset = dataset.select_columns(columns.used()).cast_column(columns.image, Image(decode=False))
    if isinstance(dataset, Dataset):
        return dataset if max_samples is None else dataset.select(range(min(max_samples, len(dataset))))
    assert max_samples is not None
    return Dataset.from_generator(
        partial(_take, dataset, max_samples),
        features=dataset.features,
        cache_dir=_library_cache(cache_dir),
        fingerprint=sha256(repr((key, columns, max_samples)).encode()).hexdigest()[:16],
    )


def _take(stream: Any, count: int) -> Any:
    yield from stream.take(count)


def _images(name: str, parts: Sequence[Any], splits: Sequence[str], columns: Columns) -> ImageBytes:
    """Return the images of the splits, without reading them."""
    parts = [dataset.select_columns([columns.image]) for dataset in parts]
    ids: list[str] = []
    suffixes: list[str] = []
    sizes: list[int] = []
    for dataset, split in zip(parts, splits, strict=True):
        ids += [f"{split}/{row}" for row in range(len(dataset))]
        for size, path in _sizes_and_paths(dataset, columns.image):
            suffix = PurePath(path or "").suffix.lower()
            suffixes.append(suffix if suffix in image_suffixes() else "")
            sizes.append(size)
    held_out = np.repeat([False, True][: len(parts)], [len(dataset) for dataset in parts])
    return ImageBytes(
        place=f"of {name}",
        key=f"hub {[dataset._fingerprint for dataset in parts]} {columns.image}",
        names=Names(map("".join, zip(ids, suffixes, strict=True))),
        sample_ids=Names(ids),
        sizes=np.array(sizes, np.int64),
        read=partial(_read, parts, columns.image),
        val_mask=held_out if len(parts) > 1 else None,
    )


def _sizes_and_paths(dataset: Any, column: str) -> list[tuple[int, str | None]]:
    """Return the number of bytes and the original file of each image, without reading the images."""
    import pyarrow.compute as pc

    found: list[tuple[int, str | None]] = []
    for batch in dataset.with_format("arrow").iter(BATCH):
        images = batch.column(column)
        sizes = pc.binary_length(pc.struct_field(images, "bytes")).to_pylist()
        paths = pc.struct_field(images, "path").to_pylist()
        for size, path in zip(sizes, paths, strict=True):
            inside = size is not None or path is None or not Path(path).is_file()
            found.append((size or 0 if inside else Path(path).stat().st_size, path))
    return found


def _read(parts: Sequence[Any], column: str, row: int) -> bytes:
    """Return the bytes of an image. Raises ValueError if the dataset has none in this row."""
    dataset, k = (parts[0], row) if row < len(parts[0]) else (parts[1], row - len(parts[0]))
    image = dataset[k][column]
    if image is None or (image["bytes"] is None and image["path"] is None):
        raise ValueError("the row has no image")
    contents: bytes = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
    return contents


def _values(parts: Sequence[Any], column: str) -> list[Any]:
    """Return the values of a column in all splits."""
    tables = [dataset.select_columns([column]).with_format("arrow")[:] for dataset in parts]
    return [value for table in tables for value in table.column(column).to_pylist()]


def _labels(parts: Sequence[Any], columns: Columns, typed: str | None) -> tuple[Labels | list[str] | None, str]:
    """Return the class of each image, and what to say about them.

    Raises ValueError if the typed column has empty cells or numbers that are not whole.
    """
    if columns.label is None:
        return None, ""
    from datasets import ClassLabel

    values, feature = _values(parts, columns.label), parts[0].features[columns.label]
    missing = sum(value is None or (isinstance(feature, ClassLabel) and value < 0) for value in values)
    if missing and typed is None:
        return None, f"; {counted(missing, 'image')} without {columns.label}, so it is not used"
    if missing or not all(isinstance(value, int | str) for value in values):
        found = f"{missing:,} of {len(values):,} are empty" if missing else f"the first has {values[0]!r:.60}"
        raise ValueError(
            f"{format_override('data.source.label_column', columns.label)} must have a name or a whole number for each "
            f"image, and {found}; choose another column"
        )
    if isinstance(feature, ClassLabel):
        names = [list(part.features[columns.label].names) for part in parts]
        if any(each != names[0] for each in names):  # the splits number their classes differently
            which = np.repeat(np.arange(len(parts)), [len(part) for part in parts]).tolist()
            return [names[part][value] for part, value in zip(which, values, strict=True)], ""
        return Labels(torch.tensor(values, dtype=torch.int64), list(feature.names)), ""
    return [str(value) for value in values], ""


def _captions(parts: Sequence[Any], columns: Columns, typed: str | None) -> tuple[list[list[str]] | None, str]:
    """Return the captions of each image, and what to say about them.

    Raises ValueError if the typed column has empty cells, or other values than texts.
    """
    if columns.caption is None:
        return None, ""
    captions = []
    for value in _values(parts, columns.caption):
        texts = value if isinstance(value, list) else [value]
        captions.append([text.strip() for text in texts if isinstance(text, str) and text.strip()])
    missing = sum(not texts for texts in captions)
    if missing and typed is None:
        return None, f"; {counted(missing, 'image')} without {columns.caption}, so it is not used"
    if missing:
        raise ValueError(
            f"{format_override('data.source.caption_column', columns.caption)} must have a text for each image, and "
            f"{missing:,} of {len(captions):,} are empty; choose another column"
        )
    return captions, ""
