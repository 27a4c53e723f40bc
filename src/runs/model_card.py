"""Write the model card of an exported model: README.md, which the Hugging Face Hub shows and searches."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from src.config.resume import saved_overrides
from src.config.words import key_of
from src.errors import command, format_override, shell_word
from src.runs.autoencoder import OpenedAutoencoder
from src.runs.checkpoints import read_metrics
from src.runs.nodes import to_plain
from src.runs.open import OpenedRun, pick_device
from src.training.checkpoints import exportable_settings, may_be_path, step_of
from src.viz.tables import markdown_table

if TYPE_CHECKING:
    from PIL.Image import Image

NUM_SAMPLES = 16
MAX_LENGTH = 60
"""Characters of a value in the card; longer ones, such as a tokenizer, are left out."""


def usage_in_project(location: str, needs_autoencoder: bool = False) -> str:
    """Return how to sample in this project from `location`, hf://user/name or a file, as Markdown for the card.

    `needs_autoencoder` asks for the autoencoder of a model of latents.
    """
    words, argument = (["autoencoder=FOLDER"], ', autoencoder="FOLDER"') if needs_autoencoder else ([], "")
    return f"""Open it with Denoising Diffusion Lab, in its clone:
```
{command("sample", format_override("run", location), *words, "n=64")}
```
or in Python:
```python
from src.runs.open import open_run

opened = open_run("{location}"{argument})
*_, samples = opened.module.sample(range(16), seed=0)
```"""


def usage(path: Path, format_name: str, hub: str | None, hint: str, needs_autoencoder: bool = False) -> str:
    """Return how to use an exported file or folder as Markdown for the card; `hint` is that of its writer."""
    if format_name == "safetensors":
        return usage_in_project(path.name if hub is None else f"hf://{hub}", needs_autoencoder)
    if format_name == "diffusers":
        code = hint.partition("\n\n")[2].replace(json.dumps(str(path.resolve())), json.dumps(hub or path.name))
        packages = "torch, diffusers and tokenizers" if (path / "network.pt2").exists() else "torch and diffusers"
        return f"Draw 16 samples; this needs {packages} only:\n```python\n{code}\n```"
    fetch = "" if hub is None else f"hf download {hub} --local-dir model && cd model\n"
    packages = "numpy and onnxruntime" if format_name == "onnx" else "torch"
    return f"""Draw 16 samples by `{path.name}`; this needs {packages} only:
```
{fetch}python sample.py
```
`network.json` describes the inputs and the output of the network."""


def write_model_card(
    folder: Path, opened: OpenedRun, usage: str, library: str | None = None, draw: bool = False
) -> None:
    """Write README.md into `folder`, unless it has one; with `draw`, also samples of a model of images."""
    if (folder / "README.md").exists():  # of another project, perhaps
        return
    samples = ""
    if draw and len(opened.module.shape) == 3:
        draw_card_samples(opened).save(folder / "samples.png")
        sampler = describe_node(exportable_settings(to_plain(opened.config))[0]["sampler"])
        samples = f"![{NUM_SAMPLES} samples](samples.png)\n\nNot selected: the samples of seed 0, by `{sampler}`.\n\n"
    (folder / "README.md").write_text(model_card(opened, usage, samples, library), encoding="utf-8")


def model_card(opened: OpenedRun, usage: str, samples: str = "", library: str | None = None) -> str:
    """Return the card in Markdown: front matter, `usage`, `samples`, settings, training command and metrics.

    `usage` says in Markdown how to open the exported files. `library` is the Hub's name of the library that opens them.
    The command and the metrics are those of the run folder; an exported model has none. Paths are left out.
    """
    config, _ = exportable_settings(to_plain(opened.config))
    text = f"# Denoising diffusion model\n\n{usage.strip()}\n\n{samples}"
    return render_card(front_matter(opened, library), text, recipe(opened, config), opened.checkpoint)


def autoencoder_card(opened: OpenedAutoencoder, file: str) -> str:
    """Return the card of an autoencoder that is exported to `file`, as `model_card` does."""
    config, _ = exportable_settings(opened.settings)
    net = opened.net
    rows = {
        "network": describe_node(config["model"]),
        "parameters": f"{sum(p.numel() for p in net.parameters()):,}",
        "shape of the latents": " x ".join(map(str, (net.latent_channels, *net.latent_size))),
        "loss": describe_node(config["loss"]),
        **training_rows(config, opened.checkpoint, opened.averaged),
    }
    text = f"""# Autoencoder of images

Train a diffusion model of its latents with Denoising Diffusion Lab, in its clone:
```
{command("train", format_override("autoencoder", file), "data=folder", "data.root=path/to/images")}
```
or use it in Python:
```python
from src.runs.autoencoder import open_autoencoder

net = open_autoencoder("{file}")
mean, std = net.encode(x)  # x (B, {net.channels}, H, W) in [-1, 1]
images = net.decode(mean)
```

"""
    return render_card({"tags": ["autoencoder", "pytorch"]}, text, table_rows(rows), opened.checkpoint)


def render_card(header: Mapping[str, Any], text: str, rows: list[list[str]], checkpoint: Path) -> str:
    """Return a card: front matter, text, the table of settings, and command and metrics of the checkpoint's run."""
    run = checkpoint.parents[1] if checkpoint.parent.name == "checkpoints" else None
    card = f"---\n{yaml.safe_dump(dict(header), sort_keys=False)}---\n\n{text}"
    card += f"## Settings\n{markdown_table(['setting', 'value'], rows)}\n"
    if run is not None and (overrides := published_overrides(run)) is not None:
        card += f"\n## Training\n```\n{command('train', *overrides)}\n```\n"
        if any(each.endswith("=...") for each in overrides):
            card += "`...` stands for files of the author.\n"
    metrics = (run and read_metrics(run)) or {}
    rows = [[name, f"{x:.4g}"] for name, x in metrics.items() if name.startswith("val/") and isinstance(x, float)]
    if rows:
        card += f"\n## Metrics at the end of training\n{markdown_table(['metric', 'value'], rows)}\n"
    return card


def front_matter(opened: OpenedRun, library: str | None) -> dict[str, Any]:
    """Return the metadata by which the Hub lists the model."""
    from src.data.text import TextCondition

    condition, found = opened.data.condition, {"library_name": library, "tags": ["diffusion", "pytorch"]}
    if len(opened.module.shape) == 3 and condition is None:
        found["pipeline_tag"] = "unconditional-image-generation"
    elif len(opened.module.shape) == 3 and isinstance(condition, TextCondition):
        found["pipeline_tag"] = "text-to-image"
    return {name: value for name, value in found.items() if value is not None}


def recipe(opened: OpenedRun, config: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of the table of settings: what the model is and how it was trained."""
    encode = (config.get("conditioning") or {}).get("encode")
    autoencoder = config.get("autoencoder") or {}
    rows = {
        "network": describe_node(config["model"]),
        "parameters": f"{sum(p.numel() for p in opened.module.net.parameters()):,}",
        "shape of a sample": " x ".join(map(str, opened.module.shape)),
        "condition": encode and str(encode["_target_"]).rpartition(".")[2],
        "schedule": describe_node(config["schedule"]),
        "diffusion": describe_node(config["diffusion"]),
        "loss": describe_node(config["loss"]),
        "timestep sampler": describe_node(config["timestep_sampler"]),
        "sampler": describe_node(config["sampler"]),
        "autoencoder": autoencoder.get("path") or (autoencoder.get("fingerprint") and "a folder of the author"),
        **training_rows(config, opened.checkpoint, opened.averaged),
    }
    return table_rows(rows)


def training_rows(config: Mapping[str, Any], checkpoint: Path, averaged: bool) -> dict[str, Any]:
    """Return the rows about training."""
    step = step_of(checkpoint)
    return {
        "optimizer": config.get("optimizer") and describe_node(config["optimizer"]),
        "batch size": config["data"].get("batch_size"),
        "training steps": None if math.isinf(step) else f"{step:g}",
        "weights": "averaged" if averaged else "raw",
    }


def table_rows(rows: Mapping[str, Any]) -> list[list[str]]:
    return [[name, f"`{value}`"] for name, value in rows.items() if value is not None]


def describe_node(value: Any) -> str:
    """Return a value as text, and a node as its function with the arguments that are set: `cosine(num_steps=1000)`."""
    if not isinstance(value, Mapping):
        return str(value)
    items = {k: describe_node(v) for k, v in value.items() if v is not None and not str(k).startswith("_")}
    arguments = ", ".join(f"{name}={text}" for name, text in items.items() if "(" in text or len(text) <= MAX_LENGTH)
    return str(value.get("_target_", "")).rpartition(".")[2] + (f"({arguments})" if arguments else "")


def published_overrides(run: Path) -> list[str] | None:
    """Return the overrides of a run for its card, as shell words, with `...` for paths; None if they are not saved.

    Those of Hydra and of loggers, which name folders and accounts, are left out.
    """
    if not (run / ".hydra" / "overrides.yaml").is_file():
        return None
    words = []
    for override in saved_overrides(run):
        key = key_of(override)
        if key.split(".")[0].split("/")[0] not in ("hydra", "logger", "run_dir"):
            name, _, value = override.partition("=")
            words.append(f"{name}=..." if may_be_path(key, value) else shell_word(override))
    return words


def draw_card_samples(opened: OpenedRun) -> "Image":
    """Draw samples 0 to 15 of seed 0 with the run's own sampler, as `src.sample` does."""
    from src.viz.images import draw_samples

    *_, x = opened.module.to(pick_device("auto")).sample(range(NUM_SAMPLES), 0)
    shown = opened.data.display(opened.data.denormalize(x).cpu())
    return draw_samples(shown, titles=opened.data.titles(NUM_SAMPLES))
