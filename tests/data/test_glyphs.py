"""Glyphs: what is held out is never a sample, and drawings are kept."""

import pytest
import torch

from src.data.glyphs import Glyphs, GlyphSource, choose_held_out, load_glyphs, package_files
from src.data.split import hash_ids, hash_threshold, split


def grid(rows: int = 6, columns: int = 6) -> Glyphs:
    """Return one glyph for each combination of a row and a column, and one that is not a combination."""
    parts = [[f"row {r}", f"column {c}"] for r in range(rows) for c in range(columns)] + [[]]
    captions = [", ".join(each) or "alone" for each in parts]
    images = torch.arange(len(parts), dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4).contiguous()
    return Glyphs(images, [f"id{k}" for k in range(len(parts))], captions, parts)


def test_held_out_glyphs_are_not_among_the_samples():
    glyphs = grid()
    source = GlyphSource(glyphs, 7, min_others=3)
    assert len(source) == len(glyphs.ids) - 7
    left = {int(image[0, 0, 0]) for image in source.fetch(range(len(source)))}
    assert left == set(range(len(glyphs.ids))) - set(source.held_out)
    assert source.ids is not None and source.captions is not None
    for row, i in enumerate(source.seen):
        assert (source.ids[row], source.captions[row]) == (glyphs.ids[i], [glyphs.captions[i]])


def test_parts_of_held_out_glyphs_remain_elsewhere():
    glyphs = grid()
    for count, least in ((12, 3), (6, 5)):
        held_out = choose_held_out(glyphs, count, least)
        assert len(held_out) == count
        others = [glyphs.parts[i] for i in range(len(glyphs.ids)) if i not in held_out]
        for i in held_out:
            assert all(sum(part in other for other in others) >= least for part in glyphs.parts[i])


def test_other_glyphs_do_not_change_what_is_held_out_first():
    small, large = grid(), grid(7)
    by_id = {large.captions[i]: k for k, i in enumerate(choose_held_out(large, None, 1))}
    renamed = large._replace(ids=[f"id{small.captions.index(c)}" if c in small.captions else c for c in large.captions])
    first = [small.captions[i] for i in choose_held_out(small, 3, 1)]
    again = [large.captions[i] for i in choose_held_out(renamed, None, 1)]
    assert by_id and [caption for caption in again if caption in small.captions][:3] == first


def test_captions_that_two_glyphs_share_are_not_held_out():
    glyphs = grid()
    glyphs.captions[1] = glyphs.captions[0]
    assert not {0, 1} & set(choose_held_out(glyphs, None, 1))


def test_too_many_held_out_glyphs_are_refused():
    for count in (-1, 99):
        with pytest.raises(ValueError, match=rf"data\.source\.held_out={count} must be in \[0, \d+\]"):
            GlyphSource(grid(), count, 3)


def test_validation_samples_do_not_depend_on_held_out_ones():
    def validation(source: GlyphSource) -> set[str]:
        assert source.ids is not None
        val, _, _ = split(hash_ids(source.ids, 0), hash_threshold(0.3))
        return {source.ids[i] for i in val}

    everything, some = GlyphSource(grid(), 0, 3), GlyphSource(grid(), 9, 3)
    assert some.ids is not None
    assert validation(some) == validation(everything) & set(some.ids)


def test_stored_drawings_are_read_instead_of_drawn(tmp_path):
    calls = []

    def draw() -> Glyphs:
        calls.append(1)
        return grid()

    first = load_glyphs(str(tmp_path), ("grid", 4), draw)
    again = load_glyphs(str(tmp_path), ("grid", 4), draw)
    assert len(calls) == 1
    assert torch.equal(first.images, again.images) and first[1:] == again[1:] == grid()[1:]
    load_glyphs(str(tmp_path), ("grid", 5), draw)
    load_glyphs(None, ("grid", 4), draw)
    assert len(calls) == 3


def test_missing_package_names_its_installation():
    with pytest.raises(ValueError, match="pip install no-such-package"):
        package_files("no-such-package", "kanji")
