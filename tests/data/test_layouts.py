"""Layouts of image folders: nested classes, files that hold one channel or several frames, and tables of numbers."""

import io
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image

from src.data import masks
from src.data.captions import captioned
from src.data.folder import find, folder
from src.data.image_source import ImageSource
from src.data.split import hash_ids
from src.errors import DataReadError

SHAPE = (6, 8)


def pixels(seed: int, *shape: int, dtype: str = "uint8", high: int = 255) -> np.ndarray:
    values = np.random.default_rng(seed).integers(0, high, shape or SHAPE, endpoint=True)
    values.flat[0], values.flat[1] = 0, high
    return values.astype(dtype)


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, image)
    elif path.suffix == ".tif":
        tifffile.imwrite(path, image)
    else:
        Image.fromarray(image).save(path)


def classes_of(source: ImageSource) -> list[str] | None:
    return None if source.labels is None else [source.labels.classes[k] for k in source.labels.targets]


def all_of(source: ImageSource) -> np.ndarray:
    return source.fetch(range(len(source))).numpy()


# Classes of nested folders


def test_nested_folders_are_classes_on_request(tmp_path):
    for k, name in enumerate(["animals/cat/young/1", "animals/cat/2", "animals/dog/3", "plants/rose/4", "plants/5"]):
        save(tmp_path / f"{name}.png", pixels(k))
    tops = folder(str(tmp_path), SHAPE, 1)
    assert classes_of(tops) == ["animals", "animals", "animals", "plants", "plants"]
    assert re.search(r"; 4 .* 2 .*data\.source\.class_depth=2", tops.summary)
    two = folder(str(tmp_path), SHAPE, 1, class_depth=2)
    assert classes_of(two) == ["animals/cat", "animals/cat", "animals/dog", "plants", "plants/rose"]
    assert "data.source.class_depth" not in two.summary and "animals/cat" in two.summary
    every = folder(str(tmp_path), SHAPE, 1, class_depth="all")
    assert classes_of(every) == ["animals/cat", "animals/cat/young", "animals/dog", "plants", "plants/rose"]
    for wrong in (0, -1, "top"):
        with pytest.raises(ValueError, match=r"data\.source\.class_depth"):
            folder(str(tmp_path), SHAPE, 1, class_depth=wrong)


def test_nested_classes_lie_below_a_split(tmp_path):
    for k, name in enumerate(["train/a/x/1", "train/a/y/2", "val/a/x/3"]):
        save(tmp_path / f"{name}.png", pixels(k))
    assert classes_of(folder(str(tmp_path), SHAPE, 1)) is None
    source = folder(str(tmp_path), SHAPE, 1, class_depth=2)
    assert classes_of(source) == ["a/x", "a/y", "a/x"] and source.val_mask.tolist() == [False, False, True]


def test_nested_folders_are_counted_without_those_at_the_top(tmp_path):
    save(tmp_path / "a" / "1.png", pixels(0))
    save(tmp_path / "a" / "x" / "2.png", pixels(1))
    save(tmp_path / "b" / "3.png", pixels(2))
    assert re.search(
        r"; 1 subfolder of 1 folder .*data\.source\.class_depth=2", folder(str(tmp_path), SHAPE, 1).summary
    )


# Several files per image


@pytest.mark.parametrize("packed", [None, "zip", "gztar"])
def test_bands_in_files_are_channels_of_an_image(tmp_path, packed):
    bands = {(s, b): pixels(10 * s + b, dtype="uint16", high=4000) for s in range(3) for b in (2, 3, 10)}
    for (sample, band), image in bands.items():
        save(tmp_path / "in" / f"{'cats' if sample else 'dogs'}" / f"{sample}_B{band}.tif", image)
    root = shutil.make_archive(str(tmp_path / "x"), packed, tmp_path / "in") if packed else str(tmp_path / "in")
    source = folder(root, SHAPE, 3, channel_pattern=r"_(B\d+)")
    expected = np.stack([np.stack([bands[s, b] for b in (2, 3, 10)]) for s in (1, 2, 0)])
    assert np.array_equal(all_of(source), expected.astype(np.float32))
    assert source.value_range == (0, 4095) and source.dtype == "uint16" and source.suffix == ".tif"
    assert classes_of(source) == ["cats", "cats", "dogs"]
    assert list(source.ids) == ["cats/1.tif", "cats/2.tif", "dogs/0.tif"]
    assert "B2, B3, B10" in source.summary
    some = folder(
        root, SHAPE, 2, channel_pattern=r"_(B\d+)", channel_names=["B10", "B2"], cache=False, value_range=[0, 4095]
    )
    assert np.array_equal(all_of(some), expected[:, [2, 0]].astype(np.float32))
    assert sum(map(len, some.found.left_out.values())) == 3


def test_channels_in_folders_are_combined(tmp_path):
    for k in range(2):
        for c, name in enumerate(["red", "green", "blue"]):
            save(tmp_path / "train" / name / f"{k}.png", pixels(3 * k + c))
    save(tmp_path / "train" / "red" / "notes.png", pixels(9))
    pattern = "(red|green|blue)/(?=[0-9])"
    source = folder(str(tmp_path), SHAPE, 3, channel_pattern=pattern, channel_names=["red", "green", "blue"])
    assert list(source.found.names) == ["train/0.png", "train/1.png"]
    assert np.array_equal(all_of(source), np.stack([np.stack([pixels(3 * k + c) for c in range(3)]) for k in range(2)]))
    assert "train/red/notes.png" in source.summary


def test_channels_may_be_the_names_of_files(tmp_path):
    """As in a folder per scene; samples are written in the format of the files."""
    for scene in "ab":
        for k in (1, 2):
            save(tmp_path / scene / f"B{k}.tif", pixels(k))
    source = folder(str(tmp_path), SHAPE, 2, channel_pattern=r"(B\d)")
    assert classes_of(source) == ["a", "b"] and source.suffix == ".tif"
    assert np.array_equal(all_of(source), np.stack([[pixels(1), pixels(2)]] * 2))


def test_every_file_is_in_the_key_of_the_cache(tmp_path):
    for band in "ab":
        save(tmp_path / f"0_{band}.npy", pixels(ord(band)))
        save(tmp_path / f"1_{band}.npy", pixels(ord(band) + 5))
    for band in "ab":
        changed = pixels(50 + ord(band))
        first = folder(str(tmp_path), SHAPE, 2, channel_pattern="_([ab])")
        save(tmp_path / f"0_{band}.npy", changed)
        again = folder(str(tmp_path), SHAPE, 2, channel_pattern="_([ab])")
        assert first.found.identity() != again.found.identity()
        assert np.array_equal(all_of(again)[0, "ab".index(band)], changed)


def test_incomplete_images_are_refused_or_left_out(tmp_path):
    for k in range(20):
        for band in "abc":
            if (k, band) != (7, "b"):
                save(tmp_path / f"{k:02}_{band}.png", pixels(k, high=100 + ord(band)))
    with pytest.raises(DataReadError, match=r"07\.png.*channel b.*data\.skip_unreadable"):
        folder(str(tmp_path), SHAPE, 3, channel_pattern="_([abc])")
    with pytest.warns(UserWarning, match=r"07\.png"):
        source = folder(str(tmp_path), SHAPE, 3, channel_pattern="_([abc])", skip_unreadable=True)
    assert len(source) == 19 and "07.png" not in source.ids
    complete = [k for k in range(20) if k != 7]
    assert np.array_equal(all_of(source)[:, 1], np.stack([pixels(k, high=100 + ord("b")) for k in complete]))
    assert len(folder(str(tmp_path), SHAPE, 2, channel_pattern="_([abc])", channel_names=["a", "c"])) == 20


@pytest.mark.parametrize("other", [pixels(0, 3, 4), pixels(0, dtype="uint16", high=900)])
def test_files_of_unequal_size_or_type_are_refused(tmp_path, other):
    save(tmp_path / "0_a.png", pixels(0))
    save(tmp_path / "0_b.png", other)
    with pytest.raises(DataReadError, match="different"):
        folder(str(tmp_path), SHAPE, 2, channel_pattern="_([ab])")


def test_wrong_channel_settings_are_refused(tmp_path):
    for name in ("0_a", "0_b", "0a_"):
        save(tmp_path / f"{name}.png", pixels(0))
    wrong = [("_(x)", None), ("_[ab]", None), ("(", None), ("_([ab])", ["a", "c"]), ("_([ab])", ["a", "a"])]
    for pattern, names in [*wrong, ("_?([ab])_?", None)]:
        with pytest.raises(ValueError, match=r"data\.source\.channel_pattern"):
            folder(str(tmp_path), SHAPE, 2, channel_pattern=pattern, channel_names=names)
    with pytest.raises(ValueError, match=r"data\.source\.pages"):
        folder(str(tmp_path), SHAPE, 2, channel_pattern="_([ab])", pages="samples")


# Frames


def test_frames_of_files_become_samples(tmp_path):
    """GIF, APNG, multi-page TIFF of 8 bits, of 16 bits and of floats are separate folders; a PNG has one frame."""
    stack = [pixels(k) for k in range(4)]
    images = [Image.fromarray(each) for each in stack]
    for suffix, options in ((".gif", {"duration": 50}), (".png", {}), (".tif", {})):
        root = tmp_path / suffix[1:]
        root.mkdir()
        images[0].save(root / f"a{suffix}", save_all=True, append_images=images[1:], **options)
        Image.fromarray(pixels(9)).save(root / "b.png")
        for cache in (True, False):
            source = folder(str(root), SHAPE, 1, pages="samples", cache=cache)
            assert np.array_equal(all_of(source)[:, 0], np.stack([*stack, pixels(9)])), suffix
        assert np.array_equal(source.fetch([3, 4, 1]).numpy()[:, 0], np.stack([stack[3], pixels(9), stack[1]]))
        assert source.ids[:4] == [f"a{suffix}"] * 4 and "2 files" in source.summary
    for dtype, high in (("uint16", 60000), ("float32", 1)):
        root = tmp_path / dtype
        pages = pixels(3, 5, *SHAPE, 3, dtype="uint16", high=60000).astype(dtype) / (60000 // high)
        save(root / "a.tif", pages.astype(dtype))
        found = folder(str(root), SHAPE, 3, pages="samples")
        assert np.array_equal(all_of(found), pages.astype(np.float32).transpose(0, 3, 1, 2))


def test_frames_of_a_file_are_on_one_side_of_the_split(tmp_path):
    for k in range(30):
        images = [Image.fromarray(pixels(10 * k + j)) for j in range(1 + k % 4)]
        images[0].save(tmp_path / f"{k}.tif", save_all=True, append_images=images[1:])
    source = folder(str(tmp_path), SHAPE, 1, pages="samples")
    assert len(source) == sum(1 + k % 4 for k in range(30))
    held_out = hash_ids(source.ids, 0) < 2**62
    by_file: dict[str, set[bool]] = {}
    for name, held in zip(source.found.names, held_out.tolist(), strict=True):
        by_file.setdefault(name, set()).add(held)
    assert all(len(sides) == 1 for sides in by_file.values())
    assert {side for sides in by_file.values() for side in sides} == {True, False}


def test_frames_share_labels_and_captions(tmp_path):
    for k in range(2):
        images = [Image.fromarray(pixels(10 * k + j)) for j in range(3)]
        images[0].save(tmp_path / f"{k}.gif", save_all=True, append_images=images[1:], duration=50)
        (tmp_path / f"{k}.txt").write_text(f"number {k}")
    (tmp_path / "labels.csv").write_text("file,label,size\n0.gif,x,1.5\n1.gif,y,2\n")
    source = folder(str(tmp_path), SHAPE, 1, labels="labels.csv", condition_columns=["size"], pages="samples")
    assert classes_of(source) == ["x"] * 3 + ["y"] * 3
    assert source.covariates.values.flatten().tolist() == [1.5] * 3 + [2.0] * 3
    texts = captioned(str(tmp_path), SHAPE, 1, pages="samples").captions
    assert [text for (text,) in texts] == ["number 0"] * 3 + ["number 1"] * 3


def test_a_damaged_animation_is_reported(tmp_path):
    file = io.BytesIO()
    images = [Image.fromarray(pixels(j, 40, 40)) for j in range(4)]
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=50)
    (tmp_path / "a.gif").write_bytes(file.getvalue()[:2500])
    (tmp_path / "b.gif").write_bytes(b"GIF89a")
    save(tmp_path / "c.png", pixels(5, 40, 40))
    with pytest.raises(DataReadError, match=r"b\.gif"):
        folder(str(tmp_path), 40, 1, pages="samples")


# Numbers


def write_table(path: Path, rows: list[dict[str, object]]) -> None:
    frame = pd.DataFrame(rows)
    match path.suffix:
        case ".csv":
            frame.to_csv(path, index=False)
        case ".tsv":
            frame.to_csv(path, index=False, sep="\t")
        case ".parquet":
            frame.to_parquet(path, index=False)
        case ".json":
            path.write_text(json.dumps(rows))
        case ".jsonl":
            path.write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_numbers_of_a_table_are_covariates(tmp_path, suffix):
    from src.data.conditions import Continuous

    numbers = np.random.default_rng(0).normal([3, 1e9], [0.1, 5], (12, 2))
    order = np.random.default_rng(1).permutation(12)
    for k in range(12):
        save(tmp_path / f"{k:02}.png", pixels(k))
    (tmp_path / "04.png").write_bytes(b"damaged")
    rows = [{"file_name": f"{k:02}.png", "age": numbers[k, 0], "time": numbers[k, 1]} for k in order.tolist()]
    write_table(tmp_path / f"table{suffix}", rows)
    with pytest.warns(UserWarning, match=r"04\.png"):
        source = folder(
            str(tmp_path), SHAPE, 1, labels=f"table{suffix}", condition_columns=["time", "age"], skip_unreadable=True
        )
    assert source.labels is None
    expected = np.delete(numbers, 4, axis=0)[:, ::-1]
    assert np.allclose(source.covariates.values.numpy(), expected, rtol=1e-12, atol=0)
    condition = Continuous(**Continuous.infer_settings(source, {}))
    encoded = condition([condition.of_sample(source, k, 0) for k in range(11)]).numpy()
    assert np.allclose(encoded, (expected - expected.mean(0)) / expected.std(0), atol=1e-5)


def test_invalid_numbers_are_refused(tmp_path):
    for k in range(3):
        save(tmp_path / f"{k}.png", pixels(k))
    for cell, columns, message in (
        ("x", ["age"], r"line 3: column 'age' is 'x'"),
        ("", ["age"], r"line 3: column 'age' is ''"),
        ("inf", ["age"], r"line 3"),
        ("2", ["ages"], r"data\.source\.condition_columns.*did you mean age"),
    ):
        (tmp_path / "t.csv").write_text(f"file,age\n0.png,1\n1.png,{cell}\n2.png,3\n")
        with pytest.raises(ValueError, match=message):
            folder(str(tmp_path), SHAPE, 1, labels="t.csv", condition_columns=columns)
    for lines, message in (("0.png,1\n1.png,2", r"2\.png"), ("0.png,1\n0.png,2\n1.png,2\n2.png,3", r"0\.png")):
        (tmp_path / "t.csv").write_text(f"file,age\n{lines}\n")
        with pytest.raises(ValueError, match=message):
            folder(str(tmp_path), SHAPE, 1, labels="t.csv", condition_columns=["age"])
    with pytest.raises(ValueError, match=r"data\.source\.labels"):
        folder(str(tmp_path), SHAPE, 1, condition_columns=["age"])


# Repeats


def test_roots_are_repeated_in_training(tmp_path):
    from hydra.utils import instantiate

    from tests.conftest import compose

    for root, count in (("a", 40), ("b", 30)):
        for k in range(count):
            save(tmp_path / root / f"{k}.png", pixels(k + 100 * (root == "b")))
    roots = f"data.root=['{tmp_path / 'a'}','{tmp_path / 'b'}']"

    sizes = "data.image_size=[6,8]", "data.channels=1", "data.val_fraction=0.2", "data.batch_size=6"
    cfg = compose("train", "data=folder", roots, *sizes, "run_dir=x").data

    def opened(repeats: object):
        data = instantiate(cfg, repeats=repeats)
        data.setup()
        return data

    trainer = SimpleNamespace(max_steps=1000, global_step=0, accumulate_grad_batches=1, global_rank=0, world_size=1)
    plain, data = opened(None), opened([1, 3])
    assert data.val_indices == plain.val_indices and data.train_indices == plain.train_indices
    assert list(data.source.ids) == list(plain.source.ids) and len({*data.source.ids}) == 70
    wanted = {k: 3 if name.startswith("1/") else 1 for k, name in enumerate(data.source.ids) if k in data.train_indices}
    per_epoch = sum(wanted.values())
    sampler = data.train_sampler(trainer)
    drawn = [index for step in range(per_epoch) for index in sampler.batch(step)]  # 6 epochs
    for epoch in range(6):
        assert Counter(drawn[epoch * per_epoch : (epoch + 1) * per_epoch]) == wanted
    trainer.global_step = 17  # a resumed run continues with the same batches
    assert [each.indices for _, each in zip(range(5), data.train_sampler(trainer), strict=False)] == [
        sampler.batch(step) for step in range(17, 22)
    ]
    trainer.limit_val_batches = 1.0
    assert sorted(k for each in data.val_sampler(trainer) for k in each.indices) == sorted(plain.val_indices)
    for wrong in ([1], [1, 0], [1, 2, 3], [1, 1.5], 2):
        with pytest.raises(Exception, match=r"data\.repeats"):
            opened(wrong)


# Masks beside images


def save_photo(path: Path, seed: int) -> None:
    save(path, pixels(seed, *SHAPE, 3))


def save_mask(path: Path, seed: int) -> None:
    """Gray, or in a few colors."""
    mask = pixels(seed, high=1)
    save(path, mask * 255 if seed % 2 else np.stack([mask * 200, mask, mask], -1))


LAYOUTS_WITH_MASKS = {
    "folders": (["images/{k}.png"], ["masks/{k}.png"]),
    "of_other_formats": (["a/img/{k}.jpg"], ["a/labels/{k}.png", "a/depth/{k}.tif"]),
    "with_splits": (["images/train/{k}.jpg", "images/val/1{k}.jpg"], ["masks/train/{k}.png", "masks/val/1{k}.png"]),
    "in_splits": (["train/images/{k}.jpg", "val/images/1{k}.jpg"], ["train/labels/{k}.png", "val/labels/1{k}.png"]),
    "in_classes": (["cat/images/{k}.png", "dog/images/{k}.png"], ["cat/masks/{k}.png", "dog/masks/{k}.png"]),
    "per_scene": (["1/rgb.png", "2/rgb.png"], ["1/depth.png", "2/depth.png"]),
    "stems": (["cat{k}.jpg"], ["cat{k}_mask.png"]),
    "stems_and_numbers": (["img_{k}.jpg"], ["img_{k}_seg.png", "img_{k}_gt.png"]),
    "prefixes": (["image_{k}.png"], ["mask_{k}.png"]),
    "endings": (["base/{k}.jpg"], ["base/{k}.png"]),
    "voc": (["V/JPEGImages/{k}.jpg", "V/JPEGImages/2{k}.jpg"], ["V/SegmentationClass/{k}.png"]),
    "pets": (["images/a_{k}.jpg"], ["annotations/trimaps/a_{k}.png"]),
    "cityscapes": (["leftImg8bit/train/x/x_{k}_leftImg8bit.png"], ["gtFine/train/x/x_{k}_gtFine_labelIds.png"]),
    "ade20k": (["images/training/{k}.jpg", "images/validation/1{k}.jpg"], ["annotations/training/{k}.png"]),
    "birds": (["CUB/images/a/{k}.jpg", "CUB/images/b/{k}.jpg"], ["segmentations/a/{k}.png", "segmentations/b/{k}.png"]),
    "carvana": (["train/{k}.jpg"], ["train_masks/{k}_mask.png"]),
    "isic": (["Training_Input/{k}.jpg"], ["Training_GroundTruth/{k}_segmentation.png"]),
    "nuclei": (["train/{k}/images/{k}.png"], ["train/{k}/masks/x{k}.png", "train/{k}/masks/y{k}.png"]),
}


@pytest.mark.parametrize("layout", LAYOUTS_WITH_MASKS)
def test_masks_beside_images_are_left_out(tmp_path, layout):
    images, masks = ({name.format(k=k) for name in names for k in range(3)} for names in LAYOUTS_WITH_MASKS[layout])
    for k, name in enumerate(sorted(images)):
        save_photo(tmp_path / name, k)
    for k, name in enumerate(sorted(masks)):
        save_mask(tmp_path / name, k)
    source = folder(str(tmp_path), SHAPE, 3, cache=False)
    assert {*source.found.names} == images
    assert {name for names in source.found.left_out.values() for name in names} == masks
    assert "data.source.masks=true" in source.summary
    assert {*folder(str(tmp_path), SHAPE, 3, cache=False, masks=True).found.names} >= images | masks


@pytest.mark.parametrize(
    ("names", "photos"),
    [
        (["images/{k}.png", "masks/{k}.png"], True),
        (["with_mask/{k}.png", "without_mask/{k}.png"], False),
        (["input/{k}.png", "gt/{k}.png"], True),
        (["{k}.jpg", "{k}.png"], True),
        (["{k}.png", "gas_mask_{k}.png"], False),
        (["breadth/{k}.png", "depth/{k}.png"], False),
    ],
)
def test_photos_and_other_names_are_not_masks(tmp_path, names, photos):
    """Many colors, no image of the same name, or no folder of images."""
    for k in range(3):
        for j, name in enumerate(names):
            (save_photo if photos else save_mask)(tmp_path / name.format(k=k), 10 * j + k)
    assert len(folder(str(tmp_path), SHAPE, 3, cache=False)) == 6


def test_folders_of_masks_with_other_names_are_reported(tmp_path):
    for k in range(3):
        save_photo(tmp_path / "faces-img" / f"{k}.jpg", k)
        save_mask(tmp_path / "faces-mask" / f"{k}{k}.png", k)
    with pytest.warns(UserWarning, match=r"faces-mask/.*data\.root=\S*faces-img "):
        assert len(folder(str(tmp_path), SHAPE, 3, cache=False)) == 6


def test_masks_may_be_channels(tmp_path):
    for k in range(3):
        save_photo(tmp_path / "images" / f"{k}.png", k)
        save(tmp_path / "masks" / f"{k}.png", pixels(k))
    source = folder(str(tmp_path), SHAPE, 4, channel_pattern="(images|masks)/", cache=False)
    assert len(source) == 3 and source.fetch([1])[0, 3].equal(
        folder(str(tmp_path / "masks"), SHAPE, 1).fetch([1])[0, 0]
    )


def test_names_of_images_are_parsed_once(monkeypatch):
    """Not once per mask, which takes hours for 100,000."""
    calls = []
    monkeypatch.setattr(masks, "_shorter", lambda stem: calls.append(stem) or stem)
    masks.find_masks(Path("missing"), [f"{name}/{k}.png" for name in ("images", "masks") for k in range(50)])
    assert len(calls) <= 100


# Degraded versions of images


@pytest.mark.parametrize(
    ("clean", "degraded"),
    [
        ("HR/{k}.png", "LR/{k}.png"),
        ("D2K_train_HR/{k}.png", "D2K_train_LR_bicubic/X2/{k}x2.png"),
        ("s/train/a/sharp/{k}.png", "s/train/a/blur_gamma/{k}.png"),
        ("train/target/{k}.png", "train/input/{k}.png"),
        ("{k}/GT_1.png", "{k}/NOISY_1.png"),
        ("hr_128/{k}.png", "lr_16/{k}.png"),
        ("Raw Data/high_res/{k}.png", "Raw Data/low_res/{k}.png"),
    ],
)
@pytest.mark.parametrize("alike", [True, False])
def test_degraded_versions_of_images_are_left_out(tmp_path, clean, degraded, alike):
    """Images that look different are classes, or inputs and targets of other kinds."""
    for k in range(3):
        image = np.random.default_rng(k).integers(20, 200, (8, 8, 3)).repeat(4, 0).repeat(4, 1).astype("uint8")
        save(tmp_path / clean.format(k=k), image)
        noise = np.random.default_rng(9).integers(0, 20, image.shape).astype("uint8")
        save(tmp_path / degraded.format(k=k), (image if alike else 255 - image // 2) // 2 + noise)
    better, worse = ({name.format(k=k) for k in range(3)} for name in (clean, degraded))
    found = find(str(tmp_path))
    assert {*found.names} == better | (set() if alike else worse)
    assert {name for names in found.left_out.values() for name in names} == (worse if alike else set())
    assert not alike or "data.source.masks=true" in next(iter(found.left_out))
    assert len(find(str(tmp_path), masks=True)) == 6
