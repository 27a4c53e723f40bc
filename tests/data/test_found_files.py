"""Which files of folders and archives are used, for what, and the messages about those that cannot be."""

import os
import shutil
import tarfile
import zipfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from src.data.array_files import open_numpy, read_file
from src.data.array_folders import find_arrays
from src.data.captions import captioned
from src.data.conditions import Classes
from src.data.decode import image_suffixes
from src.data.folder import find, folder
from src.data.image_source import ImageSource
from src.data.split import hash_ids, hash_threshold, split
from src.data.table_files import read_table
from src.errors import DataReadError

SHAPE = (4, 4)


def save(root: Path, *names: str) -> None:
    """Write a different image for each name."""
    for k, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng([k, len(name)]).integers(0, 256, SHAPE)
        values.flat[:2] = 0, 255
        Image.fromarray(values.astype(np.uint8)).save(path)


def open_folder(root: object, **settings: object) -> ImageSource:
    return folder(root, SHAPE, 1, cache=False, **settings)


# Files of two folders


def test_validation_images_below_the_root_are_not_trained(tmp_path):
    save(tmp_path, "cat/0.png", "cat/1.png", "dog/0.png", "held/cat/2.png", "held/dog/1.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "held/cat/2.png")
    (tmp_path / "pets").symlink_to(tmp_path / "held/dog")
    source = open_folder(str(tmp_path), val_root=str(tmp_path / "cat" / ".." / "held"))
    paths = [str(source.found.path(k).resolve().relative_to(tmp_path.resolve())) for k in range(len(source))]
    assert paths == ["cat/0.png", "cat/1.png", "dog/0.png", "held/cat/2.png", "held/dog/1.png"]
    assert source.val_mask.tolist() == [False] * 3 + [True] * 2
    assert source.labels.classes == ["cat", "dog"] and source.labels.targets.tolist() == [0, 0, 1, 0, 1]
    left_out = source.found.left_out
    assert sorted(left_out["used for validation"]) == ["held/cat/2.png", "held/dog/1.png", "link.png", "pets/1.png"]


def test_images_that_validation_images_link_to_are_not_trained(tmp_path):
    """By a symbolic or a hard link; a copy is another file, which src.doctor reports."""
    save(tmp_path, "in/0.png", "in/1.png", "in/2.png", "out/3.png")
    (tmp_path / "out" / "soft.png").symlink_to(tmp_path / "in" / "0.png")
    (tmp_path / "out" / "hard.png").hardlink_to(tmp_path / "in" / "2.png")
    found = find(str(tmp_path / "in"), str(tmp_path / "out"))
    assert list(found.names) == ["1.png", "3.png", "hard.png", "soft.png"]
    assert found.val_mask is not None and found.val_mask.tolist() == [False, True, True, True]
    assert found.left_out["used for validation"] == ["0.png", "2.png"]
    (tmp_path / "out" / "last.png").symlink_to(tmp_path / "in" / "1.png")
    with pytest.raises(ValueError, match=r"data\.root="):
        find(str(tmp_path / "in"), str(tmp_path / "out"))


@pytest.mark.parametrize("roots", [["a", "a/"], ["a/in", "b", "a"], ["b", "link"]])
def test_roots_that_share_files_are_refused(tmp_path, roots):
    save(tmp_path, "a/0.png", "a/in/1.png", "b/0.png")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    with pytest.raises(ValueError, match=r"data\.root=") as error:
        find([f"{tmp_path}/{root}" for root in roots])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("val_root", ["a", "a/../a", "."])
def test_validation_folders_with_all_images_are_refused(tmp_path, val_root):
    save(tmp_path, "a/0.png", "b/0.png")
    with pytest.raises(ValueError, match=r"data\.val_root=.*data\.root="):
        find([f"{tmp_path}/b", f"{tmp_path}/a"], f"{tmp_path}/{val_root}")


def test_left_out_files_of_other_roots_have_their_path(tmp_path):
    """A text that was read as a caption is not left out, whichever root has it."""
    save(tmp_path, "a/0.png", "b/1.png")
    for name in ("a/0.txt", "b/1.txt", "b/notes.md"):
        (tmp_path / name).write_text("text")
    source = captioned([str(tmp_path / "a"), str(tmp_path / "b")], SHAPE, 1, cache=False)
    assert [name for names in source.found.left_out.values() for name in names] == [str(tmp_path / "b" / "notes.md")]


def test_pipes_are_left_out(tmp_path):
    """Opening one would wait for a writer."""
    save(tmp_path, "0.png", "1.png")
    os.mkfifo(tmp_path / "pipe")
    found = find(str(tmp_path))
    assert len(found) == 2 and [name for names in found.left_out.values() for name in names] == ["pipe"]


@pytest.mark.parametrize("names", [["test/a/0.png", "test/b/0.png"], ["val/0.png", "x/test/1.png", "dev/2.png"]])
def test_folders_without_training_images_are_refused(tmp_path, names):
    tops = [name.removeprefix("x/") for name in names]
    save(tmp_path, *tops)
    with pytest.raises(ValueError, match=r"data\.root=.*no folder for training"):
        find(str(tmp_path))
    assert len(find(str(tmp_path / tops[0].split("/")[0]))) == sum(t[:3] == tops[0][:3] for t in tops)
    save(tmp_path, "train/3.png")
    assert "train/3.png" in find(str(tmp_path)).names


# One folder around everything


@pytest.mark.parametrize("packed", [None, "zip", "gztar"])
@pytest.mark.parametrize("outer", ["splits", "x/y"])
def test_splits_in_one_outer_folder_are_recognized(tmp_path, packed, outer):
    names = [f"{split}/{name}/{k}.png" for split in ("test", "train", "val") for name in "ab" for k in range(2)]
    save(tmp_path / "in" / outer, *names)
    (tmp_path / "in" / ".hidden").mkdir()
    root = shutil.make_archive(str(tmp_path / "x"), packed, tmp_path / "in") if packed else str(tmp_path / "in")
    source = open_folder(root)
    assert list(source.ids) == [f"{outer}/{name}" for name in names[4:]]
    assert source.val_mask.tolist() == [False] * 4 + [True] * 4
    assert source.labels.classes == ["a", "b"] and source.labels.targets.tolist() == [0, 0, 1, 1] * 2
    assert source.found.left_out["for testing"] == [f"{outer}/{name}" for name in names[:4]]
    assert open_folder(root, class_depth="all").labels.classes == ["a", "b"]


@pytest.mark.parametrize(
    ("names", "depth", "classes"),
    [
        (["wrap/a/0", "wrap/b/1"], 1, ["a", "b"]),
        (["wrap/a/0", "wrap/b/1"], 2, ["wrap/a", "wrap/b"]),
        (["wrap/a/0", "wrap/b/1"], "all", ["wrap/a", "wrap/b"]),
        (["w/x/a/p/0", "w/x/b/p/1"], 1, ["a", "b"]),
        (["wrap/train/a/0", "wrap/train/b/0"], 1, ["a", "b"]),
        (["train/a/0", "train/b/0"], 1, ["a", "b"]),
        (["train/a/x/0", "train/a/y/0"], 1, None),
        (["wrap/train/0", "wrap/bus/0"], 1, ["bus", "train"]),
        (["a/0", "a/1"], 1, None),
        (["0", "1"], 1, None),
    ],
)
def test_classes_in_one_outer_folder_are_recognized(tmp_path, names, depth, classes):
    save(tmp_path, *(f"{name}.png" for name in names))
    source = open_folder(str(tmp_path), class_depth=depth)
    assert (source.labels and source.labels.classes) == classes and len(source) == len(names)


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train2017", "val2017", "test2017"),
        ("Training Images", "validation_set", "TEST "),
        ("trainA", "valA", "testA"),
        ("seg_train", "seg-dev", "1. testset"),
        ("a/train", "a/val", "a/test"),
        ("a/train", "a/val", "a/ground_truth"),
        ("VOCtrainval_2007", "VOCval_2007", "VOCtest_2007"),
        ("trainimages", "valimages", "testimages"),
        ("train", "val", "trainval"),
    ],
)
def test_splits_have_a_word_in_their_names(tmp_path, train, val, test):
    """At the top, or in each folder of a class."""
    others = [f"{each.replace('a/', 'b/')}/1.png" for each in (train, val, test)] if train == "a/train" else []
    save(tmp_path, f"{train}/1.png", f"{train}/2.png", f"{val}/1.png", f"{test}/1.png", *others)
    source = open_folder(str(tmp_path))
    held_out = {name for name, held in zip(source.found.names, source.val_mask, strict=True) if held}
    assert held_out == {f"{val}/1.png", *others[1:2]}
    assert {*source.found.names} - held_out == {f"{train}/1.png", f"{train}/2.png", *others[:1]}
    assert {name for out in source.found.left_out.values() for name in out} == {f"{test}/1.png", *others[2:]}
    assert (source.labels and source.labels.classes) == (["a", "b"] if others else None)


@pytest.mark.parametrize(
    ("train", "val", "test", "classes"),
    [
        (["trainA", "trainB"], [], ["testA", "testB"], ["A", "B"]),
        (["train_A", "train_B"], ["val_A", "val_B"], ["test_A"], ["A", "B"]),
        (["A/train", "B/train"], [], ["A/test", "B/test"], ["A", "B"]),
        (["train/A", "train/B"], [], ["test/A", "test/B"], ["A", "B"]),
        (["bedroom_train", "tower_train"], ["bedroom_val", "tower_val"], [], ["bedroom", "tower"]),
        (["cars_train"], [], ["cars_test"], None),
        (["VOCtrainval_06-Nov-2007"], [], ["VOCtest_06-Nov-2007"], None),
        (["X2K_train_HR"], ["X2K_valid_HR"], [], None),
        (["seg_train/seg_train/a", "seg_train/seg_train/b"], [], ["seg_test/seg_test/a"], ["a", "b"]),
        (["train/images/a", "train/images/b"], ["val/images/a"], ["test/images"], ["a", "b"]),
        (["imagesTr"], [], ["imagesTs"], None),
        (["a", "b"], [], ["test"], ["a", "b"]),
        (["photos"], ["val"], ["test"], None),
        (["VOCtrainval_6/V/JPEGImages"], [], ["VOCtest_6/V/JPEGImages"], None),
        (["trainval"], [], ["test"], None),
        (["train/a/images", "train/b/images"], ["val/images"], ["test/images"], None),
    ],
)
def test_words_beside_that_of_the_split_are_classes(tmp_path, train, val, test, classes):
    save(tmp_path, *(f"{folder}/{k}.png" for folder in [*train, *val, *test] for k in range(3)))
    source = open_folder(str(tmp_path))
    assert {str(Path(name).parent) for name in source.found.names} == {*train, *val}
    held_out = [False] * len(source) if source.val_mask is None else source.val_mask
    assert {str(Path(n).parent) for n, held in zip(source.found.names, held_out, strict=True) if held} == {*val}
    assert len(source.found.left_out.get("for testing", [])) == 3 * len(test)
    assert (source.labels and source.labels.classes) == classes


@pytest.mark.parametrize(
    "names",
    [
        ["a/train/1.png", "a/test/2.png", "b/3.png"],
        ["train_1.png", "train_2.png", "a_test_3.png"],
        ["VOCtrainval_May/1.png", "VOCtest_Nov/2.png", "VOCtest_Nov/3.png"],
    ],
)
def test_images_named_test_beside_others_are_reported(tmp_path, names):
    save(tmp_path, *names)
    with pytest.warns(UserWarning, match=r"test\S* are used for training.*data\.root"):
        assert len(open_folder(str(tmp_path))) == 3


def test_validation_images_outside_of_classes_are_kept(tmp_path):
    """Although few of all images, as in ImageNet, whose classes of the validation images are in a table."""
    save(tmp_path, *(f"train/{name}/{k}.png" for name in "ab" for k in range(30)), "val/1.png")
    source = open_folder(str(tmp_path))
    assert source.labels is None and source.val_mask.sum() == 1
    assert "no classes, since 1 are outside of the 2 folders (val/1.png)" in source.summary


def test_folders_of_splits_are_no_level_of_classes(tmp_path):
    save(tmp_path, *(f"{name}/{split}/{k}.png" for name in "ab" for split in ("train", "val") for k in range(2)))
    source = open_folder(str(tmp_path))
    assert source.labels.classes == ["a", "b"] and "class_depth" not in source.summary
    assert open_folder(str(tmp_path), class_depth=2).labels.classes == ["a", "b"]


def test_shards_are_for_other_data(tmp_path):
    for k in range(2):
        with tarfile.open(tmp_path / f"{k}.tar", "w"):
            pass
    with pytest.raises(ValueError, match=r"data=webdataset \S*data\.urls=\S*\*\.tar"):
        find(str(tmp_path))


def test_other_names_with_train_are_classes(tmp_path):
    save(tmp_path, "train/1.png", "train_noise/1.png", "testbed/1.png", "test_日本/1.png")
    assert open_folder(str(tmp_path)).labels.classes == ["test_日本", "testbed", "train", "train_noise"]


def test_roots_of_one_class_each_keep_it(tmp_path):
    save(tmp_path, "0/a/x/0.png", "0/a/y/0.png", "1/b/0.png")
    assert open_folder([str(tmp_path / "0"), str(tmp_path / "1")]).labels.classes == ["a", "b"]


def test_one_name_in_two_unicode_forms_is_two_ids(tmp_path):
    """Alone, a name has the same id in both forms."""
    composed, decomposed = "\u00e9.png", "e\u0301.png"
    save(tmp_path, f"0/{decomposed}", f"1/{composed}", f"1/{decomposed}")
    assert list(find(str(tmp_path / "0")).ids()) == [composed]
    assert {*find(str(tmp_path / "1")).ids()} == {composed, decomposed}


# Files that cannot be read


@pytest.mark.parametrize(
    ("contents", "suffixes", "name"),
    [
        (b"PF\n2 2\n-1.0\n" + bytes(48), (".pfm", ".x"), "PFM"),
        (b"P7\nWIDTH 2\n", (".pam", ".png"), "PAM"),
        (b"\xff\x0a\0\0", (".jxl", ""), "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", (".jxl", ".png"), "JPEG XL"),
        (b"version https://git-lfs.github.com/spec/v1\n", (".png", ".dcm"), "Git LFS"),
    ],
)
def test_formats_that_are_not_read_are_named(tmp_path, contents, suffixes, name):
    """Of files with the ending of an image, and of others."""
    for suffix in suffixes:
        root = tmp_path / f"in{suffix}"
        save(root, "0.png")
        (root / f"a{suffix}").write_bytes(contents)
        with pytest.raises(DataReadError) if suffix in image_suffixes() else nullcontext() as error:
            source = folder(str(root), SHAPE, 1, cache_dir=str(root / ".cache"))
        assert name in (str(error.value) if error else source.summary)


@pytest.mark.parametrize("name", ["a.npy", "a.zip"])
def test_pointers_to_other_files_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 3\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        open_numpy(tmp_path / name) if name == "a.npy" else find(str(tmp_path / name))
    if name == "a.npy":
        shutil.copy(tmp_path / name, tmp_path / "b.npy")
        with pytest.raises(DataReadError, match="git lfs pull"):
            read_file(find_arrays(tmp_path), 0)


@pytest.mark.parametrize(
    ("options", "channels", "pages", "fix"),
    [
        ({"photometric": "minisblack", "planarconfig": "separate"}, 3, "first", "data.channels=12"),
        ({"photometric": "minisblack"}, 12, "first", "data.source.pages=channels"),
        ({"photometric": "minisblack"}, 5, "channels", "data.channels=12"),
    ],
)
def test_a_common_reason_brings_its_fix(tmp_path, options, channels, pages, fix):
    for k in range(2):
        values = np.random.default_rng(k).integers(0, 256, (12, 6, 6)).astype(np.uint8)
        tifffile.imwrite(tmp_path / f"{k}.tif", values, **options)
    with pytest.raises(DataReadError, match=r"2 of 2 .*0\.tif, 1\.tif") as error:
        folder(str(tmp_path), SHAPE, channels, pages=pages, skip_unreadable=0.9, cache_dir=str(tmp_path / ".cache"))
    assert str(error.value).endswith(f"set {fix}") and "skip_unreadable" not in str(error.value)


def test_files_with_various_reasons_are_checked(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "b.png").write_text("no image")
    with pytest.raises(DataReadError, match=r"a\.png: the file is empty, b\.png") as error:
        folder(str(tmp_path), SHAPE, 1, cache_dir=str(tmp_path / ".cache"))
    assert "skip_unreadable" not in str(error.value)


def zip_of(path: Path, **contents: bytes) -> str:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return str(path)


def test_backslashes_in_archives_separate_folders(tmp_path):
    """As some programs for Windows write them."""
    save(tmp_path, "a/1.png", "b/2.png")
    files = {name: (tmp_path / name).read_bytes() for name in ("a/1.png", "b/2.png")}
    archive = Path(zip_of(tmp_path / "x.zip", **files))
    archive.write_bytes(archive.read_bytes().replace(b"a/1.png", rb"a\1.png").replace(b"b/2.png", rb"b\2.png"))
    found = open_folder(str(archive)).found
    assert list(found.names) == [*files] and [found.open(k).read() for k in range(2)] == [*files.values()]


def test_names_in_archives_may_start_with_a_dot_and_a_slash(tmp_path):
    save(tmp_path, "1.png")
    archive = zip_of(tmp_path / "x.zip", **{"./a/1.png": (tmp_path / "1.png").read_bytes()})
    assert list(find(archive).names) == ["a/1.png"]


@pytest.mark.parametrize("packed", ["zip", "tar", "gztar"])
def test_replaced_files_of_archives_are_reported(tmp_path, packed):
    """The last of several files with one name is the current one, as after an update of the archive."""
    save(tmp_path, "0.png", "1.png", "2.png")
    contents = [(tmp_path / f"{k}.png").read_bytes() for k in range(3)]
    names = ["a.png", "b.png", "./a.png" if "tar" in packed else "a.png"]
    archive = tmp_path / "x"
    if packed == "zip":
        with zipfile.ZipFile(archive, "w") as out:
            out.writestr(names[0], contents[0])
            out.writestr(names[1], contents[1])
            with pytest.warns(UserWarning, match="Duplicate name"):
                out.writestr(names[2], contents[2])
    else:
        with tarfile.open(archive, "w:gz" if packed == "gztar" else "w") as out:
            for k, name in enumerate(names):
                out.add(tmp_path / f"{k}.png", name)
    source = open_folder(str(archive))
    assert [source.found.open(k).read() for k in range(2)] == [contents[2], contents[1]]
    assert "left out: 1 replaced" in source.summary and "(a.png)" in source.summary


def test_names_that_cannot_be_printed_are_escaped(tmp_path):
    save(tmp_path, "1.png", "2.png")
    (tmp_path / os.fsdecode(b"a\n\xff\x1b.txt")).write_text("")
    summary = open_folder(str(tmp_path)).summary
    assert summary.isprintable() and r"a\n\udcff\x1b.txt" in summary


@pytest.mark.parametrize("root", ["", None])
def test_an_empty_root_is_not_the_working_folder(tmp_path, monkeypatch, root):
    save(tmp_path, "1.png", "2.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"data\.root="):
        find(root)


def test_archives_with_damaged_names_are_refused(tmp_path):
    archive = Path(zip_of(tmp_path / "x.zip", é=b"0" * 99))
    archive.write_bytes(archive.read_bytes().replace("é".encode(), b"\xff\xfe"))
    with pytest.raises(ValueError, match=r"data\.root=.*x\.zip is cut off or damaged"):
        find(str(archive))


@pytest.mark.parametrize("encrypted", [False, True])
def test_unreadable_members_of_archives_have_a_reason(tmp_path, encrypted):
    save(tmp_path, "0.png")
    image = (tmp_path / "0.png").read_bytes()
    archive = Path(zip_of(tmp_path / "x.zip", **{"0.png": image, "1.png": image}))
    contents = bytearray(archive.read_bytes())
    if encrypted:
        contents[contents.index(b"PK\x01\x02") + 8] |= 1  # the flag of the first file in the list of files
        contents[6] |= 1
    else:
        contents[35 : 35 + len(image) // 2] = bytes(len(image) // 2)
    archive.write_bytes(contents)
    with pytest.raises(DataReadError, match=r"1 of 2 .*0\.png.*data\.skip_unreadable"):
        folder(str(archive), SHAPE, 1)
    source = folder(str(archive), SHAPE, 1, cache=False)
    assert source.fetch([1]).shape == (1, 1, *SHAPE)
    with pytest.raises(DataReadError, match=r"0\.png"):
        source.fetch([0])


def test_archives_that_cannot_be_read_are_refused(tmp_path):
    save(tmp_path, "0.png")
    image = (tmp_path / "0.png").read_bytes()
    archive = Path(zip_of(tmp_path / "x.zip", **{"0.png": image}))
    contents = bytearray(archive.read_bytes())
    archive.write_bytes(contents[:-30])
    with pytest.raises(ValueError, match=r"data\.root=.*x\.zip"):
        find(str(archive))
    contents[contents.index(b"PK\x01\x02") + 8] |= 1  # encrypted
    archive.write_bytes(contents)
    with pytest.raises(ValueError, match=r"data\.root=.*x\.zip is encrypted"):
        find(str(archive))


def test_captions_inside_an_archive_are_explained(tmp_path):
    save(tmp_path, "0.png")
    archive = zip_of(tmp_path / "x.zip", **{"0.png": (tmp_path / "0.png").read_bytes(), "0.txt": b"text"})
    with pytest.raises(ValueError, match=r"data\.root=.*unpack.*data\.source\.captions"):
        captioned(archive, SHAPE, 1)


def test_an_image_is_not_a_root(tmp_path):
    save(tmp_path, "a b/0.png")
    for settings in ((str(tmp_path / "a b/0.png"),), (str(tmp_path), str(tmp_path / "a b/0.png"))):
        with pytest.raises(FileNotFoundError, match="is one image") as error:
            find(*settings)
        assert str(tmp_path / "a b") in str(error.value).split(";")[1]


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_path_without_a_file_is_explained(tmp_path, kind):
    """Reading a pipe would wait forever."""
    save(tmp_path / "in", "0.png")
    paths = [tmp_path / name for name in ("x", "x.zip", "x.npy", "x.csv")]
    for path in paths:
        path.symlink_to(tmp_path / "gone") if kind == "link" else os.mkfifo(path)
    said = f"link to {tmp_path / 'gone'}" if kind == "link" else "neither a file nor a folder"
    calls = [partial(call, str(path)) for call in (find, find_arrays) for path in paths[:3]]
    calls += [partial(read_table, paths[3], "data.path"), partial(open_numpy, paths[2])]
    for call in calls:
        with pytest.raises((FileNotFoundError, ValueError), match=rf"{said}.*; set ") as error:
            call()
        assert "\n" not in str(error.value)


def test_one_image_cannot_be_split():
    with pytest.raises(ValueError, match="one sample"):
        split(hash_ids(["0.png"], 0), hash_threshold(0.1))


# Tables of labels


def test_tables_may_have_backslashes(tmp_path):
    save(tmp_path, "pets/cat/0.png", "pets/1.png")
    (tmp_path / "a.csv").write_text("file,label,age\npets\\1.png,y,2\npets\\cat\\0.png,x,1\n")
    source = open_folder(str(tmp_path), labels="a.csv", condition_columns=["age"])
    assert [source.labels.classes[k] for k in source.labels.targets] == ["y", "x"]
    assert list(source.ids) == ["pets/1.png", "pets/cat/0.png"] and source.covariates.values.tolist() == [[2], [1]]
    assert "conditions: 1 number (age) from a.csv" in source.summary


def test_columns_may_be_in_capitals(tmp_path):
    save(tmp_path, "0.png", "1.png")
    (tmp_path / "a.csv").write_text("File,Label,age\n0.png,x,1\n1.png,y,2\n")
    for columns in ([], ["age"]):
        assert open_folder(str(tmp_path), labels="a.csv", condition_columns=columns).labels.classes == ["x", "y"]
    (tmp_path / "a.csv").write_text("File,Label,label\n0.png,x,1\n1.png,y,2\n")
    assert open_folder(str(tmp_path), labels="a.csv").labels.classes == ["1", "2"]


def test_names_without_ending_are_explained(tmp_path):
    save(tmp_path, "00.png", "01.png")
    (tmp_path / "a.csv").write_text("file,label\n00,x\n01,y\n")
    with pytest.raises(ValueError, match=r"ending.*00\.png"):
        open_folder(str(tmp_path), labels="a.csv")


def test_every_root_may_have_a_table(tmp_path):
    save(tmp_path, "a/0.png", "b/0.png", "b/1.png", "c/0.png")
    (tmp_path / "b/t.csv").write_text("file,label\n0.png,x\n1.png,y\n")
    roots = [str(tmp_path / name) for name in "ab"]
    with pytest.raises(ValueError, match=r"1 of 3 .*a/0\.png.*a table of this name"):
        open_folder(roots, labels="t.csv")
    (tmp_path / "a/t.csv").write_text("file,label\n0.png,z\n../c/0.png,w\n")
    source = open_folder(roots, labels="t.csv", val_root=str(tmp_path / "c"))
    assert [source.labels.classes[k] for k in source.labels.targets] == ["z", "x", "y", "w"]


# Classes


@pytest.mark.parametrize("name", ["a\nb", "${oc.env:HOME}", "\udcff"])
def test_class_folders_with_odd_names_are_refused(tmp_path, name):
    save(tmp_path, f"{name}/0.png", "b/0.png")
    source = open_folder(str(tmp_path))
    assert sorted(source.labels.classes) == sorted([name, "b"])
    with pytest.raises(ValueError, match="rename its folder") as error:
        Classes.infer_settings(source, {})
    assert repr(name) in str(error.value) and str(error.value).isprintable()


def test_classes_only_in_validation_are_reported(tmp_path):
    save(tmp_path / "in", "cat/0.png", "dog/0.png")
    save(tmp_path / "out", "bird/0.png", "dog/0.png")
    source = open_folder(str(tmp_path / "in"), val_root=str(tmp_path / "out"))
    assert "1 of them only in validation (bird)" in source.summary
    assert "only in validation" not in open_folder([str(tmp_path / "in"), str(tmp_path / "out")]).summary


# Settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("background", "tranparent"),
        ("channel_names", ["a"]),
        ("condition_columns", ["age"]),
        ("file_column", "path"),
        ("label_column", "kind"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path, name, value):
    save(tmp_path, "cat/0.png", "dog/1.png")
    with pytest.raises(ValueError, match=rf"data\.source\.{name}="):
        open_folder(str(tmp_path), **{name: value})


@pytest.mark.parametrize("name", ["file_column", "caption_column"])
def test_columns_of_captions_need_a_table(tmp_path, name):
    save(tmp_path, "0.png")
    (tmp_path / "0.txt").write_text("text")
    with pytest.raises(ValueError, match=rf"data\.source\.{name}=.*data\.source\.captions"):
        captioned(str(tmp_path), SHAPE, 1, **{name: "x"})
