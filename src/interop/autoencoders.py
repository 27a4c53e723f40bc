"""Autoencoders of the diffusers library, an optional extra, as this project uses them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.errors import first_names, format_override, one_line, optional_package
from src.interop.diffusers_pipeline import read_config
from src.models.autoencoder import KLAutoencoder
from src.models.layers import Downsample, ResidualBlock, SelfAttention, Upsample

CLASSES = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")
PATTERNS = (
    *("model.safetensors", "config.json", "diffusion_pytorch_model*.safetensors"),
    *("vae/config.json", "vae/diffusion_pytorch_model*.safetensors"),
)
"""The files of an autoencoder on the Hub, alone or in a pipeline."""


class DiffusersAutoencoder(nn.Module):
    """An `AutoencoderKL`, `AutoencoderTiny` or `AutoencoderDC` for images in [-1, 1].

    `scale` and `shift`, one number or one per channel, are those of its configuration: (z - shift) * scale has a
    standard deviation of about 1.
    """

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net.eval().requires_grad_(False)
        config = net.config
        stages = config.get("encoder_block_out_channels") or config["block_out_channels"]
        self.channels: int = config["in_channels"]
        self.latent_channels: int = config["latent_channels"]
        self.factor: int = 2 ** (len(stages) - 1)
        self.scale: float | list[float] = config["scaling_factor"]
        self.shift: float | list[float] = config.get("shift_factor") or 0.0
        if config.get("latents_std") and config.get("latents_mean"):
            self.shift = list(config["latents_mean"])
            self.scale = [config["scaling_factor"] / std for std in config["latents_std"]]

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the latents of x; the latter is 0 for a deterministic encoder."""
        encoded = self.net.encode(x)
        if (posterior := getattr(encoded, "latent_dist", None)) is not None:
            return posterior.mean, posterior.std
        mean: Tensor = encoded.latents if hasattr(encoded, "latents") else encoded.latent
        return mean, torch.zeros_like(mean)

    def decode(self, z: Tensor) -> Tensor:
        """Return the images of latents."""
        images: Tensor = self.net.decode(z).sample
        return images


def autoencoder_folder(folder: Path) -> Path | None:
    """Return the folder of the autoencoder in a folder of diffusers: itself, or `vae` of a pipeline; None for others.

    Raises ValueError for a model of diffusers that is not an autoencoder of images.
    """
    for each in (folder, folder / "vae"):
        if (name := read_config(each / "config.json").get("_class_name")) in CLASSES:
            return each
        if name is not None and (name.startswith("Autoencoder") or each != folder):
            known = ", ".join(CLASSES)
            raise ValueError(
                f"{format_override('autoencoder', each)} holds {name} and must hold one of {known}; name another model"
            )
    return None


def read_diffusers_autoencoder(folder: Path) -> DiffusersAutoencoder:
    """Return the autoencoder in a folder of diffusers, in float32. Only JSON and tensors are read.

    Raises ValueError without the library, or for weights that cannot be read.
    """
    override = format_override("autoencoder", folder)
    with optional_package(override, "diffusers", ", or train an autoencoder with task=autoencoder"):
        import diffusers
    kind = getattr(diffusers, read_config(folder / "config.json")["_class_name"])
    options = {"local_files_only": True, "low_cpu_mem_usage": False, "output_loading_info": True}
    try:
        net, loaded = kind.from_pretrained(str(folder), torch_dtype=torch.float32, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"{override} cannot be read ({one_line(error)}); save it again") from error
    if missing := loaded["missing_keys"]:
        raise ValueError(f"{override} has no weights for {first_names(sorted(missing))}; save it again")
    return DiffusersAutoencoder(net)


def diffusers_weights(autoencoder: Any) -> dict[str, Tensor]:
    """Return the weights of an autoencoder by the names of diffusers."""
    if isinstance(autoencoder, DiffusersAutoencoder):
        return dict(autoencoder.net.state_dict())
    return {**_named("encoder", autoencoder.encoder), **_named("decoder", autoencoder.decoder)}


def as_diffusers(autoencoder: Any) -> Any:
    """Return an autoencoder as a model of diffusers, with the same weights."""
    if isinstance(autoencoder, DiffusersAutoencoder):
        return autoencoder.net
    import diffusers

    net: KLAutoencoder = autoencoder
    blocks = [each for each in net.encoder if isinstance(each, ResidualBlock)]
    stages = 1 + sum(isinstance(each, Downsample) for each in net.encoder)
    per_stage = (len(blocks) - 2) // stages  # two more are in the middle
    kind = diffusers.AutoencoderKL(
        in_channels=net.channels,
        out_channels=net.channels,
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=[blocks[per_stage * k].conv1.out_channels for k in range(stages)],
        layers_per_block=per_stage,
        latent_channels=net.latent_channels,
        norm_num_groups=blocks[0].norm1.num_groups,
        scaling_factor=1.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    kind.load_state_dict(diffusers_weights(net))
    return kind.eval()


def _named(name: str, layers: nn.Sequential) -> dict[str, Tensor]:
    """Return the weights of our encoder or decoder by the names of diffusers."""
    ends = iter(("conv_in", "conv_out"))
    is_encoder, stage, block, result = name == "encoder", 0, 0, dict[str, Tensor]()
    middle = [type(each) for each in layers].index(SelfAttention)
    for k, layer in enumerate(layers):
        stages = f"{'down' if is_encoder else 'up'}_blocks.{stage}"
        if k == middle:
            place = "mid_block.attentions.0"
        elif abs(k - middle) == 1:
            place = f"mid_block.resnets.{max(0, k - middle)}"
        elif isinstance(layer, ResidualBlock):
            place, block = f"{stages}.resnets.{block}", block + 1
        elif isinstance(layer, Downsample | Upsample):
            place = f"{stages}.{'down' if is_encoder else 'up'}samplers.0"
            stage, block = stage + 1, 0
        elif isinstance(layer, nn.GroupNorm):
            place = "conv_norm_out"
        elif isinstance(layer, nn.Conv2d):
            place = next(ends)
        for own, value in layer.state_dict().items():
            theirs = own.replace("shortcut.", "conv_shortcut.")
            if k == middle:
                theirs = own.replace("norm.", "group_norm.").replace("out.", "to_out.0.")
            parts = [theirs.replace("qkv.", f"to_{part}.") for part in "qkv"] if "qkv." in own else [theirs]
            tensors = (part.clone() for part in value.chunk(len(parts)))
            result.update(zip((f"{name}.{place}.{part}" for part in parts), tensors, strict=True))
    return result
