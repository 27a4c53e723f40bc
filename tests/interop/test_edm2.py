"""Weights of EDM2: denoisers equal those of a second implementation, and layers keep magnitudes."""

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from src.diffusion.curves import exploding
from src.diffusion.gaussian_diffusion import GaussianDiffusion
from src.diffusion.noise import NoiseLevel
from src.interop.edm2 import read_edm2
from src.models.conditioning import ClassEmbedding
from src.models.unet_edm2 import FourierFeatures, MPConv, UNetEDM2, mp_cat, mp_silu, mp_sum
from tests.loops import for_each

WIDTH, SIDE, CLASSES, STD = 16, 8, 3, 0.6


def unit(w: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Divide by the root mean square over some axes."""
    return w / (w.square().mean(axes, keepdim=True).sqrt() + 1e-4)


class Weight(nn.Module):
    """A layer without biases; its parameter has any norm."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(2 * torch.randn(c_out, c_in, *[kernel] * (2 if kernel else 0)))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        w = unit(self.weight, tuple(range(1, self.weight.ndim))) / self.weight[0].numel() ** 0.5 * gain
        return torch.einsum("bi,oi->bo", x, w) if w.ndim == 2 else F.conv2d(x, w, padding="same")


class Fourier(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * torch.pi * torch.randn(width))
        self.register_buffer("phases", 2 * torch.pi * torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return 2**0.5 * torch.cos(torch.outer(x, self.freqs) + self.phases)


def mix(a: Tensor, b: Tensor, t: float) -> Tensor:
    return ((1 - t) * a + t * b) / ((1 - t) ** 2 + t**2) ** 0.5


def silu(x: Tensor) -> Tensor:
    return x * x.sigmoid() / 0.596


class Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, emb: int, way: str, resample: str = "", attends: bool = False) -> None:
        super().__init__()
        self.way, self.resample = way, resample
        self.emb_gain = nn.Parameter(torch.randn(()))
        self.conv_res0 = Weight(c_out if way == "enc" else c_in, c_out, 3)
        self.emb_linear, self.conv_res1 = Weight(emb, c_out), Weight(c_out, c_out, 3)
        self.conv_skip = Weight(c_in, c_out, 1) if c_in != c_out else None
        self.attn_qkv = Weight(c_out, 3 * c_out, 1) if attends else None
        self.attn_proj = Weight(c_out, c_out, 1) if attends else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.resample == "up":
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        if self.resample == "down":
            x = x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5))
        skip = x if self.conv_skip is None else self.conv_skip(x)
        if self.way == "enc":
            x = skip = unit(skip, (1,))
        h = self.conv_res0(silu(x)) * (1 + self.emb_linear(emb, self.emb_gain))[:, :, None, None]
        x = mix(skip, self.conv_res1(silu(h)), 0.3)
        if self.attn_qkv is not None and self.attn_proj is not None:
            b, c = x.shape[:2]
            q, k, v = unit(self.attn_qkv(x).view(b, c // 8, 8, 3, -1), (2,)).unbind(3)
            weights = torch.einsum("bhcq,bhck->bhqk", q, k / 8**0.5).softmax(3)
            x = mix(x, self.attn_proj(torch.einsum("bhqk,bhck->bhcq", weights, v).reshape(x.shape)), 0.3)
        return x.clip(-256, 256)


class Network(nn.Module):
    """With two blocks per stage, and attention at 4x4 pixels."""

    def __init__(self, mult: list[int], labeled: bool) -> None:
        super().__init__()
        c, emb = WIDTH * mult[0], WIDTH * max(mult)
        self.out_gain = nn.Parameter(torch.randn(()))
        self.emb_fourier, self.emb_noise = Fourier(c), Weight(c, emb)
        self.emb_label = Weight(CLASSES, emb) if labeled else None
        enc: dict[str, nn.Module] = {f"{SIDE}x{SIDE}_conv": Weight(4, c, 3)}
        skips = [c]
        for i, m in enumerate(mult):
            name = f"{SIDE >> i}x{SIDE >> i}"
            if i:
                enc[f"{name}_down"] = Block(c, c, emb, "enc", "down")
                skips.append(c)
            for k in range(2):
                enc[f"{name}_block{k}"] = Block(c, c := m * WIDTH, emb, "enc", attends=i == 1)
                skips.append(c)
        dec: dict[str, nn.Module] = {}
        for i, m in reversed([*enumerate(mult)]):
            name = f"{SIDE >> i}x{SIDE >> i}"
            if i == len(mult) - 1:
                dec[f"{name}_in0"], dec[f"{name}_in1"] = Block(c, c, emb, "dec", attends=True), Block(c, c, emb, "dec")
            else:
                dec[f"{name}_up"] = Block(c, c, emb, "dec", "up")
            for k in range(3):
                dec[f"{name}_block{k}"] = Block(c + skips.pop(), c := m * WIDTH, emb, "dec", attends=i == 1)
        self.enc, self.dec, self.out_conv = nn.ModuleDict(enc), nn.ModuleDict(dec), Weight(c, 3, 3)

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:
        emb = self.emb_noise(self.emb_fourier(noise))
        if self.emb_label is not None:
            assert labels is not None
            emb = mix(emb, self.emb_label(labels * CLASSES**0.5), 0.5)
        emb, x = silu(emb), torch.cat([x, torch.ones_like(x[:, :1])], 1)
        skips = []
        for name, block in self.enc.items():
            x = block(x) if name.endswith("conv") else block(x, emb)
            skips.append(x)
        for name, block in self.dec.items():
            if "block" in name:
                y = skips.pop()
                a, b = x.shape[1], y.shape[1]
                x = torch.cat([x / a**0.5, y / b**0.5], 1) * ((a + b) / 2) ** 0.5
            x = block(x, emb)
        return self.out_conv(x, self.out_gain)


class Precond(nn.Module):
    def __init__(self, mult: list[int], labeled: bool) -> None:
        super().__init__()
        self.unet = Network(mult, labeled)
        self.logvar_fourier, self.logvar_linear = Fourier(8), Weight(8, 1)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        s = sigma.view(-1, 1, 1, 1)
        total = (s**2 + STD**2).sqrt()
        out = self.unet(x / total, sigma.log() / 4, labels)
        return STD**2 / total**2 * x + s * STD / total * out


def metadata(mult: list[int], labeled: bool, **changes: Any) -> dict[str, str]:
    kwargs = {"img_resolution": SIDE, "img_channels": 3, "label_dim": CLASSES if labeled else 0, "sigma_data": STD}
    kwargs |= {"model_channels": WIDTH, "channel_mult": mult, "num_blocks": 2, "attn_resolutions": [4]}
    kwargs |= {"channels_per_head": 8, "use_fp16": True, **changes}
    return {"edm": json.dumps({"class": "Precond", "kwargs": kwargs})}


@for_each("mult, labeled", {"classes": ([1, 2], True), "three stages": ([1, 2, 3], False), "wide": ([2, 1], True)})
@torch.no_grad()
def test_denoised_images_equal_those_of_edm2(mult, labeled):
    torch.manual_seed(0)
    net = Precond(mult, labeled).eval()
    imported = read_edm2(net.state_dict(), metadata(mult, labeled))
    weights = dict(imported.weights)
    condition = None
    if labeled:  # with a row of zeros as the empty class, which EDM2 takes as labels of zeros
        table = weights["condition.table.weight"]
        weights["condition.table.weight"] = torch.cat([table, torch.zeros_like(table[:1])])
        condition = lambda dim: ClassEmbedding(dim, CLASSES)  # noqa: E731
    ours = UNetEDM2(**imported.model, condition=condition).eval()
    ours.load_state_dict(weights)
    u = torch.tensor([0.05, 0.5, 0.98], dtype=torch.float64)
    alpha, sigma = exploding(u, 0.002, 80.0)
    level = NoiseLevel(*(each.view(-1, 1, 1, 1).float() for each in (alpha, sigma, u)))
    sigma = (sigma / alpha).float()
    x = sigma.view(-1, 1, 1, 1) * torch.randn(3, 3, SIDE, SIDE)
    cond = torch.tensor([0, 2, CLASSES])
    labels = F.one_hot(cond, CLASSES + 1)[:, :CLASSES].float()
    diffusion = GaussianDiffusion(**imported.diffusion)
    out = ours(diffusion.scale_input(x, level), u.float(), cond if labeled else None)
    expected = net(x, sigma, labels)
    assert_close(diffusion.interpret(out, x, level).x0, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_layers_keep_magnitudes():
    """Of standard normal inputs, at any scale of the weights."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 4096, 64).unbind()
    size = lambda z: z.square().mean().sqrt().item()  # noqa: E731
    layer = MPConv(64, 64, 0)
    with torch.no_grad():
        layer.weight.mul_(5)
    parts = mp_cat(x[..., None], y[:, :16, None], 0.5)
    for out in (layer.eval()(x), mp_silu(x), mp_sum(x, y, 0.3), parts, FourierFeatures(4096)(x[:, 0])):
        assert size(out) == pytest.approx(1, abs=0.05)
    assert size(parts[:, :64]) * 64**0.5 == pytest.approx(size(parts[:, 64:]) * 16**0.5, rel=0.05)


def test_training_normalizes_the_weights_themselves():
    layer = MPConv(8, 4, 3).train()
    with torch.no_grad():
        layer.weight.mul_(7)
    layer(torch.randn(1, 8, 4, 4))
    assert_close(layer.weight.square().mean((1, 2, 3)), torch.ones(4), rtol=1e-3, atol=1e-3)


@for_each(
    "setting, described",
    {
        "filter": ("resample_filter", metadata([1, 2], False, resample_filter=[1, 3, 3, 1])),
        "embedding": ("channel_mult_emb", metadata([1, 2], False, channel_mult_emb=1)),
        "unknown": ("additive", metadata([1, 2], False, additive=True)),
        "depth": ("init_from", metadata([1, 2], False, num_blocks=1)),
        "heads": ("num_head_channels", metadata([1, 2], False, channels_per_head=7)),
    },
)
def test_networks_that_do_not_fit_are_refused(setting, described):
    with pytest.raises(ValueError, match=setting) as error:
        read_edm2(Precond([1, 2], False).state_dict(), described)
    assert "\n" not in str(error.value)


def test_program_has_any_batch():
    """The magnitudes depend on sizes of the data, not of the batch."""
    from src.interop.torch_export import example_inputs, trace

    net = UNetEDM2(3, SIDE, model_channels=16, channel_mult=(1, 2), num_res_blocks=1, num_head_channels=8).eval()
    program = trace(net, example_inputs((3, SIDE, SIDE), None, 2)).module()
    inputs = example_inputs((3, SIDE, SIDE), None, 3)
    assert_close(program(*inputs), net(*inputs), rtol=1e-5, atol=1e-5)


def test_frozen_weights_are_not_normalized():
    layer = MPConv(8, 4, 3).train().requires_grad_(False)
    layer.weight.mul_(7)
    before = layer.weight.clone()
    layer(torch.randn(1, 8, 4, 4))
    assert torch.equal(layer.weight, before)
