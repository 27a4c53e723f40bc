"""Networks that start from the weights of others."""

from typing import Any

import torch
from torch import nn
from torch.testing import assert_close

from src.models.conditioning import ClassEmbedding
from src.models.mlp import MLP
from src.models.unet import UNet
from src.training.initial_weights import load_matching


def random_weights(net: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return net


def unet(channels: int, seed: int = 0, **settings: Any) -> nn.Module:
    size = settings.pop("image_size", 8)
    sizes = {"model_channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (4,)}
    return random_weights(UNet(channels, size, **(sizes | settings)), seed)


def test_further_channels_leave_predictions_of_the_others():
    for patch_size in (1, 2):
        for old_outputs, new_outputs in ((1, 1), (1, 2), (2, 1), (2, 2)):
            for old, new in ((1, 3), (3, 4), (3, 3)):
                trained = unet(old, 0, patch_size=patch_size, outputs=old_outputs)
                net = unet(new, 1, patch_size=patch_size, outputs=new_outputs)
                report = load_matching(net, trained.state_dict())
                assert report.new == report.unused == []
                x, time = torch.randn(2, new, 8, 8), torch.rand(2)
                theirs, ours = trained(x[:, :old], time), net(x, time)
                assert_close(ours[:, :old], theirs[:, :old])
                if old_outputs == new_outputs == 2:
                    assert_close(ours[:, new : new + old], theirs[:, old:])


def test_further_features_leave_predictions_of_an_mlp():
    trained, net = random_weights(MLP(2), 0), random_weights(MLP(5, outputs=2), 1)
    load_matching(net, trained.state_dict())
    x, time = torch.randn(7, 5), torch.rand(7)
    assert_close(net(x, time)[:, :2], trained(x[:, :2], time))


def test_equal_networks_share_every_weight():
    trained, net = unet(3, 0), unet(3, 1, image_size=16, attention_resolutions=(8,))
    report = load_matching(net, trained.state_dict())
    assert sorted(report.loaded) == sorted(net.state_dict())
    x, time = torch.randn(2, 3, 16, 16), torch.rand(2)
    assert torch.equal(net(x, time), trained(x, time))


def test_weights_that_do_not_fit_are_named_and_stay():
    trained = unet(3, 0, condition=lambda dim: ClassEmbedding(dim, 10))
    net = unet(1, 1, condition=lambda dim: ClassEmbedding(dim, 5), num_res_blocks=2)
    before = {name: weight.clone() for name, weight in net.state_dict().items()}
    report = load_matching(net, trained.state_dict())
    missing = {name.split()[0] for name in report.new}
    assert {"condition.table.weight", "conv_in.weight", "conv_out.weight", "conv_out.bias"} <= missing
    assert all(torch.equal(before[name], net.state_dict()[name]) for name in missing)
    assert sorted([*report.loaded, *missing]) == sorted(before) and report.partial == []
    assert "condition.table.weight (6, 64), not (11, 64)" in report.new
