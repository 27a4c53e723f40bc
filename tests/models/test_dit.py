"""The diffusion transformer: against that of diffusers, its sizes, positions, conditions and refusals."""

import math

import pytest
import torch
from torch.testing import assert_close

from src.models.attention import rotary_table, rotate
from src.models.conditioning import ClassEmbedding, TextTransformer
from src.models.dit import DiT
from tests.models.test_models import normal, randomize

TINY = {"channels": 3, "image_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2}
ORIGINAL = {"activation": "gelu", "norm": "layer", "qk_norm": False, "positions": "sincos"}


def dit(**changes) -> DiT:
    return randomize(DiT(**{**TINY, **changes})).eval()


@torch.no_grad()
def test_dit_equals_that_of_diffusers():
    """With copied weights, the options of the paper, rectangular patches of pixels and classes."""
    diffusers = pytest.importorskip("diffusers")
    ours = dit(
        **ORIGINAL, patch_size=2, outputs=2, time_offset=-1.0, freq_shift=1, condition=lambda d: ClassEmbedding(d, 5)
    )
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=3, out_channels=6, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=5, norm_eps=1e-6,
    ).eval()  # fmt: skip
    own, state = ours.state_dict(), theirs.state_dict()
    names = {"proj_out_1": "modulation_out", "pos_embed.proj": "linear_in", "proj_out_2": "linear_out"}
    for k in range(2):
        block, mine = f"transformer_blocks.{k}", f"blocks.{k}"
        names |= {
            f"{block}.norm1.linear": f"{mine}.modulation",
            f"{block}.norm1.emb.timestep_embedder.linear_1": "time.linear1",
            f"{block}.norm1.emb.timestep_embedder.linear_2": "time.linear2",
            f"{block}.norm1.emb.class_embedder.embedding_table": "condition.table",
            f"{block}.attn1.to_out.0": f"{mine}.attention.out",
            f"{block}.ff.net.0.proj": f"{mine}.linear1",
            f"{block}.ff.net.2": f"{mine}.linear2",
        }
        for kind in ("weight", "bias"):
            for letter, part in zip("qkv", own[f"{mine}.attention.qkv.{kind}"].chunk(3), strict=True):
                state[f"{block}.attn1.to_{letter}.{kind}"] = part
    for name, value in theirs.state_dict().items():
        module, _, kind = name.rpartition(".")
        if module in names:
            weight = own[f"{names[module]}.{kind}"]
            if module == "proj_out_2":  # their order is (position, channel)
                weight = weight.unflatten(0, (6, 4)).transpose(0, 1).flatten(0, 1)
            if names[module] == "time.linear1" and kind == "weight":  # cosines first
                weight = torch.cat(weight.chunk(2, dim=1)[::-1], dim=1)
            state[name] = weight.reshape(value.shape)
    theirs.load_state_dict(state)
    x, t, labels = normal(3, 3, 8, 8), torch.tensor([0, 40, 999]), torch.tensor([0, 4, 5])
    expected = theirs(x, t, labels).sample
    assert expected.abs().mean() > 0.1
    assert_close(ours(x, (t + 1) / 1000, labels), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "millions"),
    [((384, 12, 6), 33.0), ((768, 12, 12), 130.5), ((1024, 24, 16), 458.1), ((1152, 28, 16), 675.1)],
)
@pytest.mark.parametrize("options", [ORIGINAL, {}])
def test_sizes_have_the_parameters_of_the_paper(size, millions, options):
    """Peebles & Xie 2022, tab. 1 and 4; SwiGLU with two thirds of the width has as many."""
    hidden_size, depth, num_heads = size
    with torch.device("meta"):
        net = DiT(
            4, 32, hidden_size=hidden_size, depth=depth, num_heads=num_heads, outputs=2,
            condition=lambda d: ClassEmbedding(d, 1000), **options,
        )  # fmt: skip
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, rel=0.005)


@torch.no_grad()
def test_rotated_products_depend_on_distances_only():
    query = normal(1, 1, 16).expand(-1, 12, -1)
    key = query.flip(-1)
    table = rotary_table((3, 4), 16, torch.device("cpu"))
    products = (rotate(query, table) @ rotate(key, table).transpose(-1, -2))[0]
    place = [(i, j) for i in range(3) for j in range(4)]
    by_distance: dict[tuple[int, int], list[float]] = {}
    for a, (i, j) in enumerate(place):
        for b, (k, m) in enumerate(place):
            by_distance.setdefault((i - k, j - m), []).append(products[a, b].item())
    for same in by_distance.values():
        assert max(same) - min(same) < 1e-5
    assert len({round(same[0], 3) for same in by_distance.values()}) > 20  # of 35 distances
    assert math.isclose(products[0, 0], (query[0, 0] @ key[0, 0]).item(), rel_tol=1e-5)


def test_rotation_keeps_norms_and_tokens_without_position():
    y, table = normal(2, 7, 2, 8), rotary_table((2, 3), 8, torch.device("cpu"))
    turned = rotate(y, table)
    assert_close(turned.norm(dim=-1), y.norm(dim=-1))
    assert not torch.allclose(turned[:, 1:6], y[:, 1:6]) and torch.equal(turned[:, 6:], y[:, 6:])


def test_channels_left_over_by_the_axes_are_not_rotated():
    y, table = normal(1, 8, 1, 16), rotary_table((2, 2, 2), 16, torch.device("cpu"))  # 8 pairs for 3 axes
    turned = rotate(y, table)
    assert torch.equal(turned[..., [6, 7, 14, 15]], y[..., [6, 7, 14, 15]])
    inner = [*range(6), *range(8, 14)]
    assert torch.equal(turned[..., inner], rotate(y[..., inner], rotary_table((2, 2, 2), 12, torch.device("cpu"))))
    assert_close(turned.norm(dim=-1), y.norm(dim=-1))


def test_small_preset_fits_volumes():
    from tests.conftest import compose

    names = ("hidden_size", "depth", "num_heads", "patch_size", "positions")
    model = compose("train", "model=dit_tiny").model
    net = DiT(1, [4, 4, 4], **{name: model[name] for name in names})
    with torch.no_grad():
        assert net(normal(1, 1, 4, 4, 4), torch.zeros(1)).shape == (1, 1, 4, 4, 4)


@pytest.mark.parametrize(
    "options", [{}, {"positions": "sincos"}, {"registers": 3, "shared_modulation": True}, {"bottleneck": 4}]
)
@pytest.mark.parametrize("size", [(11,), (7, 10), (3, 4, 5)])
@torch.no_grad()
def test_any_size_and_dimension_maps_to_itself(size, options):
    net = dit(image_size=list(size), hidden_size=24, **options)
    larger = tuple(2 * n for n in size)
    for each in (size, larger):
        x = normal(2, 3, *each)
        out = net(x, torch.tensor([0.1, 0.9]))
        assert out.shape == x.shape
        assert not torch.allclose(out[0], net(x, torch.tensor([0.5, 0.9]))[0])


@pytest.mark.parametrize("text", ["cross", "joint"])
@torch.no_grad()
def test_tokens_act_and_padding_does_not(text):
    condition = lambda d: TextTransformer(d, 10, 6, hidden_size=16, num_layers=1)  # noqa: E731
    net = dit(text=text, registers=2, condition=condition)
    net.condition.vector.weight.zero_() if hasattr(net.condition.vector, "weight") else None
    x, time = normal(2, 3, 8, 8), torch.tensor([0.2, 0.7])
    short, padded = torch.tensor([[1, 4, 2], [1, 5, 2]]), torch.tensor([[1, 4, 2, 0, 0], [1, 5, 2, 0, 0]])
    out = net(x, time, short)
    assert_close(net(x, time, padded), out, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(net(x, time, short.flip(0)), out)


def test_checkpointed_blocks_have_equal_gradients():
    plain, saving = dit(), dit(gradient_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    x, time = normal(2, 3, 8, 8), torch.tensor([0.2, 0.7])
    for net in (plain, saving):
        net(x, time).square().mean().backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_compiled_network_has_equal_gradients():
    net, x, time = dit(depth=1), normal(2, 3, 8, 8), torch.tensor([0.2, 0.7])
    gradients = []
    for forward in (net, torch.compile(net, backend="aot_eager", fullgraph=True)):
        net.zero_grad()
        forward(x, time).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in net.parameters()])
    assert_close(*gradients, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_new_network_predicts_zero():
    """The last layer and the gates start at 0 (adaLN-Zero)."""
    net = DiT(**TINY)
    assert net(normal(1, 3, 8, 8), torch.tensor([0.5])).abs().max() == 0
    block = net.blocks[0]
    h = normal(1, 16, 32)
    assert torch.equal(block(h, normal(1, 32), rotary_table((4, 4), 16, h.device), None, None, None), h)


@pytest.mark.parametrize(
    ("setting", "changes"),
    [
        ("hidden_size", {"hidden_size": 30}),
        ("patch_size", {"patch_size": 0}),
        ("patch_size", {"patch_size": 16}),
        ("bottleneck", {"bottleneck": 0}),
        ("mlp_ratio", {"mlp_ratio": -1.0}),
        ("mlp_norm_eps", {"mlp_norm_eps": 0.0}),
        ("activation", {"activation": "relu"}),
        ("positions", {"positions": "learned"}),
        ("image_size", {"image_size": None}),
    ],
)
def test_wrong_settings_are_refused_by_name(setting, changes):
    with pytest.raises(ValueError, match=f"model.{setting}") as error:
        DiT(**{**TINY, **changes})
    assert "\n" not in str(error.value)
