"""Signals, volumes and latents from NumPy, audio and NIfTI files."""

import pickle
import wave
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from src.data.array_files import Sample, arrange, open_numpy, reorient
from src.data.array_store import fit, fit_header
from src.data.arrays import ArrayDataModule, Arrays
from src.data.write import to_type, write_arrays
from src.errors import DataReadError


def module(root: Path, **settings: object) -> ArrayDataModule:
    """Return a data module, with `source_*` settings for its source."""
    source = {name.removeprefix("source_"): settings.pop(name) for name in [*settings] if name.startswith("source_")}
    return ArrayDataModule(Arrays(**source), str(root), val_fraction=0.3, **settings)


def ramp(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def opened(root: Path, **settings: object) -> ArrayDataModule:
    data = module(root, **settings)
    data.setup()
    return data


@pytest.mark.parametrize("kind", ["npy", "fortran npy", "npz", "compressed npz"])
def test_one_file_holds_all_samples(kind, tmp_path):
    x = np.random.default_rng(0).normal(size=(10, 2, 7)).astype("float32")
    path = tmp_path / f"x.{kind[-3:]}"
    if kind == "npz":
        np.savez(path, x)
    elif kind == "compressed npz":
        np.savez_compressed(path, x)
    else:
        np.save(path, np.asfortranarray(x) if "fortran" in kind else x)
    assert isinstance(open_numpy(path), np.memmap) == (kind != "compressed npz")
    data = opened(path)
    assert data.shape == (2, 7) and len(data.source) == 10
    assert np.array_equal(data.source.fetch([3, 0]).numpy(), x[[3, 0]])
    low, high = data.inferred["value_range"]
    assert (low, high) == (x.min(), x.max())
    inside = data.preprocess(data.source.fetch(range(10)))
    assert inside.min() == -1 and inside.max() == pytest.approx(1)
    assert np.allclose(data.denormalize(inside).numpy(), x, atol=1e-6)


def test_other_processes_map_the_file_themselves(tmp_path):
    np.save(tmp_path / "x.npy", ramp(500, 1, 100))
    source = opened(tmp_path / "x.npy").source
    sent = pickle.dumps(source)
    assert len(sent) < 3000
    assert torch.equal(pickle.loads(sent).fetch([7]), source.fetch([7]))


def test_a_named_array_of_several_is_read(tmp_path):
    np.savez(tmp_path / "x.npz", a=ramp(6, 1, 4), b=ramp(6, 1, 5))
    with pytest.raises(ValueError, match=r"data\.source\.key=a"):
        module(tmp_path / "x.npz")
    assert module(tmp_path / "x.npz", source_key="b").shape == (1, 5)


@pytest.mark.parametrize(
    ("shape", "channels", "size", "expected"),
    [
        ((9, 30), None, None, (9, 1, 30)),  # N x L
        ((9, 2, 30), None, None, (9, 2, 30)),
        ((9, 2, 30), 1, None, (9, 1, 2, 30)),  # gray images without the axis of channels
        ((9, 2, 30), None, (2, 30), (9, 1, 2, 30)),
        ((9, 4, 8, 8), None, None, (9, 4, 8, 8)),
        ((9, 8, 8, 3), 3, None, (9, 3, 8, 8)),  # channels at the end
        ((9, 30, 2), 2, None, (9, 2, 30)),
        ((9, 30, 12), 12, None, (9, 12, 30)),
        ((9, 30, 12), 30, None, (9, 30, 12)),
        ((9, 30, 1), 1, None, (9, 1, 30)),
        ((9, 8, 8, 3), None, (8, 8, 3), (9, 1, 8, 8, 3)),
        ((9, 8, 8, 8), 1, None, (9, 1, 8, 8, 8)),
        ((9, 1, 6, 7, 8), None, None, (9, 1, 6, 7, 8)),
    ],
)
def test_settings_tell_a_missing_axis(shape, channels, size, expected):
    assert arrange(Path("x"), np.zeros(shape), channels, size, batched=True).shape == expected
    assert arrange(Path("x"), np.zeros(shape[1:]), channels, size, batched=False).shape == expected[1:]


def test_ambiguous_and_wrong_shapes_name_the_setting(tmp_path):
    for shape, settings, setting in (
        ((9, 8, 8, 3), {}, "data.channels=3"),
        ((9, 30, 12), {}, "data.channels=12"),
        ((9, 2, 8, 8, 8, 8), {}, "N x C x L"),
        ((9, 2, 30), {"channels": 3, "image_size": [30]}, "data.channels=3"),
        ((9, 2, 30), {"channels": 2, "image_size": [40]}, "data.image_size="),
        ((9, 2, 30), {"channels": 2, "image_size": [30], "source_length": 20}, "data.source.length=20"),
    ):
        np.save(tmp_path / "x.npy", ramp(*shape))
        with pytest.raises(ValueError, match=setting.replace(".", r"\.")):
            opened(tmp_path / "x.npy", **settings)


def test_values_that_are_not_finite_name_the_sample(tmp_path):
    x = ramp(20, 1, 8)
    x[13, 0, 2] = np.nan
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(ValueError, match="sample 13"):
        opened(tmp_path / "x.npy")


@pytest.mark.parametrize(
    ("dtype", "high", "value_range", "num_values"),
    [
        ("bool", 1, (0, 1), 2),
        ("uint8", 90, (0, 255), 256),
        ("uint16", 4000, (0, 4095), 4096),
        ("int16", 300, (0, 300), 301),
        ("int32", 10**6, (0, 10**6), None),
        ("float16", 0.5, (0, 1), None),
        ("float64", 70, (0, 70), None),
    ],
)
def test_samples_return_in_the_type_of_the_file(dtype, high, value_range, num_values, tmp_path):
    x = (np.linspace(0, high, 90).reshape(9, 1, 10)).round(1 if high < 1 else 0).astype(dtype)
    np.save(tmp_path / "x.npy", x)
    data = opened(tmp_path / "x.npy")
    assert data.inferred["value_range"] == list(value_range) and data.num_values == num_values
    back = data.denormalize(data.preprocess(data.source.fetch(range(9))))
    saved = np.load(write_arrays(tmp_path, back.numpy(), data))
    assert saved.dtype == x.dtype
    assert np.allclose(saved.astype(float), x.astype(float), rtol=2e-3 if dtype == "float16" else 1e-6)


def test_integers_beyond_the_type_are_clipped():
    assert to_type(np.array([-3.0, 1.6, 40000.0]), "int16").tolist() == [-3, 2, 32767]


def test_values_that_float32_cannot_tell_apart_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", 1e9 + np.random.default_rng(0).normal(size=(9, 1, 8)))
    with pytest.raises(ValueError, match=r"data\.value_range=\[.*float32"):
        opened(tmp_path / "x.npy")


def test_files_of_either_byte_order_are_read(tmp_path):
    for k in range(6):
        np.save(tmp_path / f"{k}.npy", ramp(2, 5, dtype=">i2" if k % 2 else "<i2") + k)
    data = opened(tmp_path, cache_dir=str(tmp_path / "cache"))
    assert data.inferred["dtype"] == "int16" and "int16 values" in data.source.summary
    assert data.source.fetch([1, 4]).tolist() == [(ramp(2, 5) + 1).tolist(), (ramp(2, 5) + 4).tolist()]


def test_the_arrays_of_files_are_named(tmp_path):
    for k in range(6):
        np.savez(tmp_path / f"{k}.npz", image=ramp(1, 5) + k, label=k)
    with pytest.raises(DataReadError, match=r"image, label.*data\.source\.key=image"):
        module(tmp_path)
    assert opened(tmp_path, source_key="image", cache_dir=str(tmp_path / "cache")).shape == (1, 5)


def test_labels_come_from_integers_and_tables(tmp_path):
    np.save(tmp_path / "x.npy", ramp(6, 1, 4))
    np.save(tmp_path / "y.npy", np.array([3, 3, 10, 3, 10, 3]))
    (tmp_path / "y.csv").write_text("label\ncat\ncat\ndog\ncat\ndog\ncat\n")
    for name, classes in (("y.npy", ["3", "10"]), ("y.csv", ["cat", "dog"])):
        labels = opened(tmp_path / "x.npy", source_labels=name).source.labels
        assert list(labels.classes) == classes and labels.targets.tolist() == [0, 0, 1, 0, 1, 0]
    np.save(tmp_path / "column.npy", np.array([[-1], [-1], [3], [-10], [3], [-1]]))
    labels = opened(tmp_path / "x.npy", source_labels="column.npy").source.labels
    assert list(labels.classes) == ["-10", "-1", "3"] and labels.targets.tolist() == [1, 1, 2, 0, 2, 1]
    np.save(tmp_path / "names.npy", np.array(["b", "a", "b", "a", "a", "b"]))
    assert opened(tmp_path / "x.npy", source_labels="names.npy").source.labels.classes == ["a", "b"]
    np.save(tmp_path / "short.npy", np.zeros(5, int))
    with pytest.raises(ValueError, match=r"data\.source\.labels"):
        opened(tmp_path / "x.npy", source_labels="short.npy")


@pytest.fixture
def folder(tmp_path):
    """Return a folder with one signal of two channels per file, in two folders of classes."""
    for k in range(12):
        place = tmp_path / "data" / ("a" if k % 3 else "b")
        place.mkdir(parents=True, exist_ok=True)
        np.save(place / f"{k:02}.npy", ramp(2, 5) + k)
    return tmp_path / "data"


def test_files_of_single_samples_are_decoded_once(folder, tmp_path):
    settings = {"cache_dir": str(tmp_path / "cache")}
    data = opened(folder, **settings)
    assert data.shape == (2, 5) and list(data.source.labels.classes) == ["a", "b"]
    by_id = dict(zip(data.source.ids, data.source.fetch(range(12)), strict=True))
    assert all(
        torch.equal(by_id[f"{'a' if k % 3 else 'b'}/{k:02}.npy"], torch.tensor(ramp(2, 5) + k)) for k in range(12)
    )
    (cached,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    before = (cached / "samples.npy").stat().st_mtime_ns
    opened(folder, **settings)
    assert (cached / "samples.npy").stat().st_mtime_ns == before
    np.save(folder / "a" / "01.npy", ramp(2, 5) - 9)
    assert opened(folder, **settings).source.fetch([0]).min() == -9


def test_archives_are_read_in_place(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for path in sorted(folder.rglob("*.npy")):
            archive.write(path, path.relative_to(folder))
    whole, zipped = opened(folder).source, opened(tmp_path / "data.zip").source
    assert list(whole.ids) == list(zipped.ids) and torch.equal(whole.fetch(range(12)), zipped.fetch(range(12)))


def test_files_that_do_not_suit_are_named(folder):
    np.save(folder / "a" / "wide.npy", ramp(3, 5))
    (folder / "b" / "empty.npy").write_bytes(b"")
    with pytest.raises(DataReadError, match=r"2 of 14 .*a/wide\.npy.*b/empty\.npy.*data\.skip_unreadable"):
        opened(folder)
    data = opened(folder, skip_unreadable=0.2)
    assert len(data.source) == 12 and len(data.source.unreadable) == 2
    only = folder / "only"
    only.mkdir()
    for name in ("empty.npy", "too.npy"):  # one file would be the array of all samples
        (only / name).write_bytes(b"")
    with pytest.raises(DataReadError, match=r"2 of 2 .*empty\.npy"):
        opened(only, skip_unreadable=1.0, channels=1, image_size=[5])


def test_signals_are_cut_and_filled_up():
    x = ramp(1, 5)
    assert fit(x, (3,)).tolist() == [[0, 1, 2]]
    assert fit(x, (7,)).tolist() == [[0, 1, 2, 3, 4, 0, 0]]


def test_volumes_are_resampled():
    x = np.random.default_rng(0).random((1, 4, 6, 8))
    halves = x.reshape(1, 2, 2, 3, 2, 4, 2).mean((2, 4, 6))
    assert np.allclose(fit(x, (2, 3, 4)), halves)
    larger = F.interpolate(torch.from_numpy(x)[None], (5, 6, 9), mode="trilinear")[0].numpy()
    assert np.allclose(fit(x, (5, 6, 9)), larger)
    assert fit((9 * x).astype(np.int16), (2, 3, 4)).dtype == np.int16
    affine = np.diag([2.0, 1.0, 1.0, 1.0])
    changed = np.array(fit_header({"affine": affine}, (4, 6, 8), (2, 6, 8))["affine"])
    corner, corner_before = changed @ [-0.5, -0.5, -0.5, 1], affine @ [-0.5, -0.5, -0.5, 1]
    assert np.allclose(corner, corner_before) and changed[0, 0] == 4


def test_silence_is_zero_inside(tmp_path):
    for k in range(8):
        with wave.open(str(tmp_path / f"{k}.wav"), "wb") as file:
            file.setparams((2, 2, 16000, 0, "NONE", ""))
            file.writeframes(np.array([[0, 500], [-2000, 100], [0, 0]], "<i2").tobytes())
    data = opened(tmp_path, image_size=[4])
    assert data.shape == (2, 4) and data.inferred["header"] == {"sample_rate": 16000}
    x = data.source.fetch([0])
    assert x[0].tolist() == [[0, -2000, 0, 0], [500, 100, 0, 0]]
    assert data.preprocess(x)[0, 0].tolist() == [0, -1, 0, 0]
    assert opened(tmp_path, image_size=[4], channels=1).source.fetch([0])[0].tolist() == [[250, -950, 0, 0]]


def test_audio_of_several_types_is_written_in_the_most_precise(tmp_path):
    """Float audio beyond 1 keeps silence at 0, too."""
    soundfile = pytest.importorskip("soundfile")
    wave = np.array([0, 0.5, -0.25, 0.125])
    for k, kinds in enumerate((["PCM_U8", "PCM_16"], ["PCM_24", "FLOAT"])):
        (folder := tmp_path / str(k)).mkdir()
        for name, kind in enumerate(kinds):
            soundfile.write(folder / f"{name}.wav", wave * (2 if kind == "FLOAT" else 1), 8000, kind)
        data = opened(folder)
        assert "subtype" not in data.inferred["header"]
        assert data.preprocess(data.source.fetch([1]))[0, 0, :2].tolist() == [0, 1]


def test_half_of_a_recording_is_unreadable(tmp_path):
    """Its header has a longer length; one of unknown length, as of a microphone, is read."""
    soundfile = pytest.importorskip("soundfile")
    for k in range(3):
        soundfile.write(tmp_path / f"{k}.wav", np.linspace(-0.5, 0.5, 100), 8000)
    contents = (tmp_path / "1.wav").read_bytes()
    (tmp_path / "1.wav").write_bytes(contents[:144])
    with pytest.raises(DataReadError, match=r"1\.wav: it is truncated"):
        opened(tmp_path)
    (tmp_path / "1.wav").write_bytes(contents[:4] + b"\xff" * 4 + contents[8:40] + b"\xff" * 4 + contents[44:])
    assert len(opened(tmp_path).source) == 3


def test_changed_lengths_and_mixed_channels_are_counted(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    for k, (length, channels) in enumerate([(5, 1), (7, 1), (3, 2), (5, 2), (5, 1), (9, 1)]):
        soundfile.write(tmp_path / f"{k}.wav", np.full((length, channels), k / 10), 8000)
    summary = opened(tmp_path, cache_dir=str(tmp_path / "cache")).source.summary
    for part in ("2 cut", "1 zero-padded", "2 mixed down"):
        assert part in summary


@pytest.mark.parametrize(
    ("ending", "subtype"),
    [("wav", "PCM_U8"), ("wav", "PCM_16"), ("wav", "PCM_24"), ("wav", "FLOAT"), ("flac", "PCM_24"), ("aif", "PCM_S8")],
)
def test_audio_returns_in_its_bits_and_format(ending, subtype, tmp_path):
    soundfile = pytest.importorskip("soundfile")
    for k in range(6):
        wave = np.sin(np.arange(40) + k)[:, None] / 2
        soundfile.write(tmp_path / f"{k}.{ending}", wave, 8000, subtype, format="AIFF" if ending == "aif" else None)
    data = opened(tmp_path, cache_dir=str(tmp_path / "cache"))
    out = tmp_path / "out"
    out.mkdir()
    values = data.source.fetch(range(6))
    write_arrays(out, data.denormalize(data.preprocess(values)).numpy(), data)
    written = soundfile.SoundFile(out / f"00002.{ending}")
    assert (written.subtype, written.samplerate) == (subtype, 8000)
    names = [str(Path(each).stem) for each in data.source.ids]
    original = soundfile.read(tmp_path / f"{names[2]}.{ending}")[0]
    assert np.abs(written.read() - original).max() < 1e-6


def test_mp3_is_read_and_returns_without_loss(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    for k in range(3):
        soundfile.write(tmp_path / f"{k}.mp3", np.sin(np.arange(4000) * 0.05 * (k + 1)) / 2, 16000)
    data = opened(tmp_path, cache_dir=str(tmp_path / "cache"))
    values = data.source.fetch(range(3))
    original = soundfile.read(tmp_path / "1.mp3", dtype="float32")[0]
    assert np.abs(values[1, 0].numpy() - original).max() < 1e-4  # decoders need not agree in the last bits
    (tmp_path / "out").mkdir()
    write_arrays(tmp_path / "out", data.denormalize(data.preprocess(values)).numpy(), data)
    assert np.abs(soundfile.read(tmp_path / "out" / "00001.wav")[0] - values[1, 0].numpy()).max() < 1e-6


def test_scaled_volumes_have_their_scaled_values(tmp_path):
    import nibabel

    for k in range(6):
        image = nibabel.Nifti1Image(ramp(3, 4, 5, dtype="int16"), np.eye(4))
        image.header.set_slope_inter(0.5, 10)
        image.to_filename(tmp_path / f"{k}.nii")
    stored = np.asanyarray(nibabel.load(tmp_path / "0.nii").dataobj)
    data = opened(tmp_path)
    assert data.shape == (1, 3, 4, 5) and data.inferred["dtype"] == "float32"
    assert np.allclose(data.source.fetch([2])[0, 0].numpy(), stored)


def test_volumes_are_turned_to_one_orientation(tmp_path):
    """The same volume, stored mirrored and with other axes, with the affine that says so."""
    import nibabel

    stored = ramp(3, 4, 5)
    mirrored = np.diag([-2.0, 1.0, 1.0, 1.0])
    mirrored[0, 3] = 4  # of the first voxel, which is the last one of the first file
    permuted = np.array([[0, 0, 2.0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    files = [(stored, np.diag([2.0, 1.0, 1.0, 1.0])), (stored[::-1], mirrored), (stored.transpose(1, 2, 0), permuted)]
    for k, (values, affine) in enumerate(files):
        nibabel.Nifti1Image(values, affine).to_filename(tmp_path / f"{k}.nii")
    data = opened(tmp_path)
    assert data.shape == (1, 3, 4, 5) and "2 turned" in data.source.summary
    for k in range(3):
        assert np.array_equal(data.source.fetch([k])[0, 0].numpy(), stored)
    for name, k in (("train", 0), ("val", 1), ("more", 2)):
        (tmp_path / name).mkdir()
        for j in range(2):
            volume = nibabel.Nifti1Image(files[k][0] + np.float32(j), files[k][1])
            volume.to_filename(tmp_path / name / f"{j}.nii")
    with_val = opened(tmp_path / "train", val_root=str(tmp_path / "val"))
    stored_settings = {"channels": 1, "image_size": [3, 4, 5], "header": with_val.header}
    others = opened(tmp_path / "more", **stored_settings)  # a run opens other files than those it started with
    for source, count in ((with_val.source, 4), (others.source, 2)):
        assert "2 turned" in source.summary
        for k in range(count):
            assert np.array_equal(source.fetch([k])[0, 0].numpy(), stored + k % 2)
    turned = reorient(Sample(stored[::-1][None], {"affine": mirrored.tolist()}), files[0][1])
    assert np.array_equal(turned.header["affine"], files[0][1])


def test_stored_settings_need_no_files():
    stored = {"channels": 1, "image_size": [9], "value_range": (0, 5), "dtype": "float32", "file_type": ".npy"}
    data = module(Path("missing"), **stored)
    assert data.shape == (1, 9) and data.num_values is None
    assert data.denormalize(torch.ones(1, 1, 9)).max() == 5


def test_missing_label_file_names_its_setting(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 1, 8), np.float32) + np.arange(8, dtype=np.float32))
    with pytest.raises((ValueError, FileNotFoundError), match=r"data\.source\.labels"):
        opened(tmp_path / "a.npy", source_labels="gone.npy")


@pytest.mark.parametrize(
    ("shape", "dtype", "hinted"),
    [((30, 16, 16), "int16", True), ((20, 8, 9, 10), "uint8", True), ((30, 3, 16, 16), "uint8", False),
     ((20, 8, 9, 10), "float32", False)],
)  # fmt: skip
def test_ambiguous_channels_name_the_setting(shape, dtype, hinted, tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(0, 256, shape).astype(dtype))
    assert ("data.channels=1" in opened(tmp_path / "a.npy").source.summary) == hinted
    other = opened(tmp_path / "a.npy", channels=1) if hinted else None
    assert other is None or (other.shape == (1, *shape[1:]) and "data.channels" not in other.source.summary)


@pytest.mark.parametrize(
    ("shape", "expected"), [((9, 16, 20), (1, 16, 20)), ((9, 16, 20, 3), (3, 16, 20)), ((9, 2, 20), (2, 20))]
)
def test_arrays_of_bytes_are_images(shape, expected, tmp_path):
    x = np.random.default_rng(0).integers(0, 256, shape).astype("uint8")
    np.save(tmp_path / "a.npy", x)
    data = opened(tmp_path / "a.npy")
    assert data.shape == expected
    images = np.moveaxis(x, -1, 1) if x.ndim == 4 else x
    assert np.array_equal(data.source.fetch(range(9)).numpy(), images.reshape(9, *expected))


@pytest.mark.parametrize(
    ("names", "key", "labels", "samples", "classes", "held_out"),
    [
        ("train_images train_labels val_images val_labels test_images test_labels", None, None, (0, 2), (1, 3), 1),
        ("x_test x_train y_test y_train", None, None, (1,), (3,), None),
        ("x_test x_train y_test y_train", "x_test", None, (0,), (2,), None),
        ("data labels", None, None, (0,), (1,), None),
        ("X fine_labels coarse_labels", None, "coarse_labels", (0,), (2,), None),
        ("images targets_valid images_valid", None, None, (0, 2), None, 1),
    ],
)
def test_arrays_of_a_file_are_told_by_names(names, key, labels, samples, classes, held_out, tmp_path):
    """Each array has the values of its position: samples k + i / 10, labels 10 k + i."""
    names = names.split()
    tell = [any(word in name for word in ("label", "target", "y_")) for name in names]
    arrays = {
        name: 10 * k + np.arange(3)[:, None] if is_label else np.float32(k + np.arange(3)[:, None, None] / 10)
        for k, (name, is_label) in enumerate(zip(names, tell, strict=True))
    }
    np.savez(tmp_path / "all.npz", **arrays)
    source = opened(tmp_path / "all.npz", source_key=key, source_labels=labels).source
    expected = np.concatenate([arrays[names[k]] for k in samples])
    assert np.array_equal(source.fetch(range(len(source))).numpy(), expected)
    got = None if source.labels is None else [source.labels.classes[k] for k in source.labels.targets]
    assert got == (classes and [str(value) for k in classes for value in arrays[names[k]][:, 0]])
    assert source.val_mask is None if held_out is None else np.flatnonzero(source.val_mask).tolist() == [3, 4, 5]


# Folders for validation, and files of labels


def save_signals(root: Path, *names: str) -> None:
    """Write a different signal for each name."""
    for k, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(root / name, ramp(2, 5) + k)


def sides(data: ArrayDataModule) -> tuple[list[str], list[str]]:
    """Return the ids of training and validation samples."""
    return tuple(sorted(data.source.ids[k] for k in indices) for indices in (data.train_indices, data.val_indices))


@pytest.mark.parametrize("val_root", ["a", "a/../a", "link", "."])
def test_validation_folders_with_all_samples_are_refused(val_root, tmp_path):
    save_signals(tmp_path, "a/0.npy", "a/1.npy", "b/2.npy")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(ValueError, match=r"data\.val_root=.*data\.root=") as error:
        opened(tmp_path / "a", val_root=str(tmp_path / val_root))
    assert "\n" not in str(error.value)


def test_roots_that_share_samples_are_refused(tmp_path):
    save_signals(tmp_path, "a/0.npy", "a/in/1.npy")
    with pytest.raises(ValueError, match=r"data\.root="):
        ArrayDataModule(Arrays(), [str(tmp_path / "a"), str(tmp_path / "a" / "in")])


def test_validation_samples_are_not_trained(tmp_path):
    """Those of a folder inside of the root, and those that are links to other files."""
    save_signals(tmp_path, *(f"in/{k}.npy" for k in range(5)), "in/held/8.npy")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "linked.npy").symlink_to(tmp_path / "in" / "1.npy")
    (tmp_path / "out" / "same.npy").hardlink_to(tmp_path / "in" / "3.npy")
    (tmp_path / "links").mkdir()
    for path in sorted((tmp_path / "out").iterdir()):
        (tmp_path / "links" / path.name).symlink_to(path)
    settings = {"cache_dir": str(tmp_path / "cache")}
    inside = opened(tmp_path / "in", val_root=str(tmp_path / "in" / "held"), **settings)
    assert sides(inside) == ([f"0/{k}.npy" for k in range(5)], ["1/8.npy"])
    linked = opened(tmp_path / "in", val_root=str(tmp_path / "out"), **settings)
    assert sides(linked) == (["0/0.npy", "0/2.npy", "0/4.npy", "0/held/8.npy"], ["1/linked.npy", "1/same.npy"])
    assert linked.source.fetch(linked.val_indices)[:, 0, 0].sort().values.tolist() == [1, 3]
    with pytest.raises(ValueError, match=r"data\.val_root"):
        opened(tmp_path / "out", val_root=str(tmp_path / "links"), **settings)


def test_splits_of_samples_in_an_outer_folder_are_recognized(tmp_path):
    names = [f"x/{split}/{name}/{k}.npy" for split in ("train", "val", "test") for name in "ab" for k in range(2)]
    save_signals(tmp_path / "in", *names)
    data = opened(tmp_path / "in", cache_dir=str(tmp_path / "cache"))
    assert sides(data) == (names[:4], names[4:8]) and data.source.labels.classes == ["a", "b"]


def test_one_file_in_an_outer_folder_holds_all_samples(tmp_path):
    save_signals(tmp_path, "x/all.npy")
    np.save(tmp_path / "x" / "all.npy", ramp(9, 2, 5))
    assert len(opened(tmp_path).source) == 9


@pytest.mark.parametrize(
    "names", [("train.npy", "test.npy"), ("x_train.npy", "x_val.npy"), ("train/x.npy", "val/x.npy")]
)
def test_files_of_whole_splits_are_refused(names, tmp_path):
    """Each would be one sample, and that of the test set might be trained on."""
    for name in names:
        save_signals(tmp_path, name)
        np.save(tmp_path / name, ramp(9, 2, 5))
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"set data\.root={tmp_path / names[0]} "):
            module(tmp_path)
        np.save(tmp_path / "train_labels.npy", np.arange(9))


@pytest.mark.parametrize("labels", ["l.csv", "l.npy", "all.csv"])
@pytest.mark.parametrize("for_validation", [False, True])
def test_labels_of_several_roots_are_read(labels, for_validation, tmp_path):
    """From a table or integers in each root, or from one table of all files."""
    rows = {"a": "xyx", "b": "yyx"}
    lines = ["file,label"]
    for root, names in rows.items():
        save_signals(tmp_path / root, "0.npy", "1.npy", "2.npy")
        if labels == "l.npy":
            np.save(tmp_path / root / labels, np.array([7 + (name == "y") for name in names]))
        elif labels == "l.csv":
            table = [f"{k}.npy,{name}" for k, name in enumerate(names)]
            (tmp_path / root / labels).write_text("\n".join(["file,label", *table]))
        lines += [f"{tmp_path / root}/{k}.npy,{name}" for k, name in enumerate(names)]
    if labels == "all.csv":
        labels = str(tmp_path / labels)
        Path(labels).write_text("\n".join(lines))
    roots = [str(tmp_path / root) for root in rows]
    root, val_root = (roots[0], roots[1]) if for_validation else (roots, None)
    data = ArrayDataModule(Arrays(labels), root, cache_dir=str(tmp_path / "cache"), val_root=val_root)
    data.setup()
    assert data.source.labels.targets.tolist() == [0, 1, 0, 1, 1, 0]


def test_a_file_of_labels_is_not_a_sample(tmp_path):
    """By a relative or an absolute path, for one file or many."""
    save_signals(tmp_path / "many", *(f"{k}.npy" for k in range(4)))
    (tmp_path / "one").mkdir()
    np.save(tmp_path / "one" / "x.npy", ramp(4, 2, 5))
    for folder in (tmp_path / "one", tmp_path / "many"):
        np.save(folder / "y.npy", np.array([1, 0, 0, 1]))
        for labels in ("y.npy", "./y.npy", str(folder / "y.npy")):
            source = opened(folder, source_labels=labels, cache_dir=str(tmp_path / "cache")).source
            assert source.labels.targets.tolist() == [1, 0, 0, 1] and ", 2 classes" in source.summary


def test_file_of_labels_without_its_setting_is_reported(tmp_path):
    save_signals(tmp_path / "many", *(f"{k}.npy" for k in range(4)))
    (tmp_path / "one").mkdir()
    np.save(tmp_path / "one" / "x.npy", ramp(4, 2, 5))
    for folder in (tmp_path / "one", tmp_path / "many"):
        np.save(folder / "labels.npy", np.array([1, 0, 0, 1]))
        source = opened(folder, cache_dir=str(tmp_path / "cache")).source
        assert len(source) == 4 and source.labels is None
        assert "data.source.labels" in source.summary and "labels.npy" in source.summary


def test_one_file_takes_no_validation_folder(tmp_path):
    np.save(tmp_path / "x.npy", ramp(4, 2, 5))
    with pytest.raises(ValueError, match=r"data\.val_root=.*x\.npy has all samples; leave it out"):
        opened(tmp_path / "x.npy", val_root=str(tmp_path / "x.npy"))
