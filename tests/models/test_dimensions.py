"""One U-Net for signals, images and volumes: each number of dimensions against the one below."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from src.models.layers import conv3, depth_to_space, resample, space_to_depth
from src.models.unet import UNet, attended_resolutions, pad_to_multiple, stage_resolutions
from tests.models.test_models import count, normal, randomize

SETTINGS = {"channels": 2, "model_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1}
SIZES = {1: (11,), 2: (5, 8), 3: (3, 4, 5)}


def net_of(size: tuple[int, ...], **settings: object) -> UNet:
    return UNet(image_size=list(size), **{**SETTINGS, "attention_resolutions": (8,), **settings}).eval()


def lift(weight: Tensor, shape: torch.Size) -> Tensor:
    """Return a kernel that convolves along the last dimensions only."""
    if weight.shape == shape:
        return weight
    lifted = torch.zeros(shape)
    lifted[:, :, shape[2] // 2] = weight
    return lifted


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("resblock_updown", [False, True])
@torch.no_grad()
def test_repeated_data_give_the_net_below(dims, resblock_updown):
    """Kernels that act along the other dimensions keep equal slices equal, through every layer."""
    settings = {"resblock_updown": resblock_updown, "time_conditioning": "scale_shift" if resblock_updown else "add"}
    below = randomize(net_of((8,) * (dims - 1), **settings))
    net = net_of((8,) * dims, **settings)
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in below.named_parameters()]
    weights = below.state_dict()
    net.load_state_dict({name: lift(weights[name], each.shape) for name, each in net.state_dict().items()})
    x, time = normal(2, 2, *[8] * (dims - 1)), torch.tensor([0.1, 0.7])
    repeated = x[:, :, None].expand(-1, -1, 8, *x.shape[2:])
    expected = below(x, time)
    assert expected.std() > 0.1
    assert_close(net(repeated, time), expected[:, :, None].expand_as(repeated), rtol=1e-4, atol=1e-4)


def test_volume_convolution_equals_a_loop():
    x, conv = normal(1, 2, 3, 4, 2), conv3(3, 2, 3)
    out = conv(x)
    for o, *at in itertools.product(range(3), range(3), range(4), range(2)):
        total = conv.bias[o]
        for c, *offset in itertools.product(range(2), *[range(3)] * 3):
            place = [p + k - 1 for p, k in zip(at, offset, strict=True)]
            if all(0 <= p < n for p, n in zip(place, x.shape[2:], strict=True)):
                total = total + conv.weight[(o, c, *offset)] * x[(0, c, *place)]
        assert_close(out[(0, o, *at)], total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_patches_become_channels_and_return(dims):
    size, patch = (4, 6, 2)[:dims], 2
    x = normal(2, 3, *size)
    deep = space_to_depth(x, patch)
    assert deep.shape == (2, 3 * patch**dims, *(n // patch for n in size))
    for channel, *place in itertools.product(range(3), *map(range, size)):
        offset = 0
        for p in place:
            offset = offset * patch + p % patch
        moved = deep[(slice(None), channel * patch**dims + offset, *(p // patch for p in place))]
        assert torch.equal(moved, x[(slice(None), channel, *place)])
    assert torch.equal(depth_to_space(deep, patch), x)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_resampling_halves_and_doubles_every_side(dims):
    x = normal(1, 2, *[4] * dims)
    assert_close(resample(resample(x, "up"), "down"), x)
    assert_close(resample(x, "down").mean(), x.mean())


@pytest.mark.parametrize("dims", SIZES)
@pytest.mark.parametrize("patch_size", [1, 2])
def test_any_size_trains_every_parameter(dims, patch_size):
    """Also sizes that neither the patches nor the stages divide."""
    net = randomize(net_of(SIZES[dims], patch_size=patch_size, outputs=2, num_head_channels=8))
    x = normal(2, 2, *SIZES[dims])
    out = net(x, torch.tensor([0.2, 0.9]))
    assert out.shape == (2, 4, *SIZES[dims])
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert net.conv_in.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_attention_sees_every_position_of_a_signal():
    """The middle attends, so that the first value changes with the last."""
    net = randomize(net_of((64,)))
    x, time = normal(1, 2, 64).requires_grad_(False), torch.tensor([0.5])
    changed = x.clone()
    changed[..., -1] += 5
    assert (net(changed, time) - net(x, time))[..., 0].abs().max() > 1e-6


def test_padding_repeats_the_last_value_of_each_side():
    x = torch.arange(6.0).view(1, 1, 1, 2, 3)
    padded = pad_to_multiple(x, 2)
    assert padded.shape == (1, 1, 2, 2, 4)
    assert torch.equal(padded[..., 0, :, :], padded[..., 1, :, :])
    assert torch.equal(padded[..., 3], padded[..., 2])


def test_resolution_of_a_rectangle_is_the_geometric_mean():
    assert stage_resolutions((8, 32), 1, 2) == [16, 8]
    assert stage_resolutions((24, 24, 24), 2, 3) == [12, 6, 3]
    assert stage_resolutions((1000,), 1, 3) == [1000, 500, 250]
    assert attended_resolutions((16,), stage_resolutions((8, 32), 1, 3)) == {16}
    with_attention, without = (count(net_of((8, 32), attention_resolutions=r)) for r in ((16,), ()))
    assert with_attention > without


@pytest.mark.parametrize("image_size", [[], [4, 4, 4, 4], [0, 4], None])
def test_wrong_image_sizes_raise(image_size):
    with pytest.raises(ValueError, match=r"model\..*image_size"):
        UNet(**SETTINGS, image_size=image_size)


def test_winograd_for_signals_raises():
    with pytest.raises(ValueError, match=r"model\.conv_backend=winograd"):
        net_of((8,), conv_backend="winograd")
