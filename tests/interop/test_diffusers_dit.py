"""Transformers of diffusers as ours, and ours as those, output against output."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from src.interop.diffusers_dit import config_of, from_diffusers, settings_of, to_diffusers
from src.models.conditioning import ClassEmbedding
from src.models.dit import DiT
from tests.loops import for_each
from tests.models.test_models import normal, randomize

diffusers = pytest.importorskip("diffusers")

SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "sample_size": 8,
    "num_embeds_ada_norm": 5,
}
OURS = {"channels": 3, "image_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "activation": "gelu"}
OURS |= {"norm": "layer", "qk_norm": False, "positions": "sincos", "freq_shift": 1}


def theirs_of(**changes) -> torch.nn.Module:
    """Return a transformer whose blocks have equal embeddings, as in converted files."""
    net = randomize(diffusers.DiTTransformer2DModel(**{**SMALL, **changes})).eval()
    for block in net.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(net.transformer_blocks[0].norm1.emb.state_dict())
    return net


def ours_of(settings: dict, weights: dict, classes: int | None) -> DiT:
    condition = None if classes is None else partial(ClassEmbedding, num_classes=classes)
    net = DiT(**settings, condition=condition).eval()
    net.load_state_dict(weights)
    return net


@for_each("changes", {"learned variance": {"out_channels": 8}, "pixels": {"in_channels": 3, "patch_size": 4}})
@torch.no_grad()
def test_imported_and_exported_transformers_equal_those_of_diffusers(changes):
    theirs = theirs_of(**changes)
    settings = settings_of(theirs.config, 1000)
    weights = from_diffusers(theirs.state_dict(), settings)
    x, t, labels = normal(3, theirs.config.in_channels, 8, 8), torch.tensor([0, 40, 999]), torch.tensor([0, 4, 5])
    expected = theirs(x, t, labels).sample
    assert expected.abs().mean() > 0.1
    atol = 1e-5 * expected.abs().max().item()
    assert_close(ours_of(settings, weights, 5)(x, (t + 1) / 1000, labels), expected, rtol=1e-5, atol=atol)

    model = {"freq_shift": 0, **settings}
    again = diffusers.DiTTransformer2DModel(**config_of(model, settings["outputs"], 5))
    exported = to_diffusers(weights, model, settings["outputs"])
    again.load_state_dict(exported)
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in again.state_dict().items())
    second = from_diffusers(exported, settings)
    assert all(torch.equal(second[name], value) for name, value in weights.items())


@torch.no_grad()
def test_unconditional_transformer_has_one_class():
    ours = randomize(DiT(**OURS)).eval()
    model = {"mlp_ratio": 4.0, "registers": 0, "bottleneck": None, "shared_modulation": False, "patch_size": 2}
    model |= {"dropout": 0.0, "mlp_norm_eps": 1e-6, "time_offset": 0.0, **OURS}
    theirs = diffusers.DiTTransformer2DModel(**config_of(model, 1, None)).eval()
    theirs.load_state_dict(to_diffusers(ours.state_dict(), model, 1))
    x, t = normal(3, 3, 8, 8), torch.tensor([0, 40, 999])
    expected = ours(x, (t + 1) / 1000)
    atol = 1e-5 * expected.abs().max().item()
    assert_close(theirs(x, t, torch.zeros(3, dtype=torch.long)).sample, expected, rtol=1e-5, atol=atol)


def test_blocks_with_other_embeddings_are_refused():
    theirs = randomize(diffusers.DiTTransformer2DModel(**SMALL))
    with pytest.raises(ValueError, match=r"init_from.*timestep_embedder"):
        from_diffusers(theirs.state_dict(), settings_of(theirs.config, 1000))


@for_each(
    "name, value",
    {"activation_fn": "geglu", "norm_type": "ada_norm_single", "attention_bias": False, "out_channels": 5}.items(),
)
def test_configurations_without_our_network_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        settings_of(SMALL | {name: value}, 1000)
