"""Weights of DiT and SiT in the layout of their authors: outputs equal those of a second implementation."""

import math
from argparse import Namespace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from src.diffusion.curves import rectified_flow
from src.diffusion.gaussian_diffusion import GaussianDiffusion
from src.diffusion.noise import NoiseLevel
from src.interop.dit import read_dit
from src.interop.imported import ImportedModel, read_pt
from src.models.conditioning import ClassEmbedding
from src.models.dit import DiT
from tests.loops import for_each
from tests.models.test_models import normal, randomize

WIDTH, HEADS, PATCH, SIDE, CHANNELS, CLASSES = 32, 2, 2, 8, 4, 5
FLAGS = "--model DiT --num-heads 2"


class Theirs(nn.Module):
    """DiT as its paper describes it, by the names of its weights, written for single images and single heads."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        make = lambda **parts: nn.ModuleDict(parts)  # noqa: E731
        line = nn.Linear
        self.x_embedder = make(proj=nn.Conv2d(CHANNELS, WIDTH, PATCH, PATCH))
        self.t_embedder = make(mlp=nn.Sequential(line(256, WIDTH), nn.SiLU(), line(WIDTH, WIDTH)))
        self.y_embedder = make(embedding_table=nn.Embedding(CLASSES + 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.empty(1, (SIDE // PATCH) ** 2, WIDTH))
        self.blocks = nn.ModuleList(
            make(
                attn=make(qkv=line(WIDTH, 3 * WIDTH), proj=line(WIDTH, WIDTH)),
                mlp=make(fc1=line(WIDTH, 4 * WIDTH), fc2=line(4 * WIDTH, WIDTH)),
                adaLN_modulation=nn.Sequential(nn.SiLU(), line(WIDTH, 6 * WIDTH)),
            )
            for _ in range(depth)
        )
        self.final_layer = make(
            linear=line(WIDTH, PATCH**2 * 2 * CHANNELS),
            adaLN_modulation=nn.Sequential(nn.SiLU(), line(WIDTH, 2 * WIDTH)),
        )
        randomize(self)
        with torch.no_grad():
            for index in range((SIDE // PATCH) ** 2):
                row, column = divmod(index, SIDE // PATCH)
                values = [
                    f(place / 10_000 ** (4 * k / WIDTH))
                    for place in (column, row)
                    for f in (math.sin, math.cos)
                    for k in range(WIDTH // 4)
                ]
                self.pos_embed[0, index] = torch.tensor(values)

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([self.one(*each) for each in zip(x, t, y, strict=True)])

    def one(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        angles = t.item() * torch.tensor([10_000 ** (-k / 128) for k in range(128)])
        vector = (
            self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()])) + self.y_embedder.embedding_table.weight[y]
        )
        h = self.x_embedder.proj(x[None])[0].flatten(1).T + self.pos_embed[0]
        for block in self.blocks:
            shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(vector).chunk(6)
            h = h + gate1 * self.attend(block.attn, norm(h) * (1 + scale1) + shift1)
            inner = block.mlp.fc1(norm(h) * (1 + scale2) + shift2)
            inner = inner / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
            h = h + gate2 * block.mlp.fc2(inner)
        shift, scale = self.final_layer.adaLN_modulation(vector).chunk(2)
        patches = self.final_layer.linear(norm(h) * (1 + scale) + shift)
        out = torch.empty(2 * CHANNELS, SIDE, SIDE)
        for index, patch in enumerate(patches):
            i, j = (PATCH * n for n in divmod(index, SIDE // PATCH))
            out[:, i : i + PATCH, j : j + PATCH] = patch.view(PATCH, PATCH, -1).permute(2, 0, 1)
        return out

    def attend(self, attn: nn.ModuleDict, h: Tensor) -> Tensor:
        query, key, value = attn.qkv(h).chunk(3, dim=1)
        size = WIDTH // HEADS
        heads = [
            (query[:, part] @ key[:, part].T / math.sqrt(size)).softmax(1) @ value[:, part]
            for part in (slice(k * size, (k + 1) * size) for k in range(HEADS))
        ]
        return attn.proj(torch.cat(heads, dim=1))


def norm(h: Tensor) -> Tensor:
    return (h - h.mean(1, keepdim=True)) / (h.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def ours(imported: ImportedModel) -> DiT:
    net = DiT(**imported.model, condition=partial(ClassEmbedding, num_classes=imported.num_classes))
    net.load_state_dict(imported.weights)
    return net.eval()


@torch.no_grad()
def test_outputs_equal_those_of_dit():
    theirs = Theirs()
    imported = read_dit(theirs.state_dict(), FLAGS)
    x, t, y = normal(3, CHANNELS, SIDE, SIDE), torch.tensor([0, 40, 100]), torch.tensor([0, 4, CLASSES])
    expected = theirs(x, t, y)
    assert expected.abs().mean() > 0.1
    assert_close(ours(imported)(x, (t + 1) / 1000, y), expected, rtol=1e-5, atol=1e-5)
    last = torch.full_like(t, 999)  # an angle that float32 rounds by 6e-5
    assert_close(ours(imported)(x, (last + 1) / 1000, y), theirs(x, last, y), rtol=1e-4, atol=1e-4)
    assert imported.diffusion == {"prediction": "eps", "variance": "learned_range", "clip_x0": None}
    assert (imported.num_classes, imported.has_null_class) == (CLASSES, True)


@torch.no_grad()
def test_sit_predicts_the_data_of_its_path():
    """Its path is x = t data + (1 - t) noise, and its output data - noise, in the first half of the channels."""
    theirs = Theirs()
    imported = read_dit(theirs.state_dict(), "--model SiT --num-heads 2 --path-type Linear")
    x, u, y = normal(3, CHANNELS, SIDE, SIDE), torch.tensor([0.0, 0.3, 1.0]), torch.tensor([0, 4, CLASSES])
    alpha, sigma = (
        part[:, None, None, None] for part in rectified_flow(u.double(), imported.schedule["curve"]["start"])
    )
    velocity = theirs(x, alpha.flatten(), y)[:, :CHANNELS]
    level = NoiseLevel(alpha.float(), sigma.float(), u[:, None, None, None])
    pred = GaussianDiffusion(**imported.diffusion).interpret(ours(imported)(x, u, y), x, level)
    assert_close(pred.x0, (x + sigma * velocity).float(), rtol=1e-5, atol=1e-5)
    assert_close(pred.eps, (x - alpha * velocity).float(), rtol=1e-5, atol=1e-5)


def test_checkpoints_of_training_give_their_average(tmp_path):
    theirs = Theirs().state_dict()
    saved = {"model": Theirs(3).state_dict(), "ema": theirs, "opt": {"state": {}}, "args": Namespace(model="DiT-S/2")}
    torch.save(saved, tmp_path / "model.pt")
    read = read_pt(tmp_path / "model.pt")
    assert read.keys() == theirs.keys() and all(torch.equal(read[name], theirs[name]) for name in read)


@for_each(
    "setting, flags, change",
    lambda: {
        "no project": ("--model DiT-XL/2 or --model SiT-XL/2", "", {}),
        "unknown project": ("--model UViT", "--model UViT", {}),
        "size": ("--model DiT-S/2", "--model DiT-S/2", {}),
        "heads": ("--num-heads", "--model DiT", {}),
        "image size": ("--image-size 256", f"{FLAGS} --image-size 256", {}),
        "classes": ("--num-classes 1000", f"{FLAGS} --num-classes 1000", {}),
        "path": ("--path-type GVP", "--model SiT --num-heads 2 --path-type GVP", {}),
        "prediction": ("--prediction score", "--model SiT --num-heads 2 --prediction score", {}),
        "typo": ("did you mean --image-size", f"{FLAGS} --image_sizes 64", {}),
        "positions": ("pos_embed", FLAGS, {"pos_embed": torch.zeros(1, 16, WIDTH)}),
        "missing": ("final_layer.linear.bias", FLAGS, {"final_layer.linear.bias": None}),
        "missing in a block": ("blocks.1.attn.qkv.bias", FLAGS, {"blocks.1.attn.qkv.bias": None}),
        "unknown weight": ("blocks.0.attn.q_norm.weight", FLAGS, {"blocks.0.attn.q_norm.weight": torch.ones(16)}),
    },
)
def test_other_weights_and_flags_are_refused(setting, flags, change):
    weights = {name: value for name, value in (Theirs().state_dict() | change).items() if value is not None}
    with pytest.raises(ValueError, match=setting) as raised:
        read_dit(weights, flags)
    assert "\n" not in str(raised.value) and "init_from" in str(raised.value)
