"""Datasets of the Hugging Face library on disk: pixels, classes, captions, splits and errors."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image

from src.data import pixel_store
from src.runs.nodes import inline_aliases
from tests.conftest import compose

datasets = pytest.importorskip("datasets")

SHAPE = (6, 8)


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not during collection."""
    global hub
    from src.data.hub import hub


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """Fail at once instead of trying the network, and show no progress."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, *SHAPE, 3), dtype=np.uint8))


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def dataset(images: list[np.ndarray], **columns: list[object]):
    """Return a dataset of PNG images with an order of classes that is not the alphabet's."""
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat", "bird"])}
    features["text"] = datasets.Value("string")
    given = {"label": [k % 2 for k in range(len(images))], "text": [f"picture {k}" for k in range(len(images))]}
    values = {"image": [{"bytes": png(image), "path": None} for image in images], **given, **columns}
    known = {name: features.get(name) or datasets.Value("string") for name in values}
    return datasets.Dataset.from_dict(values, features=datasets.Features(known))


def opened(root: Path, **options: object):
    return hub(str(root), SHAPE, 3, cache_dir=str(root.parent / "cache"), **options)


def pixels(source) -> np.ndarray:
    """Return all images (N, H, W, C)."""
    return source.fetch(range(len(source))).permute(0, 2, 3, 1).numpy()


def saved(root: Path) -> list[np.ndarray]:
    """Save a dataset with three splits; return the images for training and validation."""
    train, val = pictures(5), pictures(2, seed=1)
    parts = {"train": dataset(train), "validation": dataset(val), "test": dataset(pictures(3, seed=2))}
    datasets.DatasetDict(parts).save_to_disk(root)
    return [*train, *val]


def parquet(root: Path) -> list[np.ndarray]:
    """Write Parquet files with the names of splits, as on the hub."""
    train, val = pictures(5), pictures(2, seed=1)
    root.mkdir(parents=True)
    for name, images in (("train", train), ("validation", val), ("test", pictures(3, seed=2))):
        dataset(images).to_parquet(root / f"{name}-00000-of-00001.parquet")
    return [*train, *val]


@pytest.mark.parametrize("write", [saved, parquet])
def test_a_dataset_keeps_pixels_classes_captions_and_splits(tmp_path, write):
    """The classes keep the order of the dataset, and test images are not used."""
    images = write(tmp_path / "data")
    source = opened(tmp_path / "data")
    assert np.array_equal(pixels(source), images)
    assert source.labels.classes == ["dog", "cat", "bird"]
    assert source.labels.targets.tolist() == [0, 1, 0, 1, 0, 0, 1]
    assert source.captions == [[f"picture {k}"] for k in (0, 1, 2, 3, 4, 0, 1)]
    assert source.val_mask.tolist() == [False] * 5 + [True] * 2
    assert list(source.ids) == [f"train/{k}" for k in range(5)] + ["validation/0", "validation/1"]
    assert list(source.stamps()) == [len(png(image)) for image in images]
    assert all(part in source.summary for part in ("columns image, label, text", "not used: test"))


def test_a_streamed_dataset_takes_its_first_samples(tmp_path):
    images = parquet(tmp_path / "data")
    source = opened(tmp_path / "data", streaming=True, max_samples=3)
    assert np.array_equal(pixels(source), [*images[:3], *images[5:]])
    assert source.labels.targets.tolist() == [0, 1, 0, 0, 1]
    assert np.array_equal(pixels(opened(tmp_path / "data", max_samples=3)), pixels(source))
    assert len(opened(tmp_path / "data", streaming=True, max_samples=4)) == 6


@pytest.mark.parametrize("streaming", [False, True])
def test_changed_files_are_read_again(tmp_path, streaming):
    options = {"streaming": streaming, "max_samples": 4}
    (tmp_path / "data").mkdir()
    for seed in (0, 1):
        dataset(pictures(4, seed)).to_parquet(tmp_path / "data" / "train.parquet")
        assert np.array_equal(pixels(opened(tmp_path / "data", **options)), pictures(4, seed))


def test_a_folder_of_images_has_its_classes(tmp_path):
    """As the library reads it: the folders are the classes."""
    images = pictures(3)
    for name, image in zip(("cats/a.png", "cats/b.png", "dogs/c.png"), images, strict=True):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "data" / name)
    source = opened(tmp_path / "data")
    assert np.array_equal(pixels(source), images)
    assert [source.labels.classes[k] for k in source.labels.targets] == ["cats", "cats", "dogs"]
    assert source.val_mask is None and source.captions is None
    assert source.suffix == ".png"


def test_columns_are_chosen_by_name(tmp_path):
    """Numbers become classes in their order, and bytes without a declared type are images."""
    images = pictures(3)
    features = datasets.Features(
        {
            **{name: datasets.Image() for name in ("photo", "mask")},
            "size": datasets.Value("int64"),
            **{name: datasets.Value("string") for name in ("title", "url")},
        }
    )
    encoded = [{"bytes": png(image), "path": "x.png"} for image in images]
    columns = {"photo": encoded, "mask": encoded[::-1], "size": [10, 9, 10], "title": list("abc"), "url": list("def")}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "data")
    source = opened(tmp_path / "data", image_column="photo", label_column="size", caption_column="title")
    assert np.array_equal(pixels(source), images)
    assert [source.labels.classes[k] for k in source.labels.targets] == ["10", "9", "10"]
    assert source.labels.classes == ["9", "10"]
    assert source.captions == [["a"], ["b"], ["c"]]
    source = opened(tmp_path / "data", image_column="mask")
    assert np.array_equal(pixels(source), images[::-1])
    assert source.labels is None and source.captions is None
    assert "title, url" in source.summary
    assert "data.source.image_column" in refusal(tmp_path / "data")
    raw = datasets.Features({"image": datasets.Value("binary")})
    datasets.Dataset.from_dict({"image": [each["bytes"] for each in encoded]}, features=raw).save_to_disk(
        tmp_path / "raw"
    )
    assert np.array_equal(pixels(opened(tmp_path / "raw", image_column="image")), images)


def refusal(root: Path, **options: object) -> str:
    with pytest.raises(ValueError) as error:
        opened(root, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_unknown_columns_and_splits_are_refused(tmp_path):
    saved(tmp_path / "data")
    for setting in ("image_column", "label_column", "caption_column"):
        message = refusal(tmp_path / "data", **{setting: "imag"})
        assert f"data.source.{setting}=imag" in message and "image" in message
    for setting in ("split", "val_split"):
        message = refusal(tmp_path / "data", **{setting: "trian"})
        assert f"data.source.{setting}=trian" in message and "train" in message
        assert f"data.source.{setting}=test" in refusal(tmp_path / "data", **{setting: "test"})
    assert "data.source.val_split=train" in refusal(tmp_path / "data", val_split="train")
    assert "data.source.max_samples" in refusal(tmp_path / "data", streaming=True)
    assert "data.source.max_samples=1" in refusal(tmp_path / "data", max_samples=1)


@pytest.mark.parametrize("kind", ["saved", "link", "copy"])
def test_splits_with_the_same_images_are_refused(tmp_path, kind):
    """Also if one is a link to the other."""
    folder = tmp_path / "data"
    if kind == "saved":
        datasets.DatasetDict(train=dataset(pictures(4))).save_to_disk(folder)
        (folder / "validation").symlink_to(folder / "train")
        (folder / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    else:
        folder.mkdir()
        dataset(pictures(4)).to_parquet(folder / "train.parquet")
        if kind == "link":
            (folder / "validation.parquet").symlink_to(folder / "train.parquet")
        else:
            shutil.copy(folder / "train.parquet", folder / "validation.parquet")
    assert "data.source.val_split" in refusal(folder)


def test_splits_with_images_of_equal_sizes_are_accepted(tmp_path):
    images = pictures(8)
    splits = {}
    for k, name in enumerate(["train", "validation"]):
        files = [io.BytesIO() for _ in range(4)]
        for file, image in zip(files, images[4 * k :], strict=False):
            Image.fromarray(image).save(file, "BMP")
        rows = {"image": [{"bytes": file.getvalue(), "path": None} for file in files]}
        splits[name] = datasets.Dataset.from_dict(rows, features=datasets.Features(image=datasets.Image()))
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "data")
    source = opened(tmp_path / "data")
    assert np.array_equal(source.fetch(range(8)).permute(0, 2, 3, 1).numpy(), images)
    assert source.val_mask.tolist() == [False] * 4 + [True] * 4


def test_splits_of_other_names_are_chosen_by_name(tmp_path):
    """Without a choice, the only split that is not for testing is used."""
    parts = {"full": dataset(pictures(3)), "test": dataset(pictures(2))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "one")
    assert len(opened(tmp_path / "one")) == 3
    datasets.DatasetDict({"a": parts["full"], "b": parts["test"]}).save_to_disk(tmp_path / "two")
    assert "data.source.split" in refusal(tmp_path / "two")
    source = opened(tmp_path / "two", split="b", val_split="a")
    assert source.val_mask.tolist() == [False] * 2 + [True] * 3


def test_samples_without_a_class_or_caption_are_reported(tmp_path):
    """They are an error if the column was typed."""
    dataset(pictures(3), label=[0, -1, 1], text=["a", None, " "]).save_to_disk(tmp_path / "data")
    source = opened(tmp_path / "data")
    assert source.labels is None and source.captions is None
    assert "1 image without label" in source.summary and "2 images without text" in source.summary
    assert "data.source.label_column=label" in refusal(tmp_path / "data", label_column="label")
    assert "data.source.caption_column=text" in refusal(tmp_path / "data", caption_column="text")


def test_unreadable_images_are_left_out(tmp_path):
    """With their classes and captions; the classes of the dataset remain."""
    images = pictures(4)
    given = [{"bytes": png(image), "path": None} for image in images]
    given[1], given[2] = {"bytes": b"no image", "path": None}, None
    dataset(images, image=given).save_to_disk(tmp_path / "data")
    assert all(part in refusal(tmp_path / "data") for part in ("2 of 4 images of", "train/1", "train/2"))
    with pytest.warns(UserWarning, match="2 of 4 images"):
        source = opened(tmp_path / "data", skip_unreadable=0.5)
    assert np.array_equal(pixels(source), [images[0], images[3]])
    assert source.labels.targets.tolist() == [0, 1] and source.labels.classes == ["dog", "cat", "bird"]
    assert source.captions == [["picture 0"], ["picture 3"]]
    assert list(source.ids) == ["train/0", "train/3"]


def test_a_dataset_that_cannot_be_opened_is_refused(tmp_path):
    """Offline, or of a wrong name, or without images."""
    with pytest.raises(ValueError, match=r"^data\.name=nobody/nothing cannot be opened .*data\.name") as error:
        hub("nobody/nothing", SHAPE, 3, cache_dir=str(tmp_path))
    assert "\n" not in str(error.value)
    (tmp_path / "no rows").mkdir()
    dataset(pictures(1)).select([]).to_parquet(tmp_path / "no rows/train.parquet")
    assert "data.name=" in refusal(tmp_path / "no rows")
    (tmp_path / "empty").mkdir()
    assert "data.name=" in refusal(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"data\.name=null"):
        hub(None, SHAPE, 3)


def test_many_images_are_decoded_in_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(pixel_store, "MIN_PARALLEL", 10)
    monkeypatch.setattr(pixel_store, "CHUNK", 7)
    images = pictures(40)
    dataset(images).to_parquet(tmp_path / "train.parquet")
    assert np.array_equal(pixels(hub(str(tmp_path), SHAPE, 3, cache_dir=str(tmp_path / "cache"))), images)


def test_the_configuration_opens_a_dataset(tmp_path):
    images = parquet(tmp_path / "data")
    settings = [f"data.name='{tmp_path / 'data'}'", f"data.cache_dir='{tmp_path / 'cache'}'", "data.image_size=[6,8]"]
    cfg = compose("train", "data=hub", "run_dir=x", *settings, "data.num_workers=0")
    data = instantiate(inline_aliases(cfg.data, "data"))
    data.setup()
    assert (data.train_indices, data.val_indices) != ([], [])
    assert sorted(data.val_indices) == [5, 6]
    expected = torch.from_numpy(np.stack([images[k] for k in data.val_indices])).permute(0, 3, 1, 2)
    assert torch.equal(data.postprocess(data.examples(2)), expected)


def test_a_text_is_a_class_if_it_is_named(tmp_path):
    """And a caption, too, only if that is named as well."""
    texts = ["red", "blue", "red", "blue"]
    data = dataset(pictures(4), text=texts).remove_columns("label")
    data.save_to_disk(tmp_path / "data")
    source = opened(tmp_path / "data", label_column="text")
    assert [source.labels.classes[k] for k in source.labels.targets] == texts and source.captions is None
    source = opened(tmp_path / "data", label_column="text", caption_column="text")
    assert source.captions == [[text] for text in texts] and source.labels is not None


def test_classes_of_splits_are_matched_by_name(tmp_path):
    """Although each split numbers them in its own order."""
    train, val = dataset(pictures(4)), dataset(pictures(2, seed=1))
    val = val.cast_column("label", datasets.Value("int64")).cast_column(
        "label", datasets.ClassLabel(names=["cat", "dog"])
    )
    datasets.DatasetDict(train=train, validation=val).save_to_disk(tmp_path / "data")
    labels = opened(tmp_path / "data").labels
    assert [labels.classes[k] for k in labels.targets] == ["dog", "cat", "dog", "cat", "cat", "dog"]
