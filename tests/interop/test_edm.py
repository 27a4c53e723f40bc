"""Weights of EDM: denoisers equal those of a second implementation."""

import json
import math
import pickle
import shlex
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from src.diffusion.curves import exploding
from src.diffusion.gaussian_diffusion import GaussianDiffusion
from src.diffusion.noise import NoiseLevel
from src.interop.edm import CONVERT, pickle_error, read_converted, read_edm
from src.models.conditioning import ClassEmbedding
from src.models.unet import UNet
from tests.loops import for_each

WIDTH, SIDE, CLASSES, STD = 128, 8, 3, 0.6


def norm(c: int, eps: float) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, c // 4), c, eps)


class Conv(nn.Conv2d):
    """A convolution after resampling by blocks of 2x2 pixels; without a kernel, only that."""

    def __init__(self, c_in: int, c_out: int, kernel: int, resample: str = "") -> None:
        super().__init__(c_in, c_out, max(kernel, 1), padding=kernel // 2)
        self.resample = resample
        if not kernel:
            self.weight = self.bias = None  # type: ignore[assignment]
        if resample:
            self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        if self.resample == "up":
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        if self.resample == "down":
            x = x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5))
        return x if self.weight is None else super().forward(x)


class Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, adm: bool, resample: str = "", attends: bool = False) -> None:
        super().__init__()
        self.adm, self.scale, eps = adm, 1.0 if adm else math.sqrt(0.5), 1e-5 if adm else 1e-6
        self.norm0, self.conv0 = norm(c_in, eps), Conv(c_in, c_out, 3, resample)
        self.affine = nn.Linear(4 * WIDTH, c_out * (2 if adm else 1))
        self.norm1, self.conv1 = norm(c_out, eps), Conv(c_out, c_out, 3)
        self.skip, self.heads, self.c_in = None, 0, c_in
        if resample or c_in != c_out:
            self.skip = Conv(c_in, c_out, 0 if adm and c_in == c_out else 1, resample)
        if attends:
            self.heads = c_out // 64 if adm else 1
            self.norm2, self.qkv, self.proj = norm(c_out, eps), Conv(c_out, 3 * c_out, 1), Conv(c_out, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        e = self.affine(emb)[:, :, None, None]
        if self.adm:
            scale, shift = e.chunk(2, 1)
            h = self.norm1(h) * (scale + 1) + shift
        else:
            h = self.norm1(h + e)
        x = (self.conv1(F.silu(h)) + (x if self.skip is None else self.skip(x))) * self.scale
        if self.heads:
            b, c, height, width = x.shape
            q, k, v = self.qkv(self.norm2(x)).view(b * self.heads, c // self.heads, 3, -1).unbind(2)
            weights = torch.einsum("ncq,nck->nqk", q, k / math.sqrt(k.shape[1])).softmax(2)
            a = torch.einsum("nqk,nck->ncq", weights, v)
            x = (self.proj(a.reshape(b, c, height, width)) + x) * self.scale
        return x


class Network(nn.Module):
    """DhariwalUNet (`adm`) or SongUNet (DDPM++), with one block per stage and attention at 4x4 pixels."""

    def __init__(self, adm: bool, mult: list[int], labeled: bool) -> None:
        super().__init__()
        self.adm = adm
        self.map_augment = nn.Linear(9, WIDTH, bias=False)
        self.map_layer0, self.map_layer1 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, 4 * WIDTH)
        self.map_label = nn.Linear(CLASSES, 4 * WIDTH, bias=False) if adm else nn.Linear(CLASSES, WIDTH)
        self.map_label = self.map_label if labeled else None
        c = WIDTH
        enc: dict[str, nn.Module] = {f"{SIDE}x{SIDE}_conv": Conv(3, c, 3)}
        skips = [c]
        for i, m in enumerate(mult):
            name = f"{SIDE >> i}x{SIDE >> i}"
            if i:
                enc[f"{name}_down"] = Block(c, c, adm, "down")
                skips.append(c)
            enc[f"{name}_block0"] = Block(c, c := m * WIDTH, adm, attends=i == 1)
            skips.append(c)
        dec: dict[str, nn.Module] = {}
        for i, m in reversed([*enumerate(mult)]):
            name = f"{SIDE >> i}x{SIDE >> i}"
            if i == len(mult) - 1:
                dec[f"{name}_in0"], dec[f"{name}_in1"] = Block(c, c, adm, attends=True), Block(c, c, adm)
            else:
                dec[f"{name}_up"] = Block(c, c, adm, "up")
            for k in range(2):
                dec[f"{name}_block{k}"] = Block(
                    c + skips.pop(), c := m * WIDTH, adm, attends=i == 1 and (adm or k == 1)
                )
        if adm:
            self.out_norm, self.out_conv = norm(c, 1e-5), Conv(c, 3, 3)
        else:
            dec[f"{SIDE}x{SIDE}_aux_norm"], dec[f"{SIDE}x{SIDE}_aux_conv"] = norm(c, 1e-6), Conv(c, 3, 3)
        self.enc, self.dec = nn.ModuleDict(enc), nn.ModuleDict(dec)

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        half = WIDTH // 2
        angles = c_noise[:, None] * 10_000 ** (-torch.arange(half) / (half if self.adm else half - 1))
        waves = [angles.cos(), angles.sin()] if self.adm else [angles.sin(), angles.cos()]
        emb = torch.cat(waves, 1)
        if labels is not None and not self.adm:
            emb = emb + self.map_label(labels * math.sqrt(CLASSES))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if labels is not None and self.adm:
            emb = emb + self.map_label(labels)
        emb = F.silu(emb)
        skips = []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, Block) else block(x)
            skips.append(x)
        for block in self.dec.values():
            if isinstance(block, Block):
                x = block(x if x.shape[1] == block.c_in else torch.cat([x, skips.pop()], 1), emb)
        last, conv = (self.out_norm, self.out_conv) if self.adm else [*self.dec.values()][-2:]
        return conv(F.silu(last(x)))


class EDMPrecond(nn.Module):
    """EDM's preconditioning (tab. 1)."""

    def __init__(self, adm: bool, mult: list[int], labeled: bool) -> None:
        super().__init__()
        self.model = Network(adm, mult, labeled)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        s = sigma[:, None, None, None]
        c_skip, c_out = STD**2 / (s**2 + STD**2), s * STD / (s**2 + STD**2).sqrt()
        return c_skip * x + c_out * self.model(x / (s**2 + STD**2).sqrt(), sigma.log() / 4, labels)


@cache
def ddpmpp_weights() -> dict[str, Tensor]:
    return theirs(False, [2, 2], False).state_dict()


def theirs(adm: bool, mult: list[int], labeled: bool) -> EDMPrecond:
    torch.manual_seed(0)
    net = EDMPrecond(adm, mult, labeled)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return net.eval()


def metadata(adm: bool, mult: list[int], labeled: bool, precond: str = "EDMPrecond", **changes: Any) -> dict[str, str]:
    kwargs = {
        "model_type": "DhariwalUNet" if adm else "SongUNet",
        "img_resolution": SIDE,
        "img_channels": 3,
        "label_dim": CLASSES if labeled else 0,
        "sigma_data": STD,
        "model_channels": WIDTH,
        "channel_mult": mult,
        "num_blocks": 1,
        "attn_resolutions": [4],
        "augment_dim": 9,
        "use_fp16": False,
    }
    return {"edm": json.dumps({"class": precond, "kwargs": kwargs | changes})}


NETWORKS = {
    "DhariwalUNet": (True, [1, 2], True),
    "DDPM++ without classes": (False, [2, 2], False),
    "DDPM++ with classes": (False, [1, 1], True),
}


@for_each("adm, mult, labeled", NETWORKS)
@torch.no_grad()
def test_denoised_images_equal_those_of_edm(adm, mult, labeled):
    net = theirs(adm, mult, labeled)
    imported = read_edm(net.state_dict(), metadata(adm, mult, labeled, label_dropout=0.1))
    condition = (lambda dim: ClassEmbedding(dim, CLASSES)) if labeled else None
    ours = UNet(**imported.model, condition=condition).eval()
    ours.load_state_dict(imported.weights)
    diffusion = GaussianDiffusion(**imported.diffusion)
    curve = {name: value for name, value in imported.schedule["curve"].items() if not name.startswith("_")}

    u = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    alpha, sigma = exploding(u, **curve)
    level = NoiseLevel(*(v.float().view(-1, 1, 1, 1) for v in (alpha, sigma, u)))
    x = torch.randn(3, 3, SIDE, SIDE) * torch.hypot(level.sigma, torch.tensor(STD))
    labels = F.one_hot(torch.tensor([0, 2, 1]), CLASSES).float()
    cond = torch.tensor([0, 2, 1])
    labels[2], cond[2] = 0, CLASSES  # EDM's empty class is a vector of zeros
    out = ours(diffusion.scale_input(x, level), u.float(), cond if labeled else None)
    expected = net(x, sigma.float(), labels if labeled else None)
    assert_close(diffusion.interpret(out, x, level).x0, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_convert_command_writes_what_is_read(tmp_path, monkeypatch):
    net = theirs(False, [2, 2], False)
    described = json.loads(metadata(False, [2, 2], False)["edm"])
    net.init_kwargs = described["kwargs"]
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"ema": net}))
    monkeypatch.chdir(tmp_path)
    assert str(pickle_error(Path("model.pkl"))).endswith(CONVERT)
    assert CONVERT in (Path(__file__).parents[2] / "docs" / "pretrained.md").read_text()
    _, option, code, *arguments = shlex.split(CONVERT)
    monkeypatch.setattr(sys, "argv", [option, *arguments])
    exec(code, {})
    found = read_converted(Path("model.safetensors"))
    assert found is not None
    weights, read = found
    assert json.loads(read["edm"]) == described
    assert_close(weights, dict(net.state_dict()))


def test_label_dropout_trains_the_empty_class():
    weights = theirs(True, [1, 2], True).state_dict()
    for dropout, trained in {0.0: False, 0.1: True}.items():
        imported = read_edm(weights, metadata(True, [1, 2], True, label_dropout=dropout))
        assert (imported.num_classes, imported.has_null_class) == (CLASSES, trained)
        assert len(imported.weights["condition.table.weight"]) == CLASSES + trained


@for_each(
    "setting, described",
    {
        "VP": ("VPPrecond", metadata(False, [2, 2], False, "VPPrecond")),
        "NCSN++": ("embedding_type=fourier", metadata(False, [2, 2], False, embedding_type="fourier")),
        "residual": ("encoder_type=residual", metadata(False, [2, 2], False, encoder_type="residual")),
        "filter": ("resample_filter", metadata(False, [2, 2], False, resample_filter=[1, 3, 3, 1])),
        "classes": ("condition", metadata(False, [2, 2], False, label_dim=10)),
        "other network": ("OtherUNet", metadata(False, [2, 2], False, model_type="OtherUNet")),
        "unknown argument": ("additive_pos_embed", metadata(False, [2, 2], False, additive_pos_embed=True)),
        "narrow": ("128 channels", metadata(False, [2, 2], False, model_channels=32)),
        "shape": ("init_from", metadata(False, [2, 4], False)),
        "depth": ("init_from", metadata(False, [2, 2], False, num_blocks=2)),
        "damaged": ("metadata", {"edm": "{"}),
    },
)
def test_networks_that_do_not_fit_are_refused(setting, described):
    with pytest.raises(ValueError, match=setting) as raised:
        read_edm(ddpmpp_weights(), described)
    assert "\n" not in str(raised.value)
