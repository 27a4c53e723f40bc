"""Text embeddings and cross-attention against torch, and their invariance to padding."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from src.models.conditioning import TextProjection, TextTransformer
from src.models.layers import CrossAttention

IDS = torch.tensor([[1, 7, 5, 9, 2, 0, 0, 0], [1, 2, 0, 0, 0, 0, 0, 0], [1, 3, 4, 5, 6, 7, 8, 2]])


def randomized(net: nn.Module, seed: int = 0) -> nn.Module:
    """Set every parameter to random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return net


def copy_attention(theirs: nn.MultiheadAttention, weights: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in weights.items():
            parameter = theirs.get_parameter(name)
            assert parameter.shape == value.shape, name
            parameter.copy_(value)


# Cross-attention


@pytest.mark.parametrize("masked", [False, True])
def test_cross_attention_equals_torch(masked):
    ours = randomized(CrossAttention(channels=12, groups=3, num_heads=2, token_width=10))
    theirs = nn.MultiheadAttention(12, 2, kdim=10, vdim=10, batch_first=True)
    keys, values = ours.kv.weight.chunk(2)
    bias = torch.cat([ours.query.bias, ours.kv.bias])
    copy_attention(
        theirs,
        {
            "q_proj_weight": ours.query.weight,
            "k_proj_weight": keys,
            "v_proj_weight": values,
            "in_proj_bias": bias,
            "out_proj.weight": ours.out.weight,
            "out_proj.bias": ours.out.bias,
        },
    )
    x, tokens = torch.randn(3, 12, 4, 5), torch.randn(3, 7, 10)
    mask = torch.arange(7) < torch.tensor([[7], [1], [4]]) if masked else None
    normed = nn.functional.group_norm(x, 3, ours.norm.weight, ours.norm.bias).flatten(2).transpose(1, 2)
    attended, _ = theirs(normed, tokens, tokens, key_padding_mask=None if mask is None else ~mask)
    expected = x + attended.transpose(1, 2).reshape(x.shape)
    assert_close(ours(x, tokens, mask), expected, rtol=1e-4, atol=1e-5)


def test_cross_attention_is_the_identity_at_initialization():
    net = CrossAttention(channels=8, groups=2, num_heads=2, token_width=6)
    x, tokens = torch.randn(2, 8, 3, 3), torch.randn(2, 5, 6, requires_grad=True)
    out = net(x, tokens)
    assert_close(out, x, rtol=0, atol=0)
    out.square().sum().backward()
    assert net.out.weight.grad.abs().max() > 0
    (out_of_random,) = torch.autograd.grad(randomized(net)(x, tokens).square().sum(), tokens)
    assert (out_of_random.abs().amax(2) > 0).all()


def test_cross_attention_ignores_masked_tokens():
    net = randomized(CrossAttention(channels=8, groups=2, num_heads=4, token_width=6))
    x, tokens = torch.randn(2, 8, 3, 3), torch.randn(2, 5, 6)
    mask = torch.arange(5) < torch.tensor([[2], [5]])
    other = torch.where(mask[:, :, None], tokens, 100.0).requires_grad_()
    out = net(x, other, mask)
    assert_close(out, net(x, tokens, mask), rtol=0, atol=0)
    assert_close(out[:1], net(x[:1], tokens[:1, :2]), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(out.square().sum(), other)
    assert ((gradient.abs().amax(2) > 0) == mask).all()


# TextTransformer


def test_text_transformer_equals_torch():
    ours = randomized(TextTransformer(dim=5, vocab_size=11, max_length=8, hidden_size=12, num_layers=2, num_heads=3))
    mask = IDS != 0
    x = ours.table(IDS) + ours.positions
    for block in ours.blocks:
        theirs = nn.TransformerEncoderLayer(12, 3, 48, 0.0, "gelu", batch_first=True, norm_first=True)
        names = {
            "self_attn.in_proj_weight": block.qkv.weight,
            "self_attn.in_proj_bias": block.qkv.bias,
            "self_attn.out_proj.weight": block.out.weight,
            "self_attn.out_proj.bias": block.out.bias,
            **{f"{part}.weight": getattr(block, part).weight for part in ("linear1", "linear2", "norm1", "norm2")},
            **{f"{part}.bias": getattr(block, part).bias for part in ("linear1", "linear2", "norm1", "norm2")},
        }
        copy_attention(theirs, names)
        x = theirs(x, src_key_padding_mask=~mask)
    x = nn.functional.layer_norm(x, (12,), ours.norm.weight, ours.norm.bias)
    vector, tokens, there = ours(IDS)
    assert (there == mask).all()
    assert_close(tokens[mask], x[mask], rtol=1e-4, atol=1e-5)
    for row, length in enumerate((5, 2, 8)):
        assert_close(vector[row], ours.vector(x[row, :length].sum(0) / length**0.5), rtol=1e-4, atol=1e-5)
    assert ours.token_width == tokens.shape[2] == 12
    assert vector.shape == (3, 5)


def test_text_transformer_ignores_padding_but_not_order():
    net = randomized(TextTransformer(dim=5, vocab_size=11, max_length=8, hidden_size=12, num_layers=2, num_heads=3))
    short, long = net(IDS[:1, :5]), net(IDS[:1])
    assert_close(long.vector, short.vector, rtol=1e-5, atol=1e-6)
    assert_close(long.tokens[:, :5], short.tokens, rtol=1e-5, atol=1e-6)
    swapped = net(IDS[:1, [0, 2, 1, 3, 4]])
    assert (swapped.vector - short.vector).abs().max() > 1e-2
    gradient = torch.autograd.grad(long.vector.sum() + long.tokens[:, :5].sum(), net.table.weight)[0]
    assert (gradient.abs().amax(1) > 0).nonzero().flatten().tolist() == [1, 2, 5, 7, 9]


def test_one_word_changes_the_initial_embedding():
    net = TextTransformer(dim=256, vocab_size=300, max_length=32, hidden_size=128, num_layers=2, num_heads=4)
    ids = torch.randint(3, 300, (64, 32))
    ids[:, 14:] = 0  # texts of 14 tokens
    another = ids.clone()
    another[:, 5] = torch.randint(3, 300, (64,))
    vector, tokens, mask = net(ids)
    by_one_word = (net(another).vector - vector).square().mean() / (2 / 14)  # one of 14 words has 1/14 of the variance
    assert 0.7 < by_one_word < 1.4
    between_places = torch.corrcoef(tokens[mask])[~torch.eye(int(mask.sum()), dtype=torch.bool)]
    assert between_places.mean().abs() < 0.1  # tokens at different positions are dissimilar


@pytest.mark.parametrize("settings", [{"num_layers": 0}, {"num_heads": 5}, {"num_heads": 0}])
def test_text_transformer_arguments_out_of_range_raise(settings):
    with pytest.raises(ValueError, match=r"conditioning\.embed") as error:
        TextTransformer(dim=5, vocab_size=11, max_length=8, **settings)
    assert "\n" not in str(error.value)


# TextProjection


def test_text_projection_masks_rows_of_zeros():
    net = randomized(TextProjection(dim=5, features=7, hidden_size=6))
    rows = [3 * torch.randn(count, 7) for count in (4, 1, 6)]
    vector, tokens, mask = net(torch.nn.utils.rnn.pad_sequence(rows, True))
    assert mask.sum(1).tolist() == [4, 1, 6]
    for i, each in enumerate(rows):  # one at a time, without padding
        normed = nn.functional.layer_norm(each, (7,), net.norm1.weight, net.norm1.bias)
        expected = nn.functional.layer_norm(
            normed @ net.linear.weight.T + net.linear.bias, (6,), net.norm2.weight, net.norm2.bias
        )
        assert_close(tokens[i, : len(each)], expected, rtol=1e-4, atol=1e-5)
        assert_close(
            vector[i],
            net.vector(nn.functional.layer_norm(expected.sum(0) / len(expected) ** 0.5, (6,))),
            rtol=1e-4,
            atol=1e-5,
        )
    assert net.token_width == 6


def test_text_projection_without_features_raises():
    with pytest.raises(ValueError, match="features"):
        TextProjection(dim=5, features=None)


@pytest.mark.parametrize(
    ("net", "padding"),
    [
        (TextTransformer(dim=5, vocab_size=11, max_length=4, hidden_size=8), torch.zeros(2, 4, dtype=torch.int64)),
        (TextProjection(dim=5, features=7), torch.zeros(2, 4, 7)),
    ],
    ids=lambda each: type(each).__name__,
)
def test_text_of_padding_only_is_finite(net, padding):
    vector, tokens, mask = net(padding)
    attended = randomized(CrossAttention(8, 2, 2, net.token_width))(torch.randn(2, 8, 3, 3), tokens, mask)
    assert mask.sum(1).tolist() == [1, 1]
    assert all(each.isfinite().all() for each in (vector, tokens, attended))
    attended.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
