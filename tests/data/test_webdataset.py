"""Shards written by webdataset: pixels, captions, classes, splits, downloads and errors."""

import contextlib
import gzip
import http.server
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from PIL import Image

from src.data import pixel_store
from src.runs.nodes import inline_aliases
from tests.conftest import compose

webdataset = pytest.importorskip("webdataset")

SHAPE = (6, 8)


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not during collection."""
    global shard_files, shard_index, shards
    from src.data import shard_files, shard_index
    from src.data.webdataset import shards


def pictures(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(count).integers(0, 256, (count, *SHAPE, 3), dtype=np.uint8))


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write(folder: Path, samples: list[dict[str, object]], per_shard: int = 100) -> str:
    """Write samples by the library, `per_shard` in each file; return the pattern of all."""
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(folder / "%04d.tar"), maxcount=per_shard, verbose=0) as writer:
        for k, sample in enumerate(samples):
            writer.write({"__key__": f"sample{k:03}", **sample})
    return f"{folder}/{{0000..{-(-len(samples) // per_shard) - 1:04}}}.tar"


def opened(tmp_path: Path, urls: object, **options: object):
    return shards(urls, SHAPE, 3, cache_dir=str(tmp_path / "cache"), **options)


def pixels(source) -> np.ndarray:
    """Return all images (N, H, W, C)."""
    return source.fetch(range(len(source))).permute(0, 2, 3, 1).numpy()


def named(source) -> list[str]:
    """Return the class of each image."""
    return [source.labels.classes[k] for k in source.labels.targets]


def with_texts(images: list[np.ndarray]) -> list[dict[str, object]]:
    return [{"png": png(image), "txt": f"number {k}", "cls": 10 - k % 2} for k, image in enumerate(images)]


def test_samples_keep_pixels_captions_and_classes(tmp_path):
    """Over several shards, in their order; classes that are numbers are sorted as such."""
    images = pictures(7)
    pattern = write(tmp_path / "in", with_texts(images), per_shard=3)
    source = opened(tmp_path, pattern)
    assert np.array_equal(pixels(source), images)
    assert source.captions == [[f"number {k}"] for k in range(7)]
    assert named(source) == ["10", "9", "10", "9", "10", "9", "10"] and source.labels.classes == ["9", "10"]
    assert list(source.ids)[:4] == [f"000{k // 3}.tar/sample{k:03}.png" for k in range(4)]
    assert list(source.stamps()) == [len(png(image)) for image in images]
    assert source.val_mask is None and "3 shards; 7 captions" in source.summary


def test_every_way_to_name_shards_gives_the_same_images(tmp_path):
    images = pictures(7)
    pattern = write(tmp_path / "in", with_texts(images), per_shard=3)
    files = [f"{tmp_path}/in/000{k}.tar" for k in range(3)]
    for urls in (f"{tmp_path}/in/*.tar", files, "::".join(files), f"file:{pattern}", [files[0], files[1], files[2]]):
        assert np.array_equal(pixels(opened(tmp_path, urls)), images)


def test_the_stored_index_has_the_same_samples(tmp_path, monkeypatch):
    """Shards are read once, and again after they changed."""
    pattern = write(tmp_path / "in", with_texts(pictures(4)), per_shard=2)
    first = opened(tmp_path, pattern, cache=False)
    with monkeypatch.context() as patched:
        patched.setattr(shard_index, "tar_places", None)
        again = opened(tmp_path, pattern, cache=False)
    assert np.array_equal(pixels(again), pixels(first))
    assert again.captions == first.captions and named(again) == named(first)
    assert list(again.ids) == list(first.ids)
    write(tmp_path / "in", with_texts(pictures(5)[:4]), per_shard=2)
    assert np.array_equal(pixels(opened(tmp_path, pattern)), pictures(5)[:4])


def test_captions_and_classes_from_json(tmp_path):
    """As text or as a list, and by other keys on request."""
    images = pictures(2)
    about = [
        {"caption": ["one", "two"], "label": "cat", "title": "x", "kind": 3},
        {"caption": "three", "label": "dog", "title": "y", "kind": 20},
    ]
    pattern = write(tmp_path / "in", [{"jpg": png(i), "json": a} for i, a in zip(images, about, strict=True)])
    source = opened(tmp_path, pattern)
    assert source.captions == [["one", "two"], ["three"]]
    assert named(source) == ["cat", "dog"]
    source = opened(tmp_path, pattern, caption_key="title", label_key="kind")
    assert source.captions == [["x"], ["y"]]
    assert named(source) == ["3", "20"] and source.labels.classes == ["3", "20"]


@pytest.mark.parametrize(
    ("about", "captions"),
    [(["one", "two"], [["one", "two"]]), ([{"box": [1, 2]}], None), ("text", None), (3, None), ([], None)],
)
def test_json_without_keys_is_read_or_reported(tmp_path, about, captions):
    source = opened(tmp_path, write(tmp_path / "in", [{"png": png(pictures(1)[0]), "json": json.dumps(about)}]))
    assert source.captions == captions and source.labels is None
    assert [name for names in source.found.left_out.values() for name in names] == (
        [] if captions else ["0000.tar/sample000.json"]
    )


@pytest.mark.parametrize("value", [{"a": 1}, [{"text": "one"}], [["one"]], 1.5, True])
def test_captions_of_other_types_are_refused(tmp_path, value):
    pattern = write(tmp_path / "in", [{"png": png(pictures(1)[0]), "json": {"caption": value}}])
    with pytest.raises(ValueError, match=r"sample000\.json has caption="):
        opened(tmp_path, pattern)


@pytest.mark.parametrize("names", [["a.png", "b.png", "a.png"], ["a.png", "a.PNG"]])
def test_samples_with_one_key_are_refused(tmp_path, names):
    """The last would replace the others."""
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, image in zip(names, pictures(3), strict=False):
            info = tarfile.TarInfo(name)
            info.size = len(png(image))
            archive.addfile(info, io.BytesIO(png(image)))
    with pytest.raises(ValueError, match=r"x\.tar: a has several files \.png"):
        opened(tmp_path, f"{tmp_path}/x.tar")


def test_the_ending_of_the_images_is_chosen(tmp_path):
    """Arrays beside an image are not images, and samples without one are reported."""
    images, masks = pictures(3), pictures(4)
    samples: list[dict[str, object]] = [
        {"photo.png": png(image), "mask.png": png(mask), "npy": np.zeros(3)}
        for image, mask in zip(images, masks[:3], strict=True)
    ]
    samples.append({"mask.png": png(masks[3])})
    pattern = write(tmp_path / "in", samples)
    with pytest.raises(ValueError, match=r"sample000 has the images .*data\.source\.image_key"):
        opened(tmp_path, pattern)
    source = opened(tmp_path, pattern, image_key="photo.png")
    assert np.array_equal(pixels(source), images)
    assert source.found.left_out == {"without an image": ["0000.tar/sample003"]}
    assert np.array_equal(pixels(opened(tmp_path, pattern, image_key="photo.png;mask.png")), [*images, masks[3]])
    pattern = write(tmp_path / "arrays", [{"png": png(images[0]), "npy": np.zeros(3)}])
    assert np.array_equal(pixels(opened(tmp_path, pattern)), images[:1])


@pytest.mark.parametrize("name", ["in/0001.tar", "in/../in/0001.tar", "link.tar", "folder/0001.tar", "same.tar"])
def test_shards_are_not_for_training_and_validation(tmp_path, name):
    """Under any name."""
    pattern = write(tmp_path / "in", with_texts(pictures(4)), per_shard=2)
    (tmp_path / "link.tar").symlink_to(tmp_path / "in" / "0001.tar")
    (tmp_path / "folder").symlink_to(tmp_path / "in")
    (tmp_path / "same.tar").hardlink_to(tmp_path / "in" / "0001.tar")
    with pytest.raises(ValueError, match=r"data\.val_urls=.*0001\.tar") as error:
        opened(tmp_path, pattern, val_root=f"{tmp_path}/{name}")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"data\.urls=.*0001\.tar"):
        opened(tmp_path, [pattern, f"{tmp_path}/{name}"])


def test_files_that_belong_to_no_sample_are_reported(tmp_path):
    """Names without an ending; a key ends at its first dot."""
    image = pictures(1)[0]
    for name, members in (("a", ["s0.png", "README", "._s0.png"]), ("b", ["v1.0.png", "v1.1.png"])):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            for member in members:
                info = tarfile.TarInfo(member)
                info.size = len(png(image))
                archive.addfile(info, io.BytesIO(png(image)))
    source = opened(tmp_path, f"{tmp_path}/a.tar")
    assert len(source) == 1 and [*source.found.left_out.values()] == [["a.tar/README", "a.tar/._s0.png"]]
    with pytest.raises(ValueError, match="keys without dots"):
        opened(tmp_path, f"{tmp_path}/b.tar")


def test_shards_of_validation_are_the_validation_set(tmp_path):
    train, val = pictures(4), pictures(2)
    source = opened(
        tmp_path, write(tmp_path / "a", with_texts(train), 2), val_root=write(tmp_path / "b", with_texts(val))
    )
    assert np.array_equal(pixels(source), [*train, *val])
    assert source.val_mask.tolist() == [False] * 4 + [True] * 2
    assert len({*source.ids}) == 6  # two shards have the name 0000.tar


def test_samples_without_a_caption_are_reported(tmp_path):
    """They are an error if the ending was typed."""
    samples = with_texts(pictures(3))
    samples[1].pop("txt")
    samples[2].pop("cls")
    pattern = write(tmp_path / "in", samples)
    source = opened(tmp_path, pattern)
    assert source.captions is None and source.labels is None
    assert "1 image without a caption" in source.summary and "1 image without a class" in source.summary
    for setting, name in (("caption_key", "txt"), ("label_key", "cls")):
        with pytest.raises(ValueError, match=rf"data\.source\.{setting}={name}: 1 of 3 samples"):
            opened(tmp_path, pattern, **{setting: name})


@pytest.mark.parametrize("rest", [0.5, 0.97])
def test_a_shard_that_is_cut_off_is_refused(tmp_path, rest):
    pattern = write(tmp_path / "in", with_texts(pictures(4)), per_shard=2)
    shard = tmp_path / "in" / "0001.tar"
    contents = shard.read_bytes()
    for end in (int(rest * len(contents.rstrip(b"\0"))), len(contents.rstrip(b"\0"))):
        shard.write_bytes(contents[:end])
        with pytest.raises(ValueError, match=r"0001\.tar cannot be read .*data\.urls") as error:
            opened(tmp_path, pattern)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("urls", "kind", "part"),
    [
        (None, ValueError, "data.urls=null"),
        ("nowhere/*.tar", FileNotFoundError, "data.urls="),
        ("in/{0000..0003}.tar", FileNotFoundError, "0002.tar"),
        ("in/{0000..0001.tar", ValueError, "braces"),
        ("s3://bucket/0.tar", ValueError, "http"),
        ("in/text.tar", ValueError, "not a tar file"),
        ("in", ValueError, "in/*.tar"),
        (["in/0000.tar", "in/*.tar"], ValueError, "0000.tar is named twice"),
        ("in/broken.tar", ValueError, "not JSON"),
    ],
)
def test_wrong_shards_are_refused(tmp_path, monkeypatch, urls, kind, part):
    write(tmp_path / "in", with_texts(pictures(4)), per_shard=2)
    (tmp_path / "in" / "text.tar").write_text("not a tar file")
    with webdataset.TarWriter(str(tmp_path / "in" / "broken.tar")) as writer:
        writer.write({"__key__": "a", "png": png(pictures(1)[0]), "json": b"{"})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind) as error:
        opened(tmp_path, urls)
    assert part in str(error.value) and "\n" not in str(error.value)


def test_compressed_shards_are_unpacked_once(tmp_path, monkeypatch):
    images = pictures(3)
    write(tmp_path / "in", with_texts(images))
    packed = tmp_path / "images.tar.gz"
    packed.write_bytes(gzip.compress((tmp_path / "in" / "0000.tar").read_bytes()))
    assert np.array_equal(pixels(opened(tmp_path, str(packed))), images)
    with monkeypatch.context() as patched:
        patched.setattr(shard_files.tarfile, "open", None)
        assert np.array_equal(pixels(opened(tmp_path, str(packed))), images)
    packed.write_bytes(packed.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"images\.tar\.gz cannot be read"):
        opened(tmp_path, str(packed))


@contextlib.contextmanager
def served(folder: Path, missing_bytes: int = 0) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder over HTTP; yield its URL and the paths that were requested."""
    requested: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requested.append(self.path)
            file = folder / self.path.lstrip("/")
            if not file.is_file():
                self.send_error(404)
                return
            contents = file.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(contents)))
            self.end_headers()
            self.wfile.write(contents[: len(contents) - missing_bytes])

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requested
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_shards_are_downloaded_once(tmp_path):
    images = pictures(4)
    write(tmp_path / "in", with_texts(images), per_shard=2)
    with served(tmp_path / "in") as (url, requested):
        for _ in range(2):
            assert np.array_equal(pixels(opened(tmp_path, f"{url}/{{0000..0001}}.tar")), images)
        assert requested == ["/0000.tar", "/0001.tar"]
        with pytest.raises(ValueError, match=r"data\.urls=.*0002.*cannot be downloaded .*404") as error:
            opened(tmp_path, f"{url}/{{0001..0002}}.tar")
    assert "\n" not in str(error.value)


def test_an_incomplete_download_leaves_nothing(tmp_path):
    images = pictures(2)
    write(tmp_path / "in", with_texts(images))
    with served(tmp_path / "in", missing_bytes=100) as (url, _), pytest.raises(ValueError, match="bytes arrived"):
        opened(tmp_path, f"{url}/0000.tar")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"] == []


def test_many_images_are_decoded_in_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(pixel_store, "MIN_PARALLEL", 10)
    monkeypatch.setattr(pixel_store, "CHUNK", 7)
    images = pictures(40)
    assert np.array_equal(pixels(opened(tmp_path, write(tmp_path / "in", with_texts(images), 15))), images)


def test_the_configuration_opens_shards(tmp_path):
    """Braces are typed in quotes within quotes; the same samples are held out wherever the shards lie."""
    images = pictures(30)
    held_out = []
    for folder in ("a", "b"):
        pattern = write(tmp_path / folder, with_texts(images), per_shard=10)
        settings = [f'data.urls="{pattern}"', f"data.cache_dir='{tmp_path / 'cache'}'", "data.image_size=[6,8]"]
        cfg = compose("train", "data=webdataset", "run_dir=x", *settings, "data.num_workers=0")
        data = instantiate(inline_aliases(cfg.data, "data"))
        data.setup()
        held_out.append(data.val_indices)
        expected = np.stack([images[k] for k in data.train_indices])
        assert np.array_equal(data.source.fetch(data.train_indices).permute(0, 2, 3, 1).numpy(), expected)
    assert held_out[0] == held_out[1] != []


def test_files_take_precedence_over_json(tmp_path):
    sample = {"png": png(pictures(1)[0]), "txt": "from the file", "cls": "7", "json": json.dumps({"caption": "no"})}
    source = opened(tmp_path, write(tmp_path / "in", [sample, {**sample, "png": png(pictures(2)[1])}]))
    assert source.captions == [["from the file"]] * 2 and named(source) == ["7", "7"]
