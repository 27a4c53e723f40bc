"""Models of other projects, from their files to samples, bounds and new runs."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from src.config.words import expand_init_from
from src.export import export
from src.models.unet_edm2 import UNetEDM2
from src.runs.build import build, close_run
from src.runs.components import build_sampler
from src.runs.imported import read_model
from src.runs.open import OpenedRun, open_run
from src.runs.resolve import resolve
from src.train import train
from src.training.checkpoints import exportable_settings, read_checkpoint, write_exported
from tests.conftest import compose
from tests.interop.test_diffusers_dit import theirs_of as diffusers_dit
from tests.interop.test_diffusers_unet import SMALL, THEIRS
from tests.interop.test_dit import FLAGS, Theirs
from tests.interop.test_edm import metadata as edm_metadata
from tests.interop.test_edm import theirs as edm_net
from tests.interop.test_edm2 import Precond as edm2_net
from tests.interop.test_edm2 import metadata as edm2_metadata
from tests.interop.test_openai import ADM_FLAGS
from tests.interop.test_openai import theirs as openai_net
from tests.models.test_models import randomize

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pipeline with random weights."""
    folder = tmp_path_factory.mktemp("diffusers") / "ddpm"
    unet = randomize(diffusers.UNet2DModel(**{**SMALL, **THEIRS["ddpm"]}))
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"
    )
    diffusers.DDIMPipeline(unet, scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for k in range(20):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{k}.png")
    return folder


def opened(folder: Path) -> OpenedRun:
    return open_run(None, init_from=OmegaConf.create({"path": str(folder), "flags": None}))


@torch.no_grad()
def test_imported_pipeline_draws_the_samples_of_diffusers(pipeline):
    """By DDIM in 10 steps from the same noise."""
    run = opened(pipeline)
    node = {
        "_target_": "src.diffusion.samplers.ddim",
        "_partial_": True,
        "eta": 0.0,
        "steps": 10,
        "spacing": "trailing",
    }
    sampler = build_sampler(OmegaConf.create(node))
    *_, ours = run.module.sample(range(3), 0, sampler)
    x = next(iter(run.module.sample(range(3), 0, sampler)))  # before the first step
    theirs = diffusers.DDIMPipeline.from_pretrained(pipeline)
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config, timestep_spacing="trailing")
    theirs.scheduler.set_timesteps(10)
    for t in theirs.scheduler.timesteps:
        x = theirs.scheduler.step(theirs.unet(x, t).sample, t, x, use_clipped_model_output=True).prev_sample
    assert_close(ours, x, rtol=1e-4, atol=1e-4)


def test_new_run_takes_network_and_process_of_a_pipeline(pipeline, images, tmp_path):
    settings = ["data=folder", f"data.root='{images}'", "data.image_size=16", "callbacks=none", "logger=none"]
    cfg = compose("train", *settings, f"run_dir='{tmp_path / 'run'}'", *expand_init_from([f"init_from={pipeline}"]))
    run = build(cfg)
    close_run(run)
    theirs = opened(pipeline).module
    own = run.module.state_dict()
    assert all(torch.equal(own[name], value) for name, value in theirs.state_dict().items())
    assert run.config.diffusion.prediction == "v" and run.config.schedule.num_steps == 100
    assert run.config.model.attention_resolutions == [8]  # the same stage at twice the size
    assert run.module.shape == (3, 16, 16)


def test_typed_settings_win_over_those_of_a_pipeline(pipeline, images, tmp_path, monkeypatch):
    """The other arguments of a group are those of the pipeline."""
    typed = {"schedule.num_steps": 50, "sampler.steps": 7, "zero_terminal_snr": True, "diffusion.clip_x0": 2.0}
    monkeypatch.setattr("src.runs.resolve.is_typed", typed.__contains__)
    words = [f"{name}={value}" for name, value in typed.items()]
    settings = ["data=folder", f"data.root='{images}'", "callbacks=none", "logger=none", f"run_dir='{tmp_path}'"]
    cfg = compose("train", *settings, *words, *expand_init_from([f"init_from={pipeline}"]))
    resolved = resolve(cfg, None, None)
    assert {name: OmegaConf.select(resolved, name) for name in typed} == typed
    assert resolved.schedule._target_.endswith(".cosine") and resolved.sampler._target_.endswith(".ddim")
    assert resolved.diffusion.prediction == "v"


def test_new_run_takes_a_network_of_another_class(images, tmp_path):
    torch.manual_seed(0)
    save_file(dict(edm2_net([1, 2], False).state_dict()), tmp_path / "edm2.safetensors", edm2_metadata([1, 2], False))
    settings = ["data=folder", f"data.root='{images}'", "data.image_size=8", "callbacks=none", "logger=none"]
    settings += [f"init_from.path='{tmp_path / 'edm2.safetensors'}'", f"run_dir='{tmp_path / 'run'}'"]
    run = build(compose("train", *settings))
    close_run(run)
    assert type(run.module.net) is UNetEDM2 and "initialized anew" not in run.initial
    loss = run.module.training_step({"x": torch.zeros(4, 3, 8, 8), "start": 0, "total": 4}, 0)["loss"]
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in run.module.net.parameters())


def test_resumed_run_keeps_the_imported_network(pipeline, images, tmp_path):
    """Also when the pipeline is gone."""
    source = tmp_path / "source"
    shutil.copytree(pipeline, source)
    settings = ["data=folder", f"data.root='{images}'", "data.image_size=8", "callbacks=none", "logger=none"]
    settings += [
        "data.batch_size=4",
        "neighbors.num_samples=0",
        f"init_from.path='{source}'",
        f"run_dir='{tmp_path / 'run'}'",
    ]
    train(compose("train", *settings, "trainer.max_steps=1"))
    shutil.rmtree(source)
    train(compose("train", *settings, "trainer.max_steps=2", f"resume='{tmp_path / 'run'}'"))
    saved = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert saved["global_step"] == 2
    assert saved["hyper_parameters"]["model"]["time_offset"] == -1
    assert saved["hyper_parameters"]["schedule"]["num_steps"] == 100


def test_converted_model_has_equal_weights_and_settings(pipeline, tmp_path):
    run = opened(pipeline)
    settings, _ = exportable_settings(OmegaConf.to_container(run.config))
    write_exported(tmp_path / "model.safetensors", run.module.state_dict(), True, settings)
    again = open_run(None, str(tmp_path / "model.safetensors"))
    ours, theirs = run.module.state_dict(), again.module.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(run.module.schedule.rows.alpha, again.module.schedule.rows.alpha)


def test_classes_of_a_pipeline_are_conditions(tmp_path):
    unet = randomize(diffusers.UNet2DModel(**{**SMALL, **THEIRS["adm"]}))
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(variance_type="learned_range")).save_pretrained(tmp_path)
    run = opened(tmp_path)
    assert run.data.condition is not None
    assert list(run.data.condition.examples) == ["0", "1", "2", "3"]
    assert run.module.diffusion.variance == "learned_range"
    assert torch.equal(run.module.net.condition.table.weight[:4], unet.class_embedding.weight)


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        ("unet/config.json", '{"_class_name": "UNet2DConditionModel"}', "UNet2DConditionModel"),
        ("unet/config.json", "[]", "config.json"),
        ("unet/config.json", "{", "config.json"),
        ("scheduler/scheduler_config.json", '{"beta_schedule": "new"}', "beta_schedule"),
        ("scheduler/scheduler_config.json", '{"prediction_type": "new"}', "prediction_type"),
        ("scheduler/scheduler_config.json", '{"_class_name": "CMStochasticIterativeScheduler"}', "CMStochastic"),
    ],
)
def test_unknown_parts_are_refused_by_name(pipeline, tmp_path, file, text, named):
    for each in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        (tmp_path / each).parent.mkdir(exist_ok=True)
        (tmp_path / each).write_text(text if each == file else (pipeline / each).read_text())
    with pytest.raises(ValueError, match=named) as error:
        opened(tmp_path)
    assert "\n" not in str(error.value)


def test_incomplete_and_damaged_weights_are_refused(pipeline, tmp_path):
    shutil.copytree(pipeline, tmp_path / "pipeline")
    file = tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for name in ("conv_in.bias", "time_embedding.linear_1.weight", "mid_block.attentions.0.to_k.weight"):
        save_file({other: value for other, value in weights.items() if other != name}, file)
        with pytest.raises(ValueError, match=r"init_from.*(conv_in|linear_1|to_q)"):
            opened(tmp_path / "pipeline")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="safetensors"):
        opened(tmp_path / "pipeline")


def test_round_trips_through_diffusers_keep_bits(trained, tmp_path):
    """Of a run, with the settings; of OpenAI's weights, whose steps count from 0; and of transformers."""
    torch.save(openai_net().state_dict(), tmp_path / "model.pt")
    diffusers_dit().save_pretrained(tmp_path / "dit")
    paper = "gelu,norm=layer,qk_norm=false,positions=sincos,freq_shift=1,hidden_size=32,num_heads=2"
    options = [f"model.{option}" for option in f"activation={paper}".split(",")]
    run = build(compose("train", "model=dit_tiny", *options, f"run_dir='{tmp_path / 'new'}'", "logger=none"))
    close_run(run)
    settings, _ = exportable_settings(OmegaConf.to_container(run.config, resolve=True))
    randomize(run.module.net)
    write_exported(tmp_path / "model.safetensors", run.module.state_dict(), False, settings)
    sources: dict[str, tuple[str | None, str | None, DictConfig | None]] = {
        "run": (str(trained), None, None),
        "openai": (None, None, OmegaConf.create({"path": str(tmp_path / "model.pt"), "flags": ADM_FLAGS})),
        "transformer": (None, None, OmegaConf.create({"path": str(tmp_path / "dit"), "flags": None})),
        "our transformer": (None, str(tmp_path / "model.safetensors"), None),
    }
    for name, (path, ckpt, init_from) in sources.items():
        node = init_from or OmegaConf.create({"path": None, "flags": None})
        source = [f"run='{path}'"] if path else [f"ckpt='{ckpt}'"] if ckpt else []
        cfg = compose("export", *source, "format=diffusers", "sampler=ddim", f"run_dir='{tmp_path / name}'")
        cfg.init_from = node
        folder = export(cfg)
        before, after = open_run(path, ckpt, init_from=init_from), open_run(str(folder))
        ours, theirs = before.module.state_dict(), after.module.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert after.config.model == before.config.model and after.config.schedule == before.config.schedule


def test_pipeline_that_was_trained_further_is_read(trained, tmp_path):
    """Its time embedding is no longer that of the run."""
    folder = export(compose("export", f"run='{trained}'", "format=diffusers", f"run_dir='{tmp_path / 'out'}'"))
    unet = diffusers.UNet2DModel.from_pretrained(folder / "unet")
    with torch.no_grad():
        unet.time_embedding.linear_1.weight.mul_(1.5)
    unet.save_pretrained(folder / "unet")
    net = open_run(str(folder)).module.net
    x, t = torch.randn(2, unet.config.in_channels, *[unet.config.sample_size] * 2), torch.tensor([3, 700])
    with torch.no_grad():
        assert_close(net(x, (t + 1) / 1000), unet(x, t).sample, rtol=1e-4, atol=1e-4)


def test_files_of_other_projects_open_as_runs(tmp_path):
    """Their networks are compared in tests/interop."""
    torch.save({"ema": Theirs().state_dict()}, tmp_path / "dit.pt")
    save_file(dict(Theirs().state_dict()), tmp_path / "sit.safetensors")
    torch.save(openai_net().state_dict(), tmp_path / "model.pt")
    net = edm_net(True, [1, 2], True)
    save_file(dict(net.state_dict()), tmp_path / "model.safetensors", edm_metadata(True, [1, 2], True))
    save_file(dict(edm2_net([1, 2], True).state_dict()), tmp_path / "edm2.safetensors", edm2_metadata([1, 2], True))
    for name, flags, prediction in (
        ("model.pt", ADM_FLAGS, "eps"),
        ("model.safetensors", None, "edm"),
        ("edm2.safetensors", None, "edm"),
        ("dit.pt", FLAGS, "eps"),
        ("sit.safetensors", FLAGS.replace("DiT", "SiT"), "velocity"),
    ):
        run = open_run(None, init_from=OmegaConf.create({"path": str(tmp_path / name), "flags": flags}))
        assert run.module.diffusion.prediction == prediction
        *_, x = run.module.sample(range(2), 0, run.module.sampler._replace(steps=2), cond=run.data.condition([0, 1]))
        assert x.shape == (2, *run.data.shape) and x.isfinite().all()


def test_autoencoder_decodes_samples_of_an_imported_transformer(tmp_path):
    save_file(dict(Theirs().state_dict()), tmp_path / "dit.safetensors")
    autoencoder = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, scaling_factor=0.5, layers_per_block=1,
    ).eval()  # fmt: skip
    autoencoder.save_pretrained(tmp_path / "vae")
    init_from = OmegaConf.create({"path": str(tmp_path / "dit.safetensors"), "flags": FLAGS})
    run = open_run(None, init_from=init_from, autoencoder=str(tmp_path / "vae"))
    assert run.module.shape == (4, 8, 8)
    latents = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        expected = autoencoder.decode(latents / 0.5).sample
    assert_close(run.data.decode(latents), expected, rtol=1e-4, atol=1e-4)
    diffusers_dit(in_channels=3).save_pretrained(tmp_path / "pixels")
    init_from.update({"path": str(tmp_path / "pixels"), "flags": None})
    with pytest.raises(ValueError, match=r"autoencoder=.*4 channels.*3 of pixels"):
        open_run(None, init_from=init_from, autoencoder=str(tmp_path / "vae"))


def test_files_that_need_or_exclude_flags_say_so(tmp_path):
    torch.save(openai_net().state_dict(), tmp_path / "model.pt")
    (tmp_path / "model.pkl").write_bytes(b"anything")
    save_file(dict(Theirs().state_dict()), tmp_path / "dit.safetensors")
    for name, flags, named in (
        ("model.pt", None, "--image_size"),
        ("model.pkl", None, "safetensors"),
        ("model.pkl", "--image_size 64", "flags"),
        ("dit.safetensors", None, "--model DiT-XL/2"),
    ):
        with pytest.raises(ValueError, match=named) as error:
            read_model(tmp_path / name, flags)
        assert "\n" not in str(error.value)
