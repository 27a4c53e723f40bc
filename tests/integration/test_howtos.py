"""The commands of the pages about models in and out run as they are written, on tiny models and data."""

import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

from src.config.words import expand_init_from
from src.evaluate import evaluate
from src.export import export
from src.interop import hub_models
from src.sample import sample
from src.train import train
from tests.conftest import TINY, compose, once, train_tiny
from tests.docs.test_commands import COMMAND
from tests.docs.test_links import FENCE, ROOT
from tests.interop.hub_server import running_hub
from tests.interop.test_diffusers_dit import theirs_of as diffusers_dit
from tests.interop.test_diffusers_unet import SMALL, THEIRS
from tests.interop.test_dit import Theirs
from tests.interop.test_edm2 import Precond as edm2_net
from tests.interop.test_edm2 import metadata as edm2_metadata
from tests.interop.test_openai import ADM_FLAGS
from tests.interop.test_openai import theirs as openai_net
from tests.models.test_models import randomize

diffusers = pytest.importorskip("diffusers")

RUN = {"train": train, "sample": sample, "evaluate": evaluate, "export": export}
"""The functions of the commands."""
FEWER = {
    "train": [*TINY, "trainer.max_steps=1", "validate_every=1", "data.batch_size=4"],
    "sample": ["n=2", "sampler.steps=2", "device=cpu"],
    "evaluate": ["quality=false", "num_terms=1", "num_val=2", "alignment.enabled=false", "device=cpu"],
    "export": [],
}
"""Settings that make each command fast."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the pages name, and where the test has it."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("models")
    unet = randomize(diffusers.UNet2DModel(**{**SMALL, **THEIRS["ddpm"]}))
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(folder / "pipeline")
    torch.save(openai_net().state_dict(), folder / "openai.pt")
    torch.save(Theirs().state_dict(), folder / "dit.pt")
    diffusers_dit().save_pretrained(folder / "dit" / "transformer")
    diffusers.DDIMScheduler(clip_sample=False).save_pretrained(folder / "dit" / "scheduler")
    diffusers.AutoencoderKL(latent_channels=4, block_out_channels=(4,), norm_num_groups=2).save_pretrained(
        folder / "vae"
    )
    save_file(dict(edm2_net([1, 2], True).state_dict()), folder / "edm.safetensors", edm2_metadata([1, 2], True))
    rng = np.random.default_rng(0)
    for k in range(20):
        path = folder / "images" / "ab"[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    data = f"data=folder data.root='{folder / 'images'}' data.image_size=8 data.batch_size=4"
    train_tiny(folder / "run", *data.split(), "trainer.max_steps=1")
    export(compose("export", f"run='{folder / 'run'}'", f"run_dir='{folder / 'exported'}'"))
    return {
        r"outputs/train/(\.\.\.|[-_\d]+)": str(folder / "run"),
        r"outputs/export/(\.\.\.|[-_\d]+)": str(folder / "exported"),
        r"google/ddpm-cifar10-32|path/to/pipeline": str(folder / "pipeline"),
        r"64x64_diffusion\.pt|cifar10_uncond_50M_500K\.pt": str(folder / "openai.pt"),
        r"(?<=init_from=)model\.safetensors": str(folder / "edm.safetensors"),
        r"[DS]iT-XL-2-256x256\.pt": str(folder / "dit.pt"),
        r"facebook/DiT-XL-2-256": str(folder / "dit"),
        r"stabilityai/sd-vae-ft-ema": str(folder / "vae"),
        r"(?<=[DS]iT)-XL/2": " --num-heads 2",
        r"'init_from\.flags=\"--(?!model)[^']*'": shlex.quote(f'init_from.flags="{ADM_FLAGS}"'),
        r"experiment=digits_class": f"conditioning=class {data}",
        r"experiment=digits": data,
        r"path/to/images": str(folder / "images"),
        r"data\.image_size=\d+": "data.image_size=8",
    }


def commands(page: str) -> list[tuple[str, str]]:
    """Return (command, rest of the line) of each of our commands of a page, in order."""
    blocks = FENCE.findall((ROOT / "docs" / page).read_text())
    return [match for block in blocks for match in COMMAND.findall(block.replace("\\\n", " "))]


@pytest.mark.parametrize("page", ["finetuning.md", "pretrained.md", "export.md"])
def test_commands_of_the_page_run(page, models, tmp_path, monkeypatch):
    hub_models._download.cache_clear()
    monkeypatch.chdir(tmp_path)
    with running_hub(str(tmp_path / "cache"), monkeypatch):
        for k, (name, rest) in enumerate(commands(page)):
            for pattern, value in models.items():
                rest = re.sub(pattern, lambda _, value=value: value, rest)
            words = expand_init_from([*FEWER[name], *shlex.split(rest, comments=True)])
            RUN[name](compose(name, *once(*words), f"run_dir='{tmp_path / str(k)}'"))
            assert any((tmp_path / str(k)).iterdir()), (name, rest)
