"""Weights of improved-diffusion and guided-diffusion: outputs equal those of a second implementation."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from src.diffusion import schedules
from src.interop.imported import ImportedModel, read_pt
from src.interop.openai import read_openai
from src.models.conditioning import ClassEmbedding
from src.models.unet import UNet
from tests.loops import for_each

WIDTH, SIDE = 32, 8


class Res(nn.Module):
    """ADM's residual block; `resample` is a function of a feature map."""

    def __init__(self, c_in: int, c_out: int, scale_shift: bool, resample: Any = None) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * WIDTH, (1 + scale_shift) * c_out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, c_out), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(c_out, c_out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)
        self.scale_shift, self.resample = scale_shift, resample or (lambda x: x)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, act, conv = self.in_layers
        h = conv(self.resample(act(norm(x))))
        e = self.emb_layers(emb)[:, :, None, None]
        norm, *rest = self.out_layers
        if self.scale_shift:
            scale, shift = e.chunk(2, 1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + e)
        return self.skip_connection(self.resample(x)) + nn.Sequential(*rest)(h)


class Attention(nn.Module):
    def __init__(self, c: int, heads: int, new_order: bool) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj_out = nn.GroupNorm(32, c), nn.Conv1d(c, 3 * c, 1), nn.Conv1d(c, c, 1)
        self.heads, self.new_order = heads, new_order

    def forward(self, x: Tensor) -> Tensor:
        b, c, *size = x.shape
        flat = x.flatten(2)
        qkv = self.qkv(self.norm(flat))
        if self.new_order:
            q, k, v = qkv.unflatten(1, (3, self.heads, -1)).unbind(1)
        else:
            q, k, v = qkv.unflatten(1, (self.heads, 3, -1)).unbind(2)
        weights = torch.einsum("bhct,bhcs->bhts", q, k).div(math.sqrt(q.shape[2])).softmax(-1)
        out = torch.einsum("bhts,bhcs->bhct", weights, v).reshape(b, c, -1)
        return (flat + self.proj_out(out)).view(b, c, *size)


class Down(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Up(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(double(x))


def double(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def halve(x: Tensor) -> Tensor:
    return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4


class Theirs(nn.Module):
    """OpenAI's U-Net with attention at the downsampling factors `attended`; `t` is what the time embedding sees."""

    def __init__(
        self, mult: list[int], blocks: int, attended: list[int], heads: Any, scale_shift: bool, updown: bool,
        new_order: bool = False, outputs: int = 1, classes: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()

        def res(c_in: int, c_out: int, resample: Any = None) -> Res:
            return Res(c_in, c_out, scale_shift, resample)

        def attention(c: int) -> Attention:
            return Attention(c, heads(c), new_order)

        self.time_embed = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.SiLU(), nn.Linear(4 * WIDTH, 4 * WIDTH))
        self.label_emb = None if classes is None else nn.Embedding(classes, 4 * WIDTH)
        c = mult[0] * WIDTH
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(3, c, 3, padding=1)])])
        skips = [c]
        for i, m in enumerate(mult):
            for _ in range(blocks):
                layers = [res(c, c := m * WIDTH), *([attention(c)] if 2**i in attended else [])]
                self.input_blocks.append(nn.ModuleList(layers))
                skips.append(c)
            if i < len(mult) - 1:
                self.input_blocks.append(nn.ModuleList([res(c, c, halve) if updown else Down(c)]))
                skips.append(c)
        self.middle_block = nn.ModuleList([res(c, c), attention(c), res(c, c)])
        self.output_blocks = nn.ModuleList()
        for i, m in reversed([*enumerate(mult)]):
            for k in range(blocks + 1):
                layers = [res(c + skips.pop(), c := m * WIDTH), *([attention(c)] if 2**i in attended else [])]
                if i and k == blocks:
                    layers.append(res(c, c, double) if updown else Up(c))
                self.output_blocks.append(nn.ModuleList(layers))
        self.out = nn.Sequential(nn.GroupNorm(32, c), nn.SiLU(), nn.Conv2d(c, 3 * outputs, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        angles = t[:, None] * torch.tensor([10_000 ** (-2 * i / WIDTH) for i in range(WIDTH // 2)])
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], 1))
        if self.label_emb is not None:
            emb = emb + self.label_emb(y)

        def run(layers: Any, h: Tensor) -> Tensor:
            for layer in layers:
                h = layer(h, emb) if isinstance(layer, Res) else layer(h)
            return h

        skips = [x := run(layers, x) for layers in self.input_blocks]
        x = run(self.middle_block, x)
        for layers in self.output_blocks:
            x = run(layers, torch.cat([x, skips.pop()], 1))
        return self.out(x)


ADM = {
    "mult": [1, 2, 2],
    "blocks": 2,
    "attended": [2, 4],
    "heads": lambda c: c // 16,
    "scale_shift": True,
    "updown": True,
    "outputs": 2,
    "classes": 5,
}
IMPROVED = {
    "mult": [1, 2],
    "blocks": 1,
    "attended": [2],
    "heads": lambda c: 4,
    "scale_shift": False,
    "updown": False,
    "outputs": 1,
    "classes": None,
}
ADM_FLAGS = (
    f"--image_size {SIDE} --num_channels {WIDTH} --num_res_blocks 2 --channel_mult 1,2,2 --attention_resolutions 4,2 "
    "--num_head_channels 16 --class_cond True --learn_sigma True --resblock_updown True --use_scale_shift_norm True "
    "--use_fp16 True --diffusion_steps 1000 --noise_schedule linear "
)
IMPROVED_FLAGS = (
    f"--image_size {SIDE} --num_channels {WIDTH} --num_res_blocks 1 --diffusion_steps 4000 --noise_schedule cosine "
    "--use_scale_shift_norm False --sigma_small True --lr 1e-4 --batch_size 128"
)


def theirs(**changes: Any) -> Theirs:
    torch.manual_seed(0)
    net = Theirs(**{**ADM, **changes})  # type: ignore[arg-type]
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return net.eval()


@cache
def adm_weights() -> dict[str, Tensor]:
    return theirs().state_dict()


def ours(imported: ImportedModel) -> UNet:
    classes = imported.num_classes
    # Without an empty class, the table has one row per class.
    net = UNet(**imported.model, condition=None if classes is None else lambda dim: ClassEmbedding(dim, classes - 1))
    net.load_state_dict(imported.weights)
    return net.eval()


@for_each(
    "net, flags, steps, scale",
    lambda: {
        "adm, new order": (theirs(new_order=True), ADM_FLAGS + "--use_new_attention_order True", 1000, 1),
        "adm, legacy order": (theirs(new_order=False), ADM_FLAGS, 1000, 1),
        "adm, 400 steps": (theirs(), ADM_FLAGS.replace("1000", "400"), 400, 1),
        "first multiplier": (theirs(mult=[2, 2, 4]), ADM_FLAGS.replace("1,2,2", "2,2,4"), 1000, 1),
        "improved": (theirs(**IMPROVED), IMPROVED_FLAGS, 4000, 0.25),
        "only what the file does not show": (theirs(), f"--image_size {SIDE} --num_head_channels 16", 1000, 1),
    },
)
@torch.no_grad()
def test_outputs_equal_those_of_openais_network(net, flags, steps, scale):
    imported = read_openai(net.state_dict(), flags)
    t = torch.tensor([0, 17, steps - 1])
    x = torch.randn(3, 3, SIDE, SIDE)
    y = None if net.label_emb is None else torch.tensor([0, 3, 4])
    expected = net(x, t * float(scale), y)
    assert_close(ours(imported)(x, (t + 1) / steps, y), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_flags_choose_schedule_and_variance():
    adm = read_openai(adm_weights(), ADM_FLAGS)
    assert adm.diffusion == {"prediction": "eps", "variance": "learned_range", "clip_x0": 1.0}
    assert (adm.num_classes, adm.has_null_class, adm.model["outputs"]) == (5, False, 2)
    improved = read_openai(theirs(**IMPROVED).state_dict(), IMPROVED_FLAGS + " --predict_xstart True")
    assert improved.diffusion == {"prediction": "x0", "variance": "fixed_small", "clip_x0": 1.0}
    assert improved.schedule["_target_"] == "src.diffusion.schedules.cosine"
    assert improved.schedule["num_steps"] == 4000


def test_cosine_schedule_equals_openais():
    def alpha_bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - alpha_bar((i + 1) / 4000) / alpha_bar(i / 4000), 0.999) for i in range(4000)]
    assert_close(schedules.cosine(4000), torch.tensor(betas, dtype=torch.float64), rtol=1e-9, atol=0)


def test_half_precision_weights_become_float32():
    imported = read_openai({name: value.half() for name, value in adm_weights().items()}, ADM_FLAGS)
    assert {value.dtype for value in imported.weights.values()} == {torch.float32}


@for_each(
    "setting, flags",
    {
        "num_channels": ("--num_channels 64", ADM_FLAGS + "--num_channels 64"),
        "class_cond": ("--class_cond False", ADM_FLAGS + "--class_cond False"),
        "learn_sigma": ("--learn_sigma False", ADM_FLAGS + "--learn_sigma False"),
        "num_res_blocks": ("--num_res_blocks 3", ADM_FLAGS + "--num_res_blocks 3"),
        "channel_mult": ("--channel_mult 1,2,4", ADM_FLAGS + "--channel_mult 1,2,4"),
        "image size": ("--image_size 64", ADM_FLAGS.replace("--channel_mult 1,2,2", "") + "--image_size 64"),
        "attention": ("--attention_resolutions 4", ADM_FLAGS + "--attention_resolutions 4"),
        "resblock_updown": ("--resblock_updown False", ADM_FLAGS + "--resblock_updown False"),
        "scale shift": ("--use_scale_shift_norm False", ADM_FLAGS + "--use_scale_shift_norm False"),
        "heads": ("--num_head_channels 24", ADM_FLAGS + "--num_head_channels 24"),
        "unknown": ("did you mean --image_size", ADM_FLAGS + "--img_size 8"),
        "type": ("--num_heads", ADM_FLAGS + "--num_heads many"),
        "schedule": ("--noise_schedule", ADM_FLAGS + "--noise_schedule sqrt"),
        "upsampler": ("--large_size", ADM_FLAGS + "--large_size 256"),
        "missing": ("--image_size", "--num_head_channels 16"),
    },
)
def test_flags_that_do_not_fit_are_named(setting, flags):
    with pytest.raises(ValueError, match=setting) as raised:
        read_openai(adm_weights(), flags)
    assert "\n" not in str(raised.value)


def test_incomplete_or_foreign_weights_are_refused():
    weights = adm_weights()
    for name in ("output_blocks.3.0.in_layers.2.weight", "input_blocks.0.0.weight", "out.2.weight"):
        with pytest.raises(ValueError, match="init_from"):
            read_openai({other: value for other, value in weights.items() if other != name}, ADM_FLAGS)
    with pytest.raises(ValueError, match="extra"):
        read_openai(weights | {"extra.weight": torch.zeros(1)}, ADM_FLAGS)


def test_both_formats_of_torch_save_are_read(tmp_path: Path):
    weights = {"input_blocks.0.0.weight": torch.arange(3.0)}
    for zipped in (True, False):
        torch.save(weights, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
        read = read_pt(tmp_path / "model.pt")
        assert_close(read, weights)


@for_each("contents", lambda: {"code": {"net": nn.Linear(1, 1)}, "list": [torch.zeros(1)], "values": {"step": 3}})
def test_files_with_more_than_tensors_are_refused(contents, tmp_path):
    torch.save(contents, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="init_from=") as raised:
        read_pt(tmp_path / "model.pt")
    assert "\n" not in str(raised.value)
