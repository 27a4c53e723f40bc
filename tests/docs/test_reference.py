"""docs/reference.md equals the output of docs/reference.py."""

from docs.reference import CONF, TARGET, included, reference, settings


def test_reference_matches_the_configuration_files():
    assert TARGET.read_text() == reference(), "conf/ has changed: run make reference"


def test_comment_of_a_base_reaches_its_options(tmp_path):
    (tmp_path / "_base.yaml").write_text("# a base\nwidth: 8 # of the network\ndepth: 2\n")
    (tmp_path / "small.yaml").write_text("# small\ndefaults: [_base]\nwidth: 4\nblock:\n  size: [1, 2] # pixels\n")
    assert [*included(tmp_path / "small.yaml")] == [tmp_path / "_base.yaml", tmp_path / "small.yaml"]
    assert settings(tmp_path / "small.yaml", "model") == [
        ("model.width", "4", "of the network"),
        ("model.depth", "2", ""),
        ("model.block.size", "[1, 2]", "pixels"),
    ]


def test_reference_lists_every_option():
    text = reference()
    options = {path for path in CONF.glob("*/**/*.yaml") if not path.stem.startswith("_")}
    assert [str(path) for path in options if f"| `{path.stem}`" not in text] == []
