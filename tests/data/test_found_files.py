"""Which files of folders and archives are used, for what, and the messages about those that cannot be."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src.data.folder import FolderImages, find, folder

SHAPE = (4, 4)


def save(root: Path, *names: str) -> None:
    """Write a different image for each name."""
    for k, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng([k, len(name)]).integers(0, 256, SHAPE)
        values.flat[:2] = 0, 255
        Image.fromarray(values.astype(np.uint8)).save(path)


def open_folder(root: object, **settings: object) -> FolderImages:
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
