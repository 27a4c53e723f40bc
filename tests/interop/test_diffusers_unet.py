"""Networks of diffusers as ours, and ours as those, output against output."""

import pytest
import torch
from torch.testing import assert_close

from src.interop.diffusers_unet import config_of, from_diffusers, original_time, settings_of, shift_time, to_diffusers
from src.models.conditioning import ClassEmbedding
from src.models.unet import UNet
from tests.models.test_models import normal, randomize

diffusers = pytest.importorskip("diffusers")

SMALL = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "norm_num_groups": 8}
THEIRS = {
    "ddpm": {  # the layout of google/ddpm-cifar10-32
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": None,
        "norm_eps": 1e-6,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    },
    "defaults": {  # cosines first, frequencies of ADM
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "sample_size": (8, 12),
    },
    "adm": {
        "block_out_channels": (16, 16, 32),
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 8,
        "attention_head_dim": 8,
        "layers_per_block": 2,
        "out_channels": 6,
        "num_class_embeds": 4,
    },
}


def theirs_of(name: str) -> torch.nn.Module:
    return randomize(diffusers.UNet2DModel(**{**SMALL, **THEIRS[name]})).eval()


def ours_of(settings: dict, weights: dict, rows: int | None) -> UNet:
    condition = None if rows is None else lambda dim: ClassEmbedding(dim, rows - 1)
    net = UNet(**settings, condition=condition).eval()
    net.load_state_dict(weights)
    return net


@pytest.mark.parametrize("name", THEIRS)
@torch.no_grad()
def test_imported_unet_equals_that_of_diffusers(name):
    theirs = theirs_of(name)
    settings = settings_of(theirs.config, 1000)
    ours = ours_of(
        settings, from_diffusers(theirs.state_dict(), theirs.config, settings), theirs.config.num_class_embeds
    )
    size = settings["image_size"]
    x, t = normal(4, 3, *([size] * 2 if isinstance(size, int) else size)), torch.tensor([0, 1, 17, 999])
    labels = torch.tensor([0, 1, 2, 3]) if theirs.config.num_class_embeds else None
    expected = theirs(x, t, class_labels=labels).sample
    assert expected.abs().mean() > 0.1
    assert_close(ours(x, (t + 1) / 1000, labels), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", THEIRS)
@torch.no_grad()
def test_import_and_export_keep_bits(name):
    """The exported network computes the same, and its weights are those that were imported, in the layout of DDPM."""
    theirs = theirs_of(name)
    settings = settings_of(theirs.config, 1000)
    weights = from_diffusers(theirs.state_dict(), theirs.config, settings)
    classes = theirs.config.num_class_embeds
    config = config_of(settings, settings["outputs"], classes)
    exported = to_diffusers(weights, settings)
    again = diffusers.UNet2DModel(**config).eval()
    again.load_state_dict(exported)
    second = from_diffusers(exported, config, settings_of(config, 1000))
    assert all(torch.equal(second[key], value) for key, value in weights.items())
    size = settings["image_size"]
    x, t = normal(2, 3, *([size] * 2 if isinstance(size, int) else size)), torch.tensor([3, 950])
    labels = torch.tensor([0, 3]) if classes else None
    assert_close(
        again(x, t, class_labels=labels).sample, theirs(x, t, class_labels=labels).sample, rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_exported_unet_sees_steps_from_zero():
    """Our time (t + 1) / T is their step t."""
    settings = {"channels": 1, "image_size": 8, "model_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1}
    settings |= {"attention_resolutions": [4], "num_heads": 1, "num_head_channels": None, "patch_size": 1}
    settings |= {"resblock_updown": False, "dropout": 0.0, "time_conditioning": "add"}
    ours = randomize(UNet(**settings)).eval()
    theirs = diffusers.UNet2DModel(**config_of(settings, 1, None)).eval()
    theirs.load_state_dict(to_diffusers(ours.state_dict(), settings))
    x, t = normal(3, 1, 8, 8), torch.tensor([0, 40, 999])
    assert_close(theirs(x, t).sample, ours(x, (t + 1) / 1000), rtol=1e-5, atol=1e-5)


def test_sidecar_restores_bits_of_the_time_embedding():
    """The rotation rounds, so that its inverse has other bits."""
    settings = {"channels": 1, "image_size": 8, "model_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1}
    settings |= {"attention_resolutions": [4], "num_heads": 1, "num_head_channels": None, "patch_size": 1}
    settings |= {"resblock_updown": False, "dropout": 0.0, "time_conditioning": "add"}
    time = randomize(UNet(**settings)).state_dict()["time.linear1.weight"]
    exported = to_diffusers({"time.linear1.weight": time}, settings)["time_embedding.linear_1.weight"]
    assert torch.equal(original_time(exported, {"time.linear1.weight": time}, settings), time)
    assert original_time(exported + 1e-6, {"time.linear1.weight": time}, settings) is None
    assert original_time(exported, {}, settings) is None


def test_old_attention_layers_are_read():
    """With other names, as 1x1 convolutions."""
    theirs = theirs_of("ddpm")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in theirs.state_dict().items():
        part = next((new for new in old if f".{new}." in name), None)
        is_matrix = part is not None and value.ndim == 2
        renamed[name.replace(part, old[part]) if part else name] = value[..., None, None] if is_matrix else value
    settings = settings_of(theirs.config, 1000)
    expected = from_diffusers(theirs.state_dict(), theirs.config, settings)
    found = from_diffusers(renamed, theirs.config, settings)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_shifted_time_embedding_rotates_frequencies():
    """The layer acts on the sinusoids of t + 1 as the shifted one acts on those of t."""
    weight, t, half = normal(5, 8).double(), 12.0, 4
    frequency = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / (half - 1))
    at = lambda t: torch.cat([(t * frequency).sin(), (t * frequency).cos()])  # noqa: E731
    assert_close(shift_time(weight, 1, 1) @ at(t), weight @ at(t + 1))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"time_embedding_type": "fourier"}, "time_embedding_type"),
        ({"mid_block_type": None}, "mid_block_type"),
        ({"sample_size": None}, "sample_size"),
        ({"down_block_types": ("SkipDownBlock2D", "AttnDownBlock2D")}, "down_block_types"),
        ({"block_out_channels": (16, 24)}, "block_out_channels"),
        ({"out_channels": 5}, "out_channels"),
    ],
)
def test_other_architectures_are_refused_by_name(change, named):
    config = {**diffusers.UNet2DModel(**{**SMALL, **THEIRS["defaults"]}).config, **change}
    with pytest.raises(ValueError, match=named):
        settings_of(config, 1000)
