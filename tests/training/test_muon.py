"""Muon for hidden matrices with AdamW for the rest, and weight decay of matrices only."""

import functools
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, OptimStateKeyType
from torch.testing import assert_close

from src.config.search_path import CONF
from src.errors import UsageError
from src.models.autoencoder import KLAutoencoder
from src.models.conditioning import ClassEmbedding
from src.models.dit import DiT
from src.models.mlp import MLP
from src.models.unet import UNet
from src.models.unet_edm2 import UNetEDM2
from src.runs.build import build, close_run
from src.runs.components import build_module
from src.runs.nodes import instantiate_node
from src.training.autoencoder import AutoencoderLoss, AutoencoderModule
from src.training.checkpoints import read_checkpoint
from src.training.muon import MuonAdamW
from src.training.optim import skip_unless, weight_matrices
from tests.conftest import TINY, compose, train_tiny
from tests.fork_server import run_ranks

QUICK = ["validate_every=100", "callbacks.samples=null", "callbacks.bits_per_dim=null", "neighbors.num_samples=0"]
ADAMW = ("*_in.*", "*_out.*", "time.*", "noise.*", "augment.*", "condition.*")


def condition(dim: int) -> ClassEmbedding:
    return ClassEmbedding(dim, 3)


def small_dit() -> DiT:
    return DiT(1, 8, hidden_size=16, depth=1, num_heads=2, registers=2, condition=condition)


def names_by_optimizer(net: nn.Module) -> tuple[list[str], list[str]]:
    """Return the names of the parameters of Muon and of AdamW."""
    matrices = weight_matrices(net)
    if isinstance(net, KLAutoencoder):
        matrices = AutoencoderModule(net, AutoencoderLoss(), (net.channels, 8, 8)).hidden_matrices()
    names = {p: name for name, p in net.named_parameters()}
    optimizer = MuonAdamW([{"params": list(net.parameters()), "matrices": matrices}], adamw=ADAMW)
    muon = [names[p] for group in optimizer.param_groups if "momentum" in group for p in group["params"]]
    return muon, [name for name in names.values() if name not in muon]


def test_muon_gets_matrices_of_blocks():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear_in, self.hidden, self.linear_out = nn.Linear(2, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.words, self.start = nn.Embedding(5, 8), nn.Parameter(torch.zeros(3, 8))

    unet = UNet(1, 8, model_channels=8, channel_mult=(1, 2), num_res_blocks=1, condition=condition)
    for net, expected in (
        (small_dit(), r"blocks\.\d+\.(attention\.(qkv|out)|modulation|linear[12])\.weight"),
        (MLP(2), r"blocks\.\d+\.(emb|linear[12])\.weight"),
        (unet, r"(down|middle|up)\..*(conv\d?|emb|shortcut|qkv|out)\.weight"),
        (Own(), r"hidden\.weight"),
    ):
        muon, adamw = names_by_optimizer(net)
        assert muon and all(re.fullmatch(expected, name) for name in muon)
        assert not any(re.fullmatch(expected, name) for name in adamw)


def test_muon_gets_no_layer_next_to_data_or_latents():
    """Of every network in conf/: hidden widths are multiples of 8, and all others are not."""
    networks = [
        UNet(5, 8, model_channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(), augment_labels=9),
        UNetEDM2(5, 8, model_channels=8, channel_mult=(1, 2), num_res_blocks=1, num_head_channels=8),
        DiT(5, 8, hidden_size=16, depth=1, num_heads=2, activation="gelu", bottleneck=8),
        MLP(5),
        KLAutoencoder(5, 8, latent_channels=3, model_channels=8, channel_mult=(1, 2), num_res_blocks=1),
    ]
    configs = [OmegaConf.load(path) for path in (CONF / "model").glob("*.yaml")]
    targets = {config.get("model", config).get("_target_") for config in configs}
    assert targets - {None} == {f"{type(net).__module__}.{type(net).__name__}" for net in networks}
    for net in networks:
        sides = {name: p.shape[:2] for name, p in net.named_parameters()}
        muon, adamw = names_by_optimizer(net)
        assert muon and not [name for name in muon if any(side % 8 for side in sides[name])]
        kernels = [name for name in adamw if len(sides[name]) == 2 and net.get_parameter(name).ndim == 4]
        assert len(kernels) in (0, 2, 4), kernels  # convolutions next to data, and to latents


def test_patterns_that_match_no_matrix_are_refused():
    net = small_dit()
    make = functools.partial(MuonAdamW, [{"params": list(net.parameters()), "matrices": weight_matrices(net)}])
    for pattern in ("block.*", "*.qkw.weight", "blocks.0.norm1.*"):
        with pytest.raises(ValueError, match=rf"optimizer\.adamw: {re.escape(pattern)} .*\.(weight|\*)") as error:
            make(adamw=[*ADAMW, pattern])
        assert "\n" not in str(error.value)
    make(adamw=[*ADAMW, "blocks.*.qkv.weight"])


def test_steps_equal_both_optimizers_of_torch():
    """To the bit; and for kernels of convolutions, Muon on (out, in * size)."""
    kernel = nn.Conv2d(3, 4, 3, bias=False).to(memory_format=torch.channels_last).weight
    matrix, bias = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(5))
    ours = MuonAdamW(
        [{"params": [bias, kernel, matrix], "matrices": {kernel: "conv.weight", matrix: "a.weight"}}],
        *(0.1, 0.3),
        betas=(0.8, 0.9),
    )
    copies = [nn.Parameter(p.detach().clone()) for p in (kernel.flatten(1), matrix, bias)]
    muon = torch.optim.Muon(copies[:2], 0.1, 0.3, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(copies[2:], 0.1, (0.8, 0.9), weight_decay=0.3)
    for _ in range(3):
        for p, copy in zip((kernel, matrix, bias), copies, strict=True):
            p.grad = torch.randn(p.shape).contiguous(
                memory_format=torch.channels_last if p is kernel else torch.contiguous_format
            )
            copy.grad = p.grad.flatten(1) if p is kernel else p.grad.clone()
        for optimizer in (ours, muon, adamw):
            optimizer.step()
        for p, copy in zip((kernel, matrix, bias), copies, strict=True):
            assert torch.equal(p, copy.view_as(p))


def test_update_is_the_nearest_orthogonal_matrix():
    """Newton-Schulz has singular values of about 0.7 to 1.2; the scale is that of arXiv 2502.16982, eq. 4."""
    weight = nn.Parameter(torch.zeros(12, 5))
    weight.grad = torch.randn(12, 5)
    u, _, vt = torch.linalg.svd(weight.grad, full_matrices=False)
    MuonAdamW([{"params": [weight], "matrices": {weight: "a.weight"}}], lr=1.0).step()
    update = -weight.detach() / (0.2 * 12**0.5)
    assert_close(u.T @ update @ vt.T, torch.eye(5), rtol=0, atol=0.35)


def decays(module) -> dict[str, float]:
    """Return by how much a step with zero gradients shrinks each parameter, relative to its value."""
    optimizer, _ = module.prepare_optimizer(1)
    before = {}
    for name, p in module.net.named_parameters():
        nn.init.ones_(p)
        before[name], p.grad = p.detach().clone(), torch.zeros_like(p)
    optimizer.step()
    return {name: (before[name] - p).max().item() for name, p in module.net.named_parameters()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_spares_biases_norms_and_embeddings(optimizer):
    """With rates by name; U-Nets decay all weights unless told otherwise."""
    common = (f"optimizer={optimizer}", "optimizer.lr=0.5", "optimizer.weight_decay=0.25", "conditioning=class",
              "conditioning.embed.num_classes=3", "lr_scheduler=constant", "lr_scheduler.warmup_steps=0",
              "run_dir=runs/x", "lr_multipliers={time.*: 0.5}")  # fmt: skip
    dit = ("model=dit_tiny", "model.hidden_size=16", "model.depth=1", "model.num_heads=2", "model.registers=2")
    unet = ("model.model_channels=8", "model.num_res_blocks=1", "model.num_head_channels=8")
    for model, spared in ((dit, True), (unet, False)):
        cfg = compose("train", *common, *model)
        cfg.conditioning.encode.names = ["a", "b", "c"]
        for name, decay in decays(build_module(cfg, (1, 8, 8), 17, instantiate_node(cfg.conditioning.encode))).items():
            is_matrix = name.endswith("weight") and "norm" not in name and "table" not in name
            rate = 0.25 if name.startswith("time.") else 0.5
            assert decay == pytest.approx(rate * 0.25 if is_matrix or not spared else 0, abs=1e-6), name


def test_skipped_step_changes_nothing():
    net = small_dit()
    optimizer = MuonAdamW(
        [{"params": list(net.parameters()), "matrices": weight_matrices(net)}], adamw=ADAMW, fused=True
    )
    for number in range(2):
        for p in net.parameters():
            p.grad = torch.full_like(p, 1.0 if number == 0 else torch.nan)
        before = [p.detach().clone() for p in net.parameters()]
        state = [v.clone() for values in optimizer.state.values() for v in values.values()]
        skip_unless(torch.tensor(number == 0), optimizer)
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)) == (number == 1)
    after = [v for values in optimizer.state.values() for v in values.values()]
    assert all(torch.equal(a, b) for a, b in zip(state, after, strict=True))


def test_values_out_of_range_are_refused(tmp_path):
    for setting in ("optimizer.momentum=1", "optimizer.ns_steps=0", "optimizer.adjust_lr_fn=none", "optimizer.lr=0",
                    "optimizer.adamw=['*']"):  # fmt: skip
        cfg = compose("train", *TINY, "optimizer=muon", setting, f"run_dir='{tmp_path}'")
        with pytest.raises((UsageError, ValueError), match=setting.partition("=")[0]) as error:
            build(cfg)
        assert "\n" not in str(error.value)
    weight = nn.Parameter(torch.zeros(2, 2))
    make = functools.partial(MuonAdamW, [{"params": [weight], "matrices": {weight: "weight"}}])
    for setting in ({"momentum": 2}, {"ns_steps": 0}):
        with pytest.raises(ValueError, match=rf"optimizer\.{next(iter(setting))}="):
            make(**setting)


MUON = ["optimizer=muon", "decay_matrices_only=true", "lr_multipliers={up.*: 0.5}", "freeze=[middle.*]"]


def test_muon_resumes_with_equal_bits(tmp_path):
    """And refuses changes that do not fit the state of the optimizer."""
    settings = [*MUON, "lr_scheduler.decay=none", *QUICK]
    for name, steps in (("whole", 4), ("parts", 2)):
        train_tiny(tmp_path / name, *settings, f"trainer.max_steps={steps}")
    shutil.copytree(tmp_path / "parts", tmp_path / "copy")
    train_tiny(tmp_path / "parts", *settings, "trainer.max_steps=4", f"resume='{tmp_path / 'parts'}'")
    ours, theirs = (read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("parts", "whole"))
    for key in ("current_model_state", "state_dict"):
        assert all(torch.equal(ours[key][name], theirs[key][name]) for name in ours[key])
    for changed in ("decay_matrices_only=null", "optimizer=sgd", "optimizer=adamw", "optimizer.adamw=[time.*]"):
        words = [word for word in settings if not word.startswith(changed.partition("=")[0] + "=")]
        cfg = compose("train", *TINY, *words, changed, "trainer.max_steps=4", f"resume='{tmp_path / 'copy'}'")
        with pytest.raises(ValueError, match=changed.partition("=")[0]) as error:
            close_run(build(cfg))
        assert "\n" not in str(error.value)


def test_saved_state_is_in_the_order_of_the_module():
    """In which a sharded run reads it; the optimizer has other orders, by its groups."""
    cfg = compose("train", *TINY, *MUON, "run_dir=runs/x")
    module = build_module(cfg, (1, 8, 8), 17)
    optimizer, _ = module.prepare_optimizer(1)
    for p in module.weights:
        p.grad = torch.randn_like(p)
    optimizer.step()
    checkpoint = {"optimizer_states": [optimizer.state_dict()]}
    module._trainer = SimpleNamespace(optimizers=[optimizer])
    module.on_save_checkpoint(checkpoint)
    (saved,) = checkpoint["optimizer_states"]
    named = FullyShardedDataParallel.rekey_optim_state_dict(saved, OptimStateKeyType.PARAM_NAME, module)["state"]
    parameters = dict(module.named_parameters())
    fresh, _ = module.prepare_optimizer(1)
    fresh.load_state_dict(saved)
    assert len(named) == len(module.weights) < len(parameters)
    for name, values in named.items():
        for key, value in values.items():
            assert torch.equal(value, optimizer.state[parameters[name]][key])
            assert torch.equal(value, fresh.state[parameters[name]][key])


SHARDED = """
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from src.training.muon import MuonAdamW

distributed.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
for shape in ((12, 5), (5, 12), (7, 4, 3, 3)):
    weight, gradients = torch.randn(shape), torch.randn(3, *shape)
    states = []
    for place in (lambda x: x.clone(), lambda x: distribute_tensor(x, mesh, [Shard(0)])):
        p = nn.Parameter(place(weight))
        optimizer = MuonAdamW([{"params": [p], "matrices": {p: "weight"}}], lr=0.1)
        for gradient in gradients:
            p.grad = place(gradient)
            optimizer.step()
        states.append((p.detach(), optimizer.state[p]["momentum_buffer"]))
    for whole, sharded in zip(*states):
        assert sharded.to_local().shape[0] < shape[0]
        assert torch.equal(whole, sharded.full_tensor())
"""


def test_sharded_matrices_take_the_same_steps(tmp_path):
    for done in run_ranks(2, "-c", SHARDED, cwd=tmp_path):
        assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("muon") / "alone"
    train_tiny(folder, *MUON, "trainer.max_steps=4", *QUICK)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.faults)])
def test_two_processes_take_the_steps_of_one(alone, tmp_path, strategy):
    words = [*TINY, *MUON, "trainer.max_steps=4", *QUICK, f"trainer={strategy}", "trainer.accelerator=cpu",
             "trainer.precision=32-true", "trainer.devices=2"]  # fmt: skip
    words = list({word.partition("=")[0]: word for word in words}.values())
    (tmp_path / "cwd").mkdir()
    for done in run_ranks(2, "-m", "src.train", *words, f"hydra.run.dir={tmp_path / 'two'}", cwd=tmp_path / "cwd"):
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    ours, theirs = (
        read_checkpoint(folder / "checkpoints" / "last.ckpt")["current_model_state"]
        for folder in (tmp_path / "two", alone)
    )
    for name, weight in ours.items():
        assert_close(weight, theirs[name], rtol=1e-4, atol=1e-5)
