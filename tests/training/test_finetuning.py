"""Training a part of a network: frozen weights, learning rates by name, low-rank adapters."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from src.config.words import expand_init_from
from src.models.conditioning import ClassEmbedding
from src.models.unet import UNet
from src.runs.build import build, close_run
from src.runs.open import open_run
from src.training.checkpoints import read_checkpoint
from src.training.finetuning import add_adapters, freeze, group_by_multiplier, merge_adapters
from tests.conftest import TINY, compose, train_tiny
from tests.fork_server import run_ranks

QUICK = ["validate_every=100", "callbacks.samples=null", "callbacks.bits_per_dim=null", "neighbors.num_samples=0"]
LORA = ["lora=default", "lora.rank=2", "lora.alpha=6"]


def small_net(**settings) -> nn.Module:
    torch.manual_seed(0)
    net = UNet(1, 8, model_channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,), **settings)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    return net


def weights(run: Path, key: str = "current_model_state") -> dict[str, torch.Tensor]:
    return {n.removeprefix("net."): w for n, w in read_checkpoint(run / "checkpoints" / "last.ckpt")[key].items()}


def tune(folder: Path, start: Path, *overrides: str) -> dict[str, float]:
    """Train from the raw weights of `start` with plain SGD of rate 0.1, without warm-up, decay and clipping."""
    init = expand_init_from([f"init_from={start}", "init_from.weights=raw"])
    optimizer = ["optimizer=sgd", "optimizer.lr=0.1", "optimizer.momentum=0", "lr_scheduler=constant"]
    rate = [*optimizer, "lr_scheduler.warmup_steps=0", "trainer.gradient_clip_val=0"]
    return train_tiny(folder, *init, *rate, *QUICK, *overrides)


@pytest.fixture(scope="module")
def tuned(trained, tmp_path_factory) -> Path:
    """Return the folder of one SGD step on all weights."""
    folder = tmp_path_factory.mktemp("tuned") / "all"
    tune(folder, trained, "trainer.max_steps=1")
    return folder


def test_average_starts_at_the_loaded_weights(trained, tuned):
    """After one step, the decay is (1 + 1) / (10 + 1)."""
    before, raw, average = weights(trained), weights(tuned), weights(tuned, "state_dict")
    for name, weight in before.items():
        assert_close(average[name], 2 / 11 * weight + 9 / 11 * raw[name])


def test_frozen_weights_keep_their_bits(trained, tmp_path):
    """With weight decay, by a whole run; the optimizer has a state for the trained weights only."""
    settings = ["freeze=[down.*,time.linear1.weight]", "optimizer=adamw", "optimizer.weight_decay=0.1"]
    train_tiny(tmp_path / "run", f"init_from.path={trained}", "init_from.weights=raw", *settings, *QUICK)
    before = weights(trained)
    for key in ("current_model_state", "state_dict"):
        after = weights(tmp_path / "run", key)
        same = {name for name in before if torch.equal(before[name], after[name])}
        assert same == {name for name in before if name.startswith("down.") or name == "time.linear1.weight"}
    (state,) = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["optimizer_states"]
    assert len(state["state"]) == len(before) - len(same)


def test_multiplier_scales_a_step(trained, tuned, tmp_path):
    tune(tmp_path / "run", trained, "trainer.max_steps=1", "lr_multipliers={down.*: 0.1, down.0.*: 3}")
    before, plain, scaled = weights(trained), weights(tuned), weights(tmp_path / "run")
    for name, weight in before.items():
        factor = 3 if name.startswith("down.0.") else 0.1 if name.startswith("down.") else 1
        assert_close(scaled[name] - weight, factor * (plain[name] - weight), rtol=1e-3, atol=2e-7)


def test_logged_rate_has_no_multiplier(trained, tmp_path):
    """Every group follows the schedule: linear decay over four steps."""
    settings = ["lr_multipliers={down.*: 0.5}", "lr_scheduler=linear", "lr_scheduler.decay=linear"]
    tune(tmp_path / "run", trained, "trainer.max_steps=4", *settings, "logger=csv")
    (log,) = (tmp_path / "run" / "logs").glob("version_*/metrics.csv")
    rows = [row for row in csv.DictReader(log.open()) if row.get("lr")]
    assert [float(row["lr"]) for row in rows] == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert not any(name.startswith("lr/") for name in rows[0])
    saved = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert [group["initial_lr"] for group in saved["optimizer_states"][0]["param_groups"]] == [0.1, 0.05]


def test_unusable_patterns_are_refused():
    net = small_net()
    names = dict(net.named_parameters())
    for rule, call in (
        (r"freeze: dwon\.\*.*down\.\*", lambda: freeze(net, ["dwon.*"])),
        (r"freeze=", lambda: freeze(small_net(), ["*"])),
        (r"lr_multipliers: up.*up\.\*", lambda: group_by_multiplier(names, {"up": 2})),
        (r"lr_multipliers=", lambda: group_by_multiplier(names, {"*": 2})),
        (r"lora\.targets: ", lambda: add_adapters(small_net(), 2, 2, ["norm_out"], [], 0)),
        (r"lora\.targets=", lambda: add_adapters(small_net(), 2, 2, [], [], 0)),
        (r"lora\.train: ", lambda: add_adapters(small_net(), 2, 2, ["*"], ["condition.*"], 0)),
    ):
        with pytest.raises(ValueError, match=rule) as error:
            call()
        assert "\n" not in str(error.value)


def test_missing_weights_must_be_trained(trained, tmp_path):
    for settings in (["freeze=[condition.*]"], LORA):
        cfg = compose(
            "train", *TINY, f"run_dir='{tmp_path}'", f"init_from.path={trained}", "conditioning=class", *settings
        )
        with pytest.raises(ValueError, match=r"init_from=.*condition\.table\.weight"):
            build(cfg)
    run = build(
        compose(
            "train",
            *TINY,
            f"run_dir='{tmp_path}'",
            f"init_from.path={trained}",
            "conditioning=class",
            *LORA,
            "lora.train=[condition.*]",
        )
    )
    close_run(run)
    assert run.module.net.condition.table.weight.requires_grad


def test_adapters_without_a_trained_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"lora=.*init_from="):
        build(compose("train", *TINY, f"run_dir='{tmp_path}'", *LORA))


def test_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install peft"):
        add_adapters(small_net(), 2, 2, ["*"], [], 0)


def test_new_adapters_keep_predictions():
    plain, net = small_net(), small_net()
    add_adapters(net, 2, 4, ["*"], [], 0)
    x, time = torch.randn(2, 1, 8, 8), torch.rand(2)
    assert torch.equal(net(x, time), plain(x, time))


def test_merged_network_predicts_the_same():
    """Against the adapters of peft; and a merged weight against alpha / rank times B A by hand."""
    plain, net = (
        small_net(condition=lambda dim: ClassEmbedding(dim, 3)),
        small_net(condition=lambda dim: ClassEmbedding(dim, 3)),
    )
    add_adapters(net, 2, 6, ["*"], ["condition.*"], 0)
    adapters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert all(".lora_" in name or name == "condition.table.weight" for name in adapters)
    for parameter in adapters.values():
        nn.init.normal_(parameter, std=0.1)
    state = net.state_dict()
    merged = merge_adapters(state, 6)
    before = plain.state_dict()
    plain.load_state_dict(merged)
    x, time, cond = torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([0, 3])
    assert_close(plain(x, time, cond), net(x, time, cond), rtol=1e-5, atol=1e-5)
    a, b = (state[f"down.1.conv.lora_{k}.default.weight"] for k in "AB")  # a strided convolution
    by_hand = sum(b[:, r, 0, 0][:, None, None, None] * a[r] for r in range(2))
    assert_close(merged["down.1.conv.weight"], state["down.1.conv.base_layer.weight"] + 6 / 2 * by_hand)
    assert before.keys() == merged.keys()


@pytest.fixture(scope="module")
def adapted(trained, tmp_path_factory) -> Path:
    """Return the folder of a run with adapters."""
    folder = tmp_path_factory.mktemp("adapted") / "run"
    train_tiny(folder, f"init_from.path={trained}", "init_from.weights=raw", *LORA, "trainer.max_steps=4", *QUICK[:-2])
    return folder


def test_only_adapters_are_trained(trained, adapted):
    before, after = weights(trained), weights(adapted)
    base = {name.replace(".base_layer.", "."): weight for name, weight in after.items() if ".lora_" not in name}
    assert base.keys() == before.keys() and all(torch.equal(base[name], before[name]) for name in before)
    assert all(weight.any() for name, weight in after.items() if "lora_B" in name)


def test_opened_run_has_merged_adapters(adapted, tmp_path):
    """Samples of the opened run and of its export equal those of the network with adapters."""
    from src.export import export

    cfg = compose("train", *TINY, f"run_dir='{tmp_path / 'again'}'", f"init_from.path={adapted}", *LORA)
    run = build(cfg)
    close_run(run)
    run.module.load_state_dict(read_checkpoint(adapted / "checkpoints" / "last.ckpt")["state_dict"])
    exported = export(compose("export", f"run='{adapted}'", f"run_dir='{tmp_path / 'exported'}'"))
    (*_, expected) = run.module.eval().sample(range(4), 0)
    for opened in (open_run(str(adapted)), open_run(None, str(exported))):
        (*_, x) = opened.module.sample(range(4), 0)
        assert_close(x, expected, rtol=1e-5, atol=1e-5)
    assert "lora" not in read_checkpoint(exported)["hyper_parameters"]


def test_run_with_adapters_starts_at_the_loaded_model(trained, tmp_path):
    run = build(compose("train", *TINY, f"run_dir='{tmp_path}'", f"init_from.path={trained}", *LORA))
    close_run(run)
    x, time = torch.randn(2, 1, 8, 8), torch.rand(2)
    assert torch.equal(run.module.net(x, time), open_run(str(trained)).module.net(x, time))


def test_run_starts_from_merged_adapters(adapted, tmp_path):
    run = build(compose("train", *TINY, f"run_dir='{tmp_path / 'new'}'", f"init_from.path={adapted}"))
    close_run(run)
    merged = open_run(str(adapted)).module.state_dict()
    assert all(torch.equal(weight, merged[name]) for name, weight in run.module.state_dict().items())


def test_tuned_run_resumes_with_equal_bits(trained, tmp_path):
    """Adapters with dropout, a frozen layer and multipliers; and changes that do not fit the optimizer are refused."""
    settings = [
        *LORA,
        "lora.dropout=0.3",
        "lr_multipliers={up.*: 0.5}",
        "freeze=[conv_out.*]",
        "lr_scheduler.decay=none",
    ]
    start = [f"init_from.path={trained}", *settings, *QUICK]
    for name, steps in (("whole", 4), ("parts", 2)):
        train_tiny(tmp_path / name, *start, f"trainer.max_steps={steps}")
    again = [*start, "trainer.max_steps=4", f"resume='{tmp_path / 'parts'}'"]
    shutil.copytree(tmp_path / "parts", tmp_path / "copy")
    train_tiny(tmp_path / "parts", *again)
    for key in ("current_model_state", "state_dict"):
        ours, theirs = (weights(tmp_path / name, key) for name in ("parts", "whole"))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for changed in ("freeze=null", "lr_multipliers=null", "lora.alpha=1"):
        name = changed.partition("=")[0]
        cfg = compose(
            "train", *TINY, *[o for o in again[:-1] if not o.startswith(name)], changed, f"resume='{tmp_path / 'copy'}'"
        )
        with pytest.raises(ValueError, match=rf"{name}.* resumed run"):
            build(cfg)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.faults)])
def test_two_processes_tune_like_one(trained, tmp_path, strategy):
    settings = [
        f"init_from.path={trained}",
        *LORA,
        "lr_multipliers={up.*: 0.5}",
        "freeze=[middle.*]",
        "trainer.max_steps=4",
        *QUICK,
    ]
    train_tiny(tmp_path / "alone", *settings)
    (tmp_path / "cwd").mkdir()
    words = [
        *TINY,
        *settings,
        f"trainer={strategy}",
        "trainer.accelerator=cpu",
        "trainer.precision=32-true",
        "trainer.devices=2",
    ]
    words = list({word.partition("=")[0]: word for word in words}.values())
    for done in run_ranks(2, "-m", "src.train", *words, f"hydra.run.dir={tmp_path / 'two'}", cwd=tmp_path / "cwd"):
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    ours, theirs = (weights(tmp_path / name) for name in ("two", "alone"))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert_close(weight, theirs[name], rtol=1e-4, atol=1e-5)
