"""Signals and volumes as pictures."""

import torch

from src.viz import images


def test_a_signal_is_a_line_from_bottom_to_top():
    ramp = torch.linspace(0, 255, 50).round().to(torch.uint8)[None]
    blue = (images.plot_signal(ramp).float() - torch.tensor([0, 114, 178.0]).view(3, 1, 1)).abs().sum(0) < 60
    rows, columns = blue.nonzero().T
    width, height = images.SIGNAL_SIZE
    assert columns.min() < 5 and columns.max() > width - 6
    slope = torch.corrcoef(torch.stack([rows.float(), columns.float()]))[0, 1]
    assert slope < -0.99 and rows.min() < 5 and rows.max() > height - 6


def test_channels_of_a_signal_differ_in_color():
    flat = torch.tensor([[60] * 9, [200] * 9], dtype=torch.uint8)
    red, _, blue = images.plot_signal(flat).float()
    height = len(red)
    (low,), (high,) = ((difference > 120).any(1).nonzero().T for difference in (blue - red, red - blue))
    assert high.max() < height / 2 < low.min()


def test_volumes_show_their_central_slices():
    x = torch.randint(256, (2, 1, 4, 6, 80), dtype=torch.uint8)
    shown = images.central_slices(x)
    assert shown.shape == (2, 1, 6, 80 + 1 + 80 + 1 + 6)
    assert torch.equal(shown[..., :80], x[:, :, 2])
    assert torch.equal(shown[..., :4, 81:161], x[:, :, :, 3])
    assert torch.equal(shown[..., :4, 162:], x[..., 40])


def test_every_picture_takes_signals_and_volumes(tmp_path):
    for shape in ((2, 20), (1, 4, 5, 6)):
        x = torch.randint(256, (4, *shape), dtype=torch.uint8)
        pictures = [
            images.draw_samples(x, x, ["a", "a", "b", "b"]),
            images.draw_trajectory([x, x], ["1", "2"]),
            images.neighbor_rows(x, x, torch.rand(4), 9),
            images.labeled_rows([x, x], ["samples", "real"]),
        ]
        assert all(min(picture.size) > 40 for picture in pictures)
        images.save_gif([x, x], tmp_path / "x.gif")
