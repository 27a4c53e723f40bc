"""Winograd convolution against the direct one."""

import copy

import pytest
import torch
import torch.nn.functional as F

from src.models import winograd as module
from src.models.layers import ResidualBlock, Upsample
from src.models.unet import UNet
from src.models.winograd import Conv3x3, Tiles, winograd


def draw(*size: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("size", [(8, 8), (4, 12), (7, 14), (5, 3), (1, 1)])
@pytest.mark.parametrize("last", [torch.channels_last, torch.contiguous_format])
def test_winograd_and_its_gradients_equal_conv2d(size: tuple[int, int], last: torch.memory_format) -> None:
    x, weight, bias = draw(3, 5, *size), draw(6, 5, 3, 3, seed=1), draw(6, seed=2)
    given = x.contiguous(memory_format=last)
    y, plain = winograd(given, weight, bias), F.conv2d(given, weight, bias, padding=1)
    torch.testing.assert_close(y, plain, rtol=1e-12, atol=1e-12)
    upstream = draw(*y.shape, seed=3).detach()
    for ours, theirs in zip(
        *(torch.autograd.grad(out, (x, weight, bias), upstream) for out in (y, plain)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_winograd_passes_gradgradcheck() -> None:
    inputs = draw(1, 2, 5, 6), draw(2, 2, 3, 3, seed=1), draw(2, seed=2)
    assert torch.autograd.gradcheck(winograd, inputs)
    assert torch.autograd.gradgradcheck(winograd, inputs)


def test_tile_gradient_counts_overlaps() -> None:
    counts = torch.autograd.grad(Tiles.apply(x := draw(1, 1, 8, 8)).sum(), x)[0][0, 0]
    # Two where the end of one tile overlaps the start of another.
    along = torch.tensor([1, 1, 1, 2, 2, 1, 1, 1], dtype=torch.float64)
    assert torch.equal(counts, along[:, None] * along)


def test_winograd_float32_error_is_small() -> None:
    x, weight, bias = (v.detach() for v in (draw(4, 128, 16, 16), draw(128, 128, 3, 3, seed=1) / 34, draw(128, seed=2)))
    exact = F.conv2d(x, weight, bias, padding=1)
    y = winograd(x.float(), weight.float(), bias.float())
    assert (y - exact).norm() < 2e-6 * exact.norm()


def test_auto_backend_uses_winograd_where_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(module, "winograd", lambda *args: taken.append(args[0].shape) or winograd(*args))
    layer = Conv3x3(64, 64)
    plain = torch.nn.Conv2d(64, 64, 3, padding=1)
    plain.load_state_dict(layer.state_dict())
    # The last two sizes have too few tiles (3 x 16), and mostly padding (5 of 8 pixels).
    for size in ((4, 64, 16, 16), (64, 64, 4, 4), (4, 64, 14, 14), (3, 64, 16, 16), (64, 64, 5, 5)):
        x = draw(*size, dtype=torch.float32).detach()
        torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=5e-5)
    assert taken == [(4, 64, 16, 16), (64, 64, 4, 4), (4, 64, 14, 14)]
    taken.clear()
    x = draw(4, 64, 16, 16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    copy.deepcopy(layer).to(torch.bfloat16)(x.bfloat16())
    with monkeypatch.context() as compiling:
        compiling.setattr(torch.compiler, "is_compiling", lambda: True)
        layer(x)
    Conv3x3(32, 64)(draw(4, 32, 16, 16, dtype=torch.float32))
    Conv3x3(256, 256)(
        draw(31, 256, 4, 4, dtype=torch.float32)
    )  # enough work, but too few tiles for the filter transforms
    assert not taken
    Conv3x3(256, 256)(draw(32, 256, 4, 4, dtype=torch.float32))
    assert taken.pop() == (32, 256, 4, 4)
    with torch.no_grad():  # higher thresholds without a backward pass
        Conv3x3(64, 64)(draw(8, 64, 16, 16, dtype=torch.float32))
        Conv3x3(96, 96)(draw(5, 96, 16, 16, dtype=torch.float32))
        assert not taken
        Conv3x3(96, 96)(draw(6, 96, 16, 16, dtype=torch.float32))
    assert taken == [(6, 96, 16, 16)]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # the threshold of work is per thread
    assert not layer.winograd_pays(x)
    assert layer.winograd_pays(draw(8, 64, 16, 16, dtype=torch.float32))


def test_blocks_are_equal_with_either_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    block, grow = ResidualBlock(64, 128, 32, 16), Upsample(128)
    torch.nn.init.normal_(block.conv2.weight, std=0.02)
    x, emb = draw(4, 64, 16, 16, dtype=torch.float32), draw(4, 32, dtype=torch.float32, seed=1)
    assert block.conv1.winograd_pays(x)
    fast = torch.autograd.grad(grow(block(x, emb)).square().mean(), [x, *block.parameters(), *grow.parameters()])
    monkeypatch.setattr(Conv3x3, "winograd_pays", lambda *_: False)
    plain = torch.autograd.grad(grow(block(x, emb)).square().mean(), [x, *block.parameters(), *grow.parameters()])
    for ours, theirs in zip(fast, plain, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_backend_selects_the_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr(module, "winograd", lambda *args: sizes.append(tuple(args[0].shape)) or winograd(*args))
    small, large = draw(2, 64, 5, 5, dtype=torch.float32).detach(), draw(4, 64, 16, 16, dtype=torch.float32).detach()
    outputs = {}
    for backend, expected in (("torch", []), ("auto", [large.shape]), ("winograd", [small.shape, large.shape])):
        torch.manual_seed(0)
        layer = Conv3x3(64, 64, backend)
        outputs[backend] = [layer(small), layer(large)]
        assert sizes == expected, backend
        sizes.clear()
    for backend in ("auto", "winograd"):
        for ours, plain in zip(outputs[backend], outputs["torch"], strict=True):
            assert (ours - plain).norm() < 4e-6 * plain.norm()


def test_unet_passes_its_backend_to_all_convolutions() -> None:
    net = UNet(
        1, 16, model_channels=8, channel_mult=(1, 2), num_res_blocks=1, resblock_updown=True, conv_backend="torch"
    )
    plain = UNet(1, 16, model_channels=8, channel_mult=(1, 2), num_res_blocks=1, conv_backend="winograd")
    assert {m.backend for m in net.modules() if isinstance(m, Conv3x3)} == {"torch"}
    assert {m.backend for m in plain.modules() if isinstance(m, Conv3x3)} == {"winograd"}


def test_unknown_backend_raises() -> None:
    with pytest.raises(ValueError, match=r"model\.conv_backend=fast"):
        UNet(1, 8, model_channels=8, channel_mult=(1,), conv_backend="fast")
