"""Autoencoders of the diffusers library, against the library itself."""

import json

import pytest
import torch
from torch.testing import assert_close

from src.interop.autoencoders import as_diffusers, autoencoder_folder, read_diffusers_autoencoder
from src.models.autoencoder import KLAutoencoder
from tests.models.test_models import randomize

diffusers = pytest.importorskip("diffusers")
ENDS = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
MODELS = {
    "AutoencoderKL": {"block_out_channels": (8, 8, 8), "norm_num_groups": 4, "shift_factor": 0.1, **ENDS},
    "AutoencoderTiny": {
        **dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (8, 8, 8)),
        "num_encoder_blocks": (1, 1, 1),
        "num_decoder_blocks": (1, 1, 1),
    },
    "AutoencoderDC": {
        **dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (8, 8, 8)),
        **dict.fromkeys(("encoder_layers_per_block", "decoder_layers_per_block"), (1, 1, 1)),
        **dict.fromkeys(("encoder_qkv_multiscales", "decoder_qkv_multiscales"), ((), (), ())),
        "scaling_factor": 0.4,
    },
}


def save(folder, name):
    torch.manual_seed(0)
    net = getattr(diffusers, name)(**{"latent_channels": 4, **MODELS[name]}).eval()
    net.save_pretrained(folder)
    return net


@pytest.mark.parametrize("name", MODELS)
def test_encodes_and_decodes_as_the_library(tmp_path, name):
    net = save(tmp_path / "vae", name)
    folder = autoencoder_folder(tmp_path)
    assert folder == tmp_path / "vae" == autoencoder_folder(tmp_path / "vae")
    ours = read_diffusers_autoencoder(folder)
    x, z = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        mean, std = ours.encode(x)
        if name == "AutoencoderKL":
            theirs = net.encode(x).latent_dist
            assert_close(std, theirs.std)
            theirs = theirs.mean
        else:
            theirs = net.encode(x)[0]
            assert not std.any()
        assert_close(mean, theirs)
        assert_close(ours.decode(z), net.decode(z).sample)
    assert ours.factor == x.shape[-1] // mean.shape[-1] and ours.latent_channels == mean.shape[1]
    assert (ours.scale, ours.shift) == (net.config.scaling_factor, net.config.get("shift_factor") or 0.0)


def test_scaling_per_channel_is_read(tmp_path):
    save(tmp_path, "AutoencoderKL")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {"latents_mean": [1, 2, 3, 4], "latents_std": [2, 2, 4, 4]}
    path.write_text(json.dumps(config))
    ours = read_diffusers_autoencoder(tmp_path)
    z = torch.randn(1, 4, 1, 1)
    theirs = (
        (z - torch.tensor([1.0, 2, 3, 4]).view(1, 4, 1, 1)) * 0.18215 / torch.tensor([2.0, 2, 4, 4]).view(1, 4, 1, 1)
    )
    scale, shift = (torch.tensor(x).view(1, 4, 1, 1) for x in (ours.scale, ours.shift))
    assert_close((z - shift) * scale, theirs)


def test_incomplete_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    save(tmp_path, "AutoencoderKL")
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights.pop("decoder.conv_out.weight")
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match="autoencoder="):
        read_diffusers_autoencoder(tmp_path)


def test_other_models_are_no_autoencoder(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    assert autoencoder_folder(tmp_path) is None
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
    with pytest.raises(ValueError, match="autoencoder="):
        autoencoder_folder(tmp_path)


def test_own_autoencoder_equals_its_copy_in_the_library(tmp_path):
    ours = KLAutoencoder(3, 16, latent_channels=2, model_channels=8, channel_mult=(1, 2, 2), num_res_blocks=2)
    randomize(ours)
    as_diffusers(ours).save_pretrained(tmp_path)
    theirs = read_diffusers_autoencoder(tmp_path)
    x, z = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 2, 4, 4)
    with torch.no_grad():
        assert_close(theirs.encode(x), ours.encode(x), rtol=1e-4, atol=1e-5)
        assert_close(theirs.decode(z), ours.decode(z), rtol=1e-4, atol=1e-5)
    assert (theirs.channels, theirs.latent_channels, theirs.factor) == (3, 2, 4)
