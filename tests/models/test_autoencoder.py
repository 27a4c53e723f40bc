"""The convolutional autoencoder: shapes, posterior and refused sizes."""

import math

import pytest
import torch
from torch.distributions import Normal
from torch.distributions import kl_divergence as divergence
from torch.testing import assert_close

from src.models.autoencoder import KLAutoencoder, kl_divergence
from src.models.layers import ResidualBlock


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return KLAutoencoder(3, [16, 8], latent_channels=2, model_channels=8, channel_mult=(1, 2, 2), num_res_blocks=1)


def test_each_stage_but_the_last_halves_sides(net):
    x = torch.rand(2, 3, 16, 8)
    mean, std = net.encode(x)
    assert mean.shape == std.shape == (2, net.latent_channels, 16 // net.factor, 8 // net.factor) == (2, 2, 4, 2)
    assert net.decode(mean).shape == x.shape
    single = KLAutoencoder(1, 5, model_channels=8, channel_mult=(1,), num_res_blocks=1)
    assert single.factor == 1
    assert single.encode(torch.rand(1, 1, 5, 5))[0].shape == (1, 4, 5, 5)


def test_other_sizes_are_encoded_and_decoded(net):
    assert net.decode(net.encode(torch.rand(1, 3, 20, 12))[0]).shape == (1, 3, 20, 12)


def test_divergence_equals_that_of_torch():
    torch.manual_seed(0)
    mean, logvar = torch.randn(3, 4, 2, 5), torch.randn(3, 4, 2, 5)
    expected = divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).sum((1, 2, 3))
    assert_close(kl_divergence(mean, logvar), expected)


def test_forward_decodes_a_sample_of_the_posterior(net):
    x, noise = torch.rand(2, 3, 16, 8), torch.randn(2, 2, 4, 2)
    out, (mean, std) = net(x, noise), net.encode(x)
    assert_close(out.latents, mean + std * noise)
    assert_close(out.images, net.decode(mean + std * noise))
    assert_close(out.logvar, 2 * std.log())


def test_variance_is_bounded():
    net = KLAutoencoder(1, 8, model_channels=8, channel_mult=(1, 1), num_res_blocks=1)
    for bias, expected in ((-1e4, math.exp(-15)), (1e4, math.exp(10))):
        torch.nn.init.constant_(net.encoder[-1].bias, bias)
        assert_close(net.encode(torch.rand(1, 1, 8, 8))[1], torch.full((1, 4, 4, 4), expected))


def test_every_weight_gets_a_gradient(net):
    out = net(torch.rand(2, 3, 16, 8), torch.randn(2, 2, 4, 2))
    (out.images.square().mean() + kl_divergence(out.mean, out.logvar).mean()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("size", [18, [16, 6], [16], [8, 8, 8]])
def test_sizes_that_do_not_divide_are_refused(size, net):
    with pytest.raises(ValueError, match=r"data\.image_size=.* 4 divides"):
        KLAutoencoder(3, size, model_channels=8)
    with pytest.raises(ValueError, match=r"data\.image_size="):
        net.encode(torch.rand(1, 3, 18, 16))


@pytest.mark.parametrize("name", ["latent_channels", "model_channels", "num_res_blocks", "channel_mult"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=rf"model\.{name}="):
        KLAutoencoder(3, 16, **{name: [] if name == "channel_mult" else 0})


def test_residual_block_without_embedding_adds_nothing():
    torch.manual_seed(0)
    plain, embedded = ResidualBlock(8, 4, None, 2), ResidualBlock(8, 4, 6, 2)
    torch.nn.init.normal_(embedded.conv2.weight)
    torch.nn.init.zeros_(embedded.emb.weight), torch.nn.init.zeros_(embedded.emb.bias)
    plain.load_state_dict({k: v for k, v in embedded.state_dict().items() if not k.startswith("emb.")})
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(plain(x), embedded(x, torch.randn(2, 6)))
