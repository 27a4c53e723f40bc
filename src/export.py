"""Export a trained model for this project or for other programs: `python -m src.export run=outputs/train/...`."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from src.config.cli import launch
from src.config.output import relative, start_output
from src.config.search_path import search_path_overrides
from src.errors import UsageError, command, format_override, shell_word, usage_errors
from src.interop.hub_models import MODEL_FILE, SIDECAR, check_push, push
from src.runs.checkpoints import find_checkpoint
from src.training.checkpoints import exportable_settings, write_exported

if TYPE_CHECKING:
    from src.runs.open import OpenedRun

FORMAT_PACKAGES = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "diffusers": ("diffusers",)}
"""Packages that a format needs, of the extra of its name."""
MAX_DECODED = 63
"""Latents that an exported decoder decodes at once: from 64 on, layers of diffusers take another path."""
DESCRIBED_KEYS = ("data", "model", "schedule", "snr_shift", "zero_terminal_snr", "diffusion", "conditioning")
"""Settings in network.json."""


def export(cfg: DictConfig) -> Path:
    """Write a trained model in the format `cfg.format` into the output folder; return its file or folder."""
    from src.runs.autoencoder import AutoencoderError, export_autoencoder
    from src.runs.model_card import autoencoder_card, usage, write_model_card
    from src.runs.nodes import to_plain
    from src.runs.open import open_run

    with usage_errors():
        check_hub(cfg)
        find_checkpoint(cfg.run, cfg.ckpt, cfg.init_from.path)  # before the slow imports
        check_packages(cfg.format)
        if cfg.aot:
            from src.training.compile import check_compiler

            check_compiler("aot")
        try:
            opened = open_run(
                cfg.run, cfg.ckpt, cfg.ema, cfg.trust, init_from=cfg.init_from, autoencoder=cfg.autoencoder
            )
        except AutoencoderError:
            path, hint, trained = export_autoencoder(cfg)
            if not (card := path.with_name("README.md")).exists():
                card.write_text(autoencoder_card(trained, path.name), encoding="utf-8")
            print(hint)
            return path
        config, left_out = exportable_settings(to_plain(opened.config))
    path, hint = WRITERS[cfg.format](opened, config, cfg)
    folder, library = path if path.is_dir() else path.parent, "diffusers" if cfg.format == "diffusers" else None
    write_model_card(
        folder,
        opened,
        usage(path, cfg.format, cfg.hub, hint, "autoencoder.path" in left_out),
        library,
        draw=cfg.hub is not None or library is not None,
    )
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files)
    print(f"{relative(opened.checkpoint)} exported to {relative(path)} ({size / 1e6:.1f} MB)")
    if left_out:
        print(f"Left out paths and names of this machine: {', '.join(left_out)}")
    print(hint)
    if cfg.hub is not None:
        with usage_errors():
            print(f"Pushed to {push(folder, cfg.hub, cfg.hub_private)}")
    return path


def check_hub(cfg: DictConfig) -> None:
    """Raise ValueError if pushing to the Hub is certain to fail, or would push other files of the output folder."""
    if cfg.hub is None:
        return
    check_push(cfg.hub)
    if (folder := Path(cfg.run_dir)).is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"{format_override('hub', cfg.hub)} needs an empty output folder, and {folder} has files; name another one"
        )


def check_packages(name: str) -> None:
    """Raise ValueError with the command to install the packages of a format, if one is missing."""
    if missing := [package for package in FORMAT_PACKAGES.get(name, ()) if importlib.util.find_spec(package) is None]:
        raise ValueError(f"format={name} needs {' and '.join(missing)}; pip install {' '.join(FORMAT_PACKAGES[name])}")


Writer = Callable[["OpenedRun", dict[str, Any], DictConfig], tuple[Path, str]]
"""(run, its settings without paths, settings of this command) -> path of the file or folder, line about its use.

It calls `start_output` after everything that can be refused, with UsageError.
"""


def write_safetensors(opened: "OpenedRun", config: dict[str, Any], cfg: DictConfig) -> tuple[Path, str]:
    """Write `model.safetensors`, the weights and the model configuration, for this project."""
    path = start_output(Path(cfg.run_dir)) / MODEL_FILE
    write_exported(path, opened.module.state_dict(), opened.averaged, config)
    place = OmegaConf.select(opened.config, "autoencoder.path")
    autoencoder = [format_override("autoencoder", place)] if place and config["autoencoder"]["path"] is None else []
    sample = command("sample", *search_path_overrides(), format_override("ckpt", path), *autoencoder, "n=64")
    return path, f"Sample from it with: {sample}"


def write_program(opened: "OpenedRun", config: dict[str, Any], cfg: DictConfig) -> tuple[Path, str]:
    """Write the network, `network.json` and `sample.py`, which needs no file of this project.

    A network of latents comes with the decoder of its autoencoder.
    """
    import torch

    from src.interop import torch_export
    from src.runs.latents import decoder_of

    module, folder = opened.module, Path(cfg.run_dir)
    decoder = decoder_of(opened.data)
    file = torch_export.FILES[cfg.format]
    decoder_file = None if decoder is None else file.replace("network", "decoder")
    for name in filter(None, (file, decoder_file, "network.json", "sample.py")):
        if (folder / name).exists():
            raise UsageError(f"{format_override('hydra.run.dir', folder)} already has {name}; choose another folder")
    null, examples = module.null, module.examples
    conditions = None if null is None or examples is None else torch.cat([null, examples])
    with usage_errors():
        inputs = torch_export.example_inputs(module.shape, conditions, 2)
        programs = {"network": (torch_export.trace(module.net, inputs), module.net)}
        if decoder is not None:
            programs["decoder"] = torch_export.trace(decoder, inputs[:1], MAX_DECODED), decoder
    settings = {name: config.get(name) for name in DESCRIBED_KEYS}
    info = torch_export.describe_network(module.diffusion, module.schedule, module.shape, settings) | {
        "cond_null": None if null is None else null[0].tolist(),
        "cond_examples": None if examples is None else examples.tolist(),
        "decoder": decoder_file,
        "value_range": getattr(opened.data.displayed, "value_range", None),
        "weights": "averaged" if opened.averaged else "raw",
    }
    start_output(folder)
    checks = [torch_export.example_inputs(module.shape, conditions, batch) for batch in (1, 3)]
    with usage_errors():
        for name in (cfg.format, *(["aot"] if cfg.aot else [])):
            for part, (program, net) in programs.items():
                torch_export.write_network(folder, name, program, net, checks, part)
    script = torch_export.write_guide(folder, cfg.format, info)
    return folder / file, f"Sample from it without this project: python {shell_word(str(relative(script)))}"


def write_diffusers(opened: "OpenedRun", config: dict[str, Any], cfg: DictConfig) -> tuple[Path, str]:
    """Write a pipeline folder of the diffusers library, which samples as the sampler of the run or of `cfg` does.

    `training.safetensors` has what this project needs to read the folder without loss.
    """
    from src.interop.diffusers_export import make_pipeline, sampling_code, write_pipeline
    from src.interop.diffusers_unet import TIME
    from src.runs.components import sampler_settings
    from src.runs.latents import vae_of
    from src.runs.nodes import to_plain
    from src.runs.open import sampler_of

    module, folder = opened.module, Path(cfg.run_dir)
    if (folder / "model_index.json").exists():
        raise UsageError(
            f"{format_override('hydra.run.dir', folder)} already has model_index.json; choose another folder"
        )
    with usage_errors():
        guidance = OmegaConf.create({**cfg.guidance, "model": None})
        settings = sampler_settings(cfg.sampler, opened.config.sampler)
        sampler = sampler_of(opened, settings, guidance)
        autoencoder, latents = vae_of(opened.data)
        pipeline = make_pipeline(
            *(module.net, config["model"], module.diffusion, module.schedule, sampler.fn, sampler.steps),
            *(sampler.spacing, (config.get("conditioning") or {}).get("encode"), sampler.guidance),
            latents,
        )
        write_pipeline(start_output(folder), pipeline)
        if autoencoder is not None:
            autoencoder.save_pretrained(folder / "vae")
    weights = module.state_dict()
    kept = {TIME: weights[f"net.{TIME}"]} | {k: v for k, v in weights.items() if not k.startswith("net.")}
    write_exported(folder / SIDECAR, kept, opened.averaged, config | {"sampler": to_plain(settings)})
    return folder, f"Sample from it without this project:\n\n{sampling_code(pipeline, str(folder.resolve()))}"


WRITERS: dict[str, Writer] = {
    "safetensors": write_safetensors,
    "torch_export": write_program,
    "onnx": write_program,
    "diffusers": write_diffusers,
}

if __name__ == "__main__":
    launch("export", export)
