"""Networks against diffusers' UNet2DModel and against written-out formulas."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.testing import assert_close

from src.config.search_path import CONF
from src.models.layers import (
    Downsample,
    ResidualBlock,
    SelfAttention,
    TimeEmbedding,
    fit_groups,
    sinusoidal_embedding,
)
from src.models.mlp import MLP
from src.models.unet import Layer, UNet, attended_resolutions, pad_to_multiple, stage_resolutions

TINY = {
    "channels": 1,
    "image_size": 8,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (4,),
}

ALIKE = {
    "ddpm": {
        "channels": 3,
        "image_size": 16,
        "model_channels": 32,
        "channel_mult": (1, 2, 2),
        "num_res_blocks": 2,
        "attention_resolutions": (8,),
    },
    "adm": {
        "channels": 3,
        "image_size": 16,
        "model_channels": 24,
        "channel_mult": (1, 2, 3),
        "num_res_blocks": 1,
        "attention_resolutions": (8, 4),
        "num_head_channels": 12,
        "time_conditioning": "scale_shift",
        "resblock_updown": True,
    },
    "scale_shift with convolutions between": {
        "channels": 1,
        "image_size": 8,
        "model_channels": 16,
        "channel_mult": (1, 3),
        "num_res_blocks": 2,
        "attention_resolutions": (8,),
        "num_head_channels": 8,
        "time_conditioning": "scale_shift",
    },
    "add with resampling blocks": {
        "channels": 1,
        "image_size": 16,
        "model_channels": 8,
        "channel_mult": (1, 2, 4),
        "num_res_blocks": 3,
        "attention_resolutions": (),
        "num_head_channels": 4,
        "resblock_updown": True,
    },
    "one stage": {
        "channels": 1,
        "image_size": 5,
        "model_channels": 12,
        "channel_mult": (1,),
        "num_res_blocks": 1,
        "attention_resolutions": (5,),
    },
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads slow down networks of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomize(net: nn.Module, seed: int = 0) -> nn.Module:
    """Set every parameter to random values that keep activations of order 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if parameter.ndim > 1:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            else:
                parameter.copy_(0.1 * noise + (1 if name.endswith("weight") else 0))  # weight of a norm, or bias
    return net


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def preset(name: str, data: str) -> nn.Module:
    """Return the network of a YAML on the meta device."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("train", overrides=[f"model={name}", f"data={data}"])
    with torch.device("meta"):
        return instantiate(cfg.model)


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def expected_count(
    channels: int,
    model_channels: int,
    channel_mult: tuple[int, ...],
    num_res_blocks: int,
    attended: set[int],
    modulations: int = 1,
) -> int:
    """Return the parameters of Ho et al.'s U-Net, layer by layer; `modulations` is 2 for scale and shift."""

    def conv(a: int, b: int, k: int = 3) -> int:
        return k * k * a * b + b

    def linear(a: int, b: int) -> int:
        return a * b + b

    def residual(a: int, b: int) -> int:
        shortcut = conv(a, b, 1) if a != b else 0
        return 2 * a + conv(a, b) + linear(4 * model_channels, modulations * b) + 2 * b + conv(b, b) + shortcut

    def attention(a: int) -> int:
        return 2 * a + 4 * linear(a, a)

    widths = [model_channels * m for m in channel_mult]
    last = len(widths) - 1
    total = (
        linear(model_channels, 4 * model_channels)
        + linear(4 * model_channels, 4 * model_channels)
        + conv(channels, model_channels)
    )
    skips, c = [model_channels], model_channels
    for stage, w in enumerate(widths):
        for _ in range(num_res_blocks):
            total += residual(c, w) + (attention(w) if stage in attended else 0)
            c = w
            skips.append(c)
        if stage < last:
            total += conv(c, c)
            skips.append(c)
    total += 2 * residual(c, c) + attention(c)
    for stage in range(last, -1, -1):
        for _ in range(num_res_blocks + 1):
            total += residual(c + skips.pop(), widths[stage]) + (attention(widths[stage]) if stage in attended else 0)
            c = widths[stage]
        if stage > 0:
            total += conv(c, c)
    return total + 2 * c + conv(c, channels)


def diffusers_twin(settings: dict) -> nn.Module:
    """Return the UNet2DModel with the architecture of `settings`."""
    from diffusers import UNet2DModel

    resampling = settings.get("resblock_updown", False)
    sizes = [-(-settings["image_size"] // 2**i) for i in range(len(settings["channel_mult"]))]

    def kind(size: int, way: str) -> str:
        if size in settings["attention_resolutions"]:
            return f"Attn{way}Block2D"
        return f"Resnet{way}sampleBlock2D" if resampling else f"{way}Block2D"

    groups = fit_groups(settings["model_channels"])
    return UNet2DModel(
        sample_size=settings["image_size"],
        in_channels=settings["channels"],
        out_channels=settings["channels"] * settings.get("outputs", 1),
        flip_sin_to_cos=False,
        freq_shift=1,
        down_block_types=tuple(kind(s, "Down") for s in sizes),
        up_block_types=tuple(kind(s, "Up") for s in reversed(sizes)),
        block_out_channels=tuple(settings["model_channels"] * m for m in settings["channel_mult"]),
        layers_per_block=settings["num_res_blocks"],
        downsample_padding=1,
        downsample_type="resnet" if resampling else "conv",
        upsample_type="resnet" if resampling else "conv",
        attention_head_dim=settings.get("num_head_channels"),
        norm_num_groups=groups,
        attn_norm_num_groups=groups,
        norm_eps=1e-5,
        num_class_embeds=settings.get("classes"),
        resnet_time_scale_shift="scale_shift" if settings.get("time_conditioning") == "scale_shift" else "default",
    ).eval()


def copy_weights(ours: UNet, theirs: nn.Module) -> None:
    """Copy the weights of `ours` to `theirs`, which strict loading requires to be complete."""
    state = {}

    def put(name: str, module: nn.Module) -> None:
        state.update({f"{name}.{k}": v for k, v in module.state_dict().items()})

    def put_residual(name: str, block: ResidualBlock) -> None:
        for part, mine in (("norm1", block.norm1), ("conv1", block.conv1), ("time_emb_proj", block.emb)):
            put(f"{name}.{part}", mine)
        put(f"{name}.norm2", block.norm2)
        put(f"{name}.conv2", block.conv2)
        put(f"{name}.conv_shortcut", block.shortcut)

    def put_attention(name: str, attention: SelfAttention) -> None:
        put(f"{name}.group_norm", attention.norm)
        put(f"{name}.to_out.0", attention.out)
        for kind in ("weight", "bias"):
            for letter, part in zip("qkv", getattr(attention.qkv, kind).chunk(3), strict=True):
                state[f"{name}.to_{letter}.{kind}"] = part

    def put_path(side: str, modules: nn.ModuleList, change: str) -> None:
        block, index = 0, 0
        for module in modules:
            if isinstance(module, Layer):
                put_residual(f"{side}_blocks.{block}.resnets.{index}", module.residual)
                if module.attention is not None:
                    put_attention(f"{side}_blocks.{block}.attentions.{index}", module.attention)
                index += 1
            else:
                name = f"{side}_blocks.{block}.{change}.0"
                if isinstance(module, ResidualBlock):
                    put_residual(name, module)
                else:
                    put(f"{name}.conv", module.conv)
                block, index = block + 1, 0

    put("time_embedding.linear_1", ours.time.linear1)
    put("time_embedding.linear_2", ours.time.linear2)
    if ours.condition is not None:
        put("class_embedding", ours.condition.table)
    put("conv_in", ours.conv_in)
    put_path("down", ours.down, "downsamplers")
    put_residual("mid_block.resnets.0", ours.middle[0])
    put_attention("mid_block.attentions.0", ours.middle[1])
    put_residual("mid_block.resnets.1", ours.middle[2])
    put_path("up", ours.up, "upsamplers")
    put("conv_norm_out", ours.norm_out)
    put("conv_out", ours.conv_out)
    theirs.load_state_dict(state, strict=True)


@pytest.mark.parametrize("name", ALIKE)
@torch.no_grad()
def test_unet_equals_diffusers_unet2d(name):
    """With copied weights."""
    settings = ALIKE[name]
    ours = randomize(UNet(**settings)).eval()
    theirs = diffusers_twin(settings)
    copy_weights(ours, theirs)
    assert count(ours) == count(theirs)

    size = settings["image_size"]
    x = normal(3, settings["channels"], size, size)
    time = torch.tensor([1 / 1000, 0.05, 0.5])  # float32 angles differ by 1e-4 at later times
    expected = theirs(x, 1000 * time).sample
    assert expected.abs().mean() > 0.1  # not a trivial comparison
    assert_close(ours(x, time), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_outputs_equal_extra_channels_of_diffusers():
    """outputs=2 is UNet2DModel with twice the out_channels."""
    settings = {**TINY, "channels": 3, "outputs": 2}
    ours = randomize(UNet(**settings)).eval()
    theirs = diffusers_twin(settings)
    copy_weights(ours, theirs)
    x, time = normal(2, 3, 8, 8), torch.tensor([0.1, 0.3])
    out = ours(x, time)
    assert out.shape == (2, 6, 8, 8)
    assert_close(out, theirs(x, 1000 * time).sample, rtol=1e-5, atol=1e-5)


def test_unet_ddpm_has_35_7_million_parameters():
    """Ho et al. 2020, app. B; exactly 35,746,307."""
    assert expected_count(3, 128, (1, 2, 2, 2), 2, {1}) == 35_746_307
    assert count(preset("unet_ddpm", "cifar10")) == 35_746_307


def test_tiny_and_small_unets_have_documented_sizes():
    """0.76 M at 8x8 and 6 M."""
    tiny, small = count(preset("unet_tiny", "digits")), count(preset("unet_small", "mnist"))
    assert tiny == expected_count(1, 32, (1, 2), 1, {1}, modulations=2)
    assert small == expected_count(1, 64, (1, 2, 2), 2, {1})
    assert round(tiny / 1e6, 2) == 0.76
    assert round(small / 1e6) == 6


def test_unet_adm_is_the_64_pixel_adm():
    """296 M with 1000 class embeddings and a learned variance."""
    ours = count(preset("unet_adm", "celeba"))
    classes, variance = 1000 * 4 * 192, 3 * (9 * 192 + 1)
    assert round((ours + classes + variance) / 1e6) == 296


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (8, 8), (9, 16), (28, 28), (3, 1)])
@pytest.mark.parametrize("resblock_updown", [False, True])
@torch.no_grad()
def test_unet_takes_any_height_and_width(size, resblock_updown):
    """Even where the stages do not divide the size."""
    net = randomize(UNet(**{**TINY, "channel_mult": (1, 1, 2), "resblock_updown": resblock_updown}))
    out = net(normal(2, 1, *size), torch.tensor([0.2, 0.9]))
    assert out.shape == (2, 1, *size)
    assert out.isfinite().all()


@pytest.mark.parametrize("size", [(5, 7), (8, 8), (3, 4)])
@torch.no_grad()
def test_padding_repeats_the_edge_and_is_cropped(size):
    """Against numpy's edge padding; a divisible size is not padded."""
    net = randomize(UNet(**{**TINY, "channel_mult": (1, 2, 2)}))
    x, time = normal(2, 1, *size), torch.tensor([0.2, 0.9])
    missing = [(-n) % 4 for n in size]
    by_hand = torch.from_numpy(np.pad(x.numpy(), ((0, 0), (0, 0), (0, missing[0]), (0, missing[1])), mode="edge"))
    assert_close(pad_to_multiple(x, 4), by_hand, rtol=0, atol=0)
    assert (pad_to_multiple(x, 4) is x) == (missing == [0, 0])
    assert_close(net(x, time), net(by_hand, time)[..., : size[0], : size[1]], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "outputs"),
    [
        (lambda: UNet(**TINY), 1),
        (lambda: UNet(**{**TINY, "time_conditioning": "scale_shift", "resblock_updown": True, "outputs": 2}), 2),
        (lambda: MLP(2, hidden_size=8, num_res_blocks=2), 1),
        (lambda: MLP(2, hidden_size=8, num_res_blocks=1, outputs=2), 2),
    ],
    ids=["ddpm", "adm of two outputs", "mlp", "mlp of two outputs"],
)
def test_networks_output_zero_at_initialization(make, outputs):
    """With `outputs` times the input channels."""
    net = make()
    x = normal(2, 1, 8, 8) if isinstance(net, UNet) else normal(2, 2)
    out = net(x, torch.tensor([0.1, 0.9]))
    assert out.shape == (2, x.shape[1] * outputs, *x.shape[2:])
    assert torch.count_nonzero(out) == 0


def test_residual_branches_are_identities_at_initialization():
    x, emb = normal(2, 8, 4, 4), normal(2, 6)
    for time_conditioning in ("add", "scale_shift"):
        assert_close(ResidualBlock(8, 8, 6, 2, time_conditioning)(x, emb), x, rtol=0, atol=0)
    assert_close(SelfAttention(8, 2, 2)(x), x, rtol=0, atol=0)


def test_attention_resolutions_select_the_nearest_stage():
    """16 pixels select the stage of 14x14 at 28x28 images, and that of 16x16 at any patch size."""
    for image_size, patch_size, requested, attended in (
        (28, 1, (16,), {14}), (28, 1, (14,), {14}), (32, 1, (16, 8), {16, 8}), (32, 2, (8, 4), {8, 4}),
        (28, 2, (8, 4), {7, 4}), (8, 1, (4,), {4}), (5, 1, (2,), {2}), (64, 1, (), set()),
    ):  # fmt: skip
        assert attended_resolutions(requested, stage_resolutions((image_size, image_size), patch_size, 3)) == attended


def test_attention_resolutions_without_a_stage_warn():
    """ADM ignores them silently. The warning has two settings to type, which do not warn."""
    settings = {"channels": 1, "image_size": 28, "model_channels": 8, "channel_mult": (1, 1, 1)}
    with pytest.warns(
        UserWarning, match=r"model\.attention_resolutions=\[64, 14, 2\].*\[64, 2\].*\[28, 14, 7\]"
    ) as seen:
        net = UNet(**settings, attention_resolutions=(64, 14, 2))
    typed = re.findall(r"\[([\d,]*)\]", str(seen[0].message))
    same, more = (UNet(**settings, attention_resolutions=tuple(map(int, each.split(",")))) for each in typed)
    assert count(net) == count(same) < count(more)
    assert count(more) == count(UNet(**settings, attention_resolutions=(28, 14, 7)))


def test_attention_resolutions_below_one_raise():
    with pytest.raises(ValueError, match=r"model\.attention_resolutions=\[0\]"):
        UNet(**{**TINY, "attention_resolutions": (0,)})


@pytest.mark.parametrize("wrong", [{"num_head_channels": 5}, {"num_head_channels": 64}, {"num_heads": 3}])
def test_heads_that_do_not_divide_raise(wrong):
    ((setting, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"model\.{setting}={value} .*16"):
        UNet(**{**TINY, **wrong})


@pytest.mark.parametrize(
    "wrong", [{"channels": 0}, {"num_res_blocks": 0}, {"channel_mult": ()}, {"channel_mult": (1, 0)}]
)
def test_sizes_below_one_raise(wrong):
    ((setting, value),) = wrong.items()
    with pytest.raises(
        ValueError, match=re.escape(f"model.{setting}={list(value) if isinstance(value, tuple) else value} ")
    ):
        UNet(**{**TINY, "attention_resolutions": (), **wrong})


@pytest.mark.parametrize("wrong", [{"features": 0}, {"hidden_size": 0}, {"num_res_blocks": 0}, {"outputs": 0}])
def test_mlp_sizes_below_one_raise(wrong):
    with pytest.raises(ValueError, match=f"model.{next(iter(wrong))}=0 "):
        MLP(**{"features": 2, "hidden_size": 8, "num_res_blocks": 1, "outputs": 1, **wrong})


def test_odd_time_width_raises():
    with pytest.raises(ValueError, match=r"width=7 .*even"):
        TimeEmbedding(7, 8)


@torch.no_grad()
def test_num_heads_equals_num_head_channels():
    """num_heads=2 of 16 channels is num_head_channels=8."""
    settings = {**TINY, "model_channels": 16, "channel_mult": (1,), "attention_resolutions": (8,)}
    by_heads = randomize(UNet(**settings, num_heads=2)).eval()
    by_channels = UNet(**settings, num_head_channels=8).eval()
    by_channels.load_state_dict(by_heads.state_dict())
    one_head = UNet(**settings).eval()
    one_head.load_state_dict(by_heads.state_dict())
    x, time = normal(2, 1, 8, 8), torch.tensor([0.2, 0.9])
    assert_close(by_heads(x, time), by_channels(x, time), rtol=0, atol=0)
    assert (by_heads(x, time) - one_head(x, time)).abs().max() > 1e-3


@torch.no_grad()
def test_attention_equals_softmax_of_scaled_products():
    """Head by head in float64 (Vaswani et al. 2017, eq. 1)."""
    attention = randomize(SelfAttention(8, 2, num_heads=2).double())
    x = normal(2, 8, 3, 5).double()
    tokens = F.group_norm(x, 2, attention.norm.weight, attention.norm.bias, 1e-5).flatten(2).mT
    weights, biases = attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3)
    q, k, v = (tokens @ w.T + b for w, b in zip(weights, biases, strict=True))
    mixed = []
    for part in (slice(0, 4), slice(4, 8)):
        shares = torch.exp(q[..., part] @ k[..., part].mT / 2)
        mixed.append(shares / shares.sum(-1, keepdim=True) @ v[..., part])
    out = torch.cat(mixed, -1) @ attention.out.weight.T + attention.out.bias
    assert_close(attention(x), x + out.mT.reshape(x.shape), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_resampling_blocks_average_and_repeat():
    """2x2 averages or nearest neighbors, if the branch is 0."""
    x, emb = normal(2, 8, 4, 6), normal(2, 6)
    averages = x.reshape(2, 8, 2, 2, 3, 2).mean((3, 5))
    repeated = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert_close(ResidualBlock(8, 8, 6, 2, resample="down")(x, emb), averages)
    assert_close(ResidualBlock(8, 8, 6, 2, resample="up")(x, emb), repeated, rtol=0, atol=0)
    assert Downsample(8)(x).shape == averages.shape


@pytest.mark.parametrize("dim", [2, 32, 128])
def test_sinusoids_equal_ho_et_al(dim):
    """[sin, cos] of t * 10000^(-i / (half - 1)) in float64; float32 rounds an angle of 1000 to a few 1e-4."""
    steps = np.array([1, 2, 17, 500, 501, 1000])
    half = dim // 2
    frequencies = np.exp(np.arange(half) * -(math.log(10_000) / max(half - 1, 1)))
    angles = steps[:, None] * frequencies[None]
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    found = sinusoidal_embedding(torch.from_numpy(steps / 1000).float(), dim)
    assert found.dtype == torch.float32
    assert_close(found.double().numpy(), expected, rtol=0, atol=3e-4)


def test_sinusoids_stay_float32_in_low_precision():
    """Bit-equal under bfloat16 autocast; steps 500 and 501 differ for bfloat16 networks."""
    time = torch.tensor([0.5, 0.501])
    plain = sinusoidal_embedding(time, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(sinusoidal_embedding(time, 64), plain, rtol=0, atol=0)
        embedded = randomize(TimeEmbedding(64, 32))(time)
    for dtype in (torch.bfloat16, torch.float64):
        assert sinusoidal_embedding(time.to(dtype), 64).dtype == torch.float32
    half = randomize(TimeEmbedding(64, 32)).to(torch.bfloat16)(time)
    exact = randomize(TimeEmbedding(64, 32))(time)
    assert half.dtype == embedded.dtype == torch.bfloat16
    for found in (embedded, half):
        assert_close(found.float(), exact, rtol=0.05, atol=0.05)  # bfloat16 has 8 bits
        assert (found[0] - found[1]).abs().max() > 0.1


@pytest.mark.parametrize("make", [lambda: UNet(**TINY), lambda: MLP(2, hidden_size=16)], ids=["unet", "mlp"])
@torch.no_grad()
def test_bfloat16_networks_distinguish_neighboring_steps(make):
    """net.to(bfloat16) accepts float32 inputs."""
    net = randomize(make()).to(torch.bfloat16).eval()
    sample = normal(1, 1, 8, 8) if isinstance(net, UNet) else normal(1, 2)
    out = net(sample.expand(2, *sample.shape[1:]), torch.tensor([0.5, 0.501]))
    assert out.dtype == torch.bfloat16
    assert (out[0] - out[1]).abs().max() > 0.01


@pytest.mark.parametrize("model_channels", [1, 2, 3, 4, 7, 24, 32, 48, 64, 96, 128, 192, 256])
def test_fit_groups_returns_the_largest_divisor(model_channels):
    """At most 32, with at least 4 channels per group."""
    groups = fit_groups(model_channels)

    def fits(g: int) -> bool:
        return g <= 32 and model_channels % g == 0 and model_channels // g >= 4

    assert fits(groups) or groups == 1
    assert not any(fits(g) for g in range(groups + 1, model_channels + 1))


def test_groups_of_the_published_widths():
    """32 for the 128 and 192 channels of DDPM and ADM."""
    assert [fit_groups(w) for w in (4, 24, 32, 48, 64, 128, 192, 7)] == [1, 6, 8, 12, 16, 32, 32, 1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: UNet(**TINY),
        lambda: UNet(
            **{**TINY, "time_conditioning": "scale_shift", "resblock_updown": True, "attention_resolutions": (8, 4)}
        ),
        lambda: MLP(3, hidden_size=16, num_res_blocks=2),
    ],
    ids=["ddpm", "adm", "mlp"],
)
def test_every_parameter_receives_a_gradient(make):
    """No weight is left out of the graph."""
    net = randomize(make())
    x = normal(2, 1, 8, 8) if isinstance(net, UNet) else normal(2, 3)
    net(x, torch.tensor([0.2, 0.9])).square().sum().backward()
    idle = [name for name, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert idle == []


@pytest.mark.parametrize(
    "make", [lambda: UNet(**TINY, dropout=0.3), lambda: MLP(2, hidden_size=16)], ids=["unet", "mlp"]
)
@torch.no_grad()
def test_samples_of_a_batch_are_independent(make):
    """Bit-equal if another sample changes."""
    net = randomize(make()).eval()
    x = normal(4, 1, 8, 8) if isinstance(net, UNet) else normal(4, 2)
    time = torch.tensor([0.1, 0.4, 0.7, 1.0])
    changed_x, changed_time = x.clone(), time.clone()
    changed_x[0] += 1
    changed_time[0] = 0.9
    before, after = net(x, time), net(changed_x, changed_time)
    assert_close(after[1:], before[1:], rtol=0, atol=0)
    assert (after[0] - before[0]).abs().max() > 1e-2
    # another batch size may select a kernel that adds in another order
    assert_close(net(x[2:3], time[2:3]), before[2:3], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_dropout_acts_only_in_training():
    net = randomize(UNet(**TINY, dropout=0.5))
    x, time = normal(2, 1, 8, 8), torch.tensor([0.1, 0.9])
    torch.manual_seed(0)
    assert (net.train()(x, time) - net(x, time)).abs().max() > 1e-3
    assert_close(net.eval()(x, time), net(x, time), rtol=0, atol=0)


@pytest.mark.parametrize("outputs", [1, 2])
@torch.no_grad()
def test_mlp_equals_its_formula(outputs):
    """Against float64 numpy."""
    net = randomize(MLP(3, hidden_size=16, num_res_blocks=2, outputs=outputs))
    w = {name: value.double().numpy() for name, value in net.state_dict().items()}
    x, time = normal(5, 3), torch.tensor([0.001, 0.01, 0.02, 0.05, 0.1])

    def silu(a: np.ndarray) -> np.ndarray:
        return a / (1 + np.exp(-a))

    def linear(name: str, a: np.ndarray) -> np.ndarray:
        return a @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(a: np.ndarray) -> np.ndarray:
        return (a - a.mean(1, keepdims=True)) / np.sqrt(a.var(1, keepdims=True) + 1e-5)

    angles = 1000 * time.double().numpy()[:, None] * 10_000 ** (-np.arange(8) / 7)
    sinusoids = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    emb = linear("time.linear2", silu(linear("time.linear1", sinusoids)))
    h = linear("linear_in", x.double().numpy())
    for i in range(2):
        scale, shift = np.split(linear(f"blocks.{i}.emb", silu(emb)), 2, axis=1)
        inner = silu(norm(h) * (1 + scale) + shift)
        h = h + linear(f"blocks.{i}.linear2", silu(linear(f"blocks.{i}.linear1", inner)))
    out = linear("linear_out", silu(norm(h) * w["norm_out.weight"] + w["norm_out.bias"]))
    assert out.shape == (5, 3 * outputs)
    assert_close(net(x, time).double().numpy(), out, rtol=1e-4, atol=1e-4)  # float32 angles up to 100
