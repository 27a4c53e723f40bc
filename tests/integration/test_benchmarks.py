"""The benchmarks: counts, timing, sampling and tables."""

from __future__ import annotations

import re
from argparse import ArgumentParser
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.testing import assert_close

from benchmarks.peers import PEERS, Contender, Work, as_large_as, diffusers_net, flops
from src.diffusion import schedules
from src.models.winograd import Conv3x3
from src.runs.build import build, close_run
from src.runs.open import open_run
from src.training.checkpoints import read_checkpoint


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, so that collecting the tests stays fast."""
    global training_utils, EMAModel, everything, kernels, many, quality, sampling, training, glyphs, FixedSamples, table
    global shares, compose_train
    from diffusers import training_utils
    from diffusers.training_utils import EMAModel

    from benchmarks import __main__ as everything
    from benchmarks import kernels, many, quality, sampling, training
    from benchmarks.glyphs import glyphs
    from benchmarks.quality import FixedSamples, table
    from benchmarks.shares import shares
    from benchmarks.training import compose_train


def test_flops_count_direct_convolutions() -> None:
    layer, x = Conv3x3(64, 128), torch.randn(4, 64, 16, 16, requires_grad=True)
    assert layer.winograd_pays(x)
    assert flops(lambda: layer(x).sum().backward()) == 3 * 2 * 9 * 64 * 128 * 4 * 16 * 16  # forward, and two backward


def test_peer_batches_lie_between_minus_one_and_one() -> None:
    images = torch.tensor([0, 16]).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    work = Work(images, 64, 32, (1, 2), 1, (True, False), 16, torch.device("cpu"), num_values=17)
    assert work.batch().unique().tolist() == [-1, 1]


def test_peers_have_attention_at_our_stages() -> None:
    cfg = compose_train(["model=unet_patched", "data=mnist"], Path("unused"))
    work = as_large_as(cfg.model, cfg.data, torch.zeros(0, 1, 28, 28), torch.device("cpu"))
    assert list(cfg.model.attention_resolutions) == [8, 4]  # the stages are 14, 7 and 4 patches wide
    assert work.attention == (False, True, True)


def test_transformer_of_diffusers_is_as_large_as_ours() -> None:
    paper = ["model.activation=gelu", "model.norm=layer", "model.qk_norm=false", "model.positions=sincos"]
    cfg = compose_train(["model=dit_tiny", "data=cifar10", "model.channels=3", *paper], Path("unused"))
    work = as_large_as(cfg.model, cfg.data, torch.zeros(0, 3, 32, 32), torch.device("cpu"))
    net, ours = diffusers_net(work, 0), instantiate(cfg.model, outputs=1, condition=None)
    # Without the copies of the embeddings in the blocks, and the table of classes.
    theirs = [p for name, p in net.named_parameters() if ".emb." not in name or "blocks.0.norm1.emb.timestep" in name]
    assert sum(p.numel() for p in theirs) == sum(p.numel() for p in ours.parameters())
    assert net(torch.zeros(2, 3, 32, 32), torch.tensor(3)).sample.shape == (2, 3, 32, 32)


def test_diffusers_samples_with_ema_and_keeps_its_weights(monkeypatch: Any) -> None:
    work = Work(torch.zeros(8, 1, 8, 8), 4, 32, (1, 2), 1, (True, False), 16, torch.device("cpu"), num_values=17)
    averages: list[Any] = []
    monkeypatch.setattr(training_utils, "EMAModel", lambda *a, **k: averages.append(EMAModel(*a, **k)) or averages[0])
    contender = PEERS["diffusers"](work)
    contender.step()
    contender.step()

    def drawn() -> torch.Tensor:
        torch.manual_seed(0)
        assert contender.sample is not None
        return contender.sample(3, 5)

    (average,) = averages
    for p in average.shadow_params:
        p.normal_(std=0.1)
    before = {name: value.clone() for name, value in contender.net.state_dict().items()}
    images = drawn()
    assert images.shape == (3, 1, 8, 8)
    assert all(torch.equal(value, before[name]) for name, value in contender.net.state_dict().items())
    average.copy_to(contender.net.parameters())
    assert torch.equal(drawn(), images)
    average.shadow_params = [torch.zeros_like(p) for p in average.shadow_params]
    assert not torch.equal(drawn(), images)


@pytest.mark.parametrize("gpu", [False, True])
def test_sections_pass_valid_arguments(gpu: bool, tmp_path: Path, monkeypatch: Any) -> None:
    class Parsed(Exception):
        pass

    parse = ArgumentParser.parse_args

    def stop_then(parser: ArgumentParser) -> None:
        parse(parser)
        raise Parsed

    monkeypatch.setattr(ArgumentParser, "parse_args", stop_then)
    for module, *arguments in everything.sections(gpu, tmp_path).values():
        monkeypatch.setattr("sys.argv", [module, *arguments])
        with pytest.raises(Parsed):
            import_module(module).main()


def test_rerun_repeats_only_failed_sections(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks", "--folder", str(tmp_path)])
    for second, status in (["json.tool", "nowhere"], 1), (["calendar", "2024"], 0):
        monkeypatch.setattr(everything, "sections", lambda *_, second=second: {"One": ["platform"], "Two": second})
        with pytest.raises(SystemExit) as ended:
            everything.main()
        assert ended.value.code == status
        text = (tmp_path / "table.md").read_text()
        assert ("FAILED" in text) == bool(status)
        assert text.count("## One\n") == text.count("## Two\n") == 1
    assert capsys.readouterr().out.count("One: already in") == 1
    assert "February" in text


@pytest.fixture
def tiny_loops(tmp_path: Path) -> tuple[training.BareLoop, Any]:
    """Return the bare loop and the module that it is compared with."""
    cfg = training.compose("unet_tiny", 1, "32-true", tmp_path / "run", ["data.batch_size=8"])
    run = build(cfg)
    close_run(run)
    run.module.trainer = run.trainer
    images = torch.randint(17, (16, 1, 8, 8), dtype=torch.uint8)
    return training.BareLoop(cfg, images, schedules.cosine(1000), torch.device("cpu")), run.module


def test_compared_loops_compute_the_same_loss(tiny_loops: Any) -> None:
    loop, module = tiny_loops
    training.check_same_loss(loop, module)
    loop.gamma = 4
    with pytest.raises(AssertionError):
        training.check_same_loss(loop, module)


def test_training_table_has_a_row_per_loop(monkeypatch: Any, capsys: Any) -> None:
    settings = "training --model unet_tiny --batch 4 --rounds 2 --steps 2 --warmup 1"
    monkeypatch.setattr("sys.argv", [*settings.split(), "--peers", "diffusers", "diffusers, tuned by hand"])
    training.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [row[0] for row in rows[2:]] == ["src.train", "bare loop", "diffusers", "diffusers, tuned by hand"]
    assert {row[1] for row in rows[2:]} == {"float32"}
    assert rows[2][2:4] == rows[3][2:4]  # the same network


def test_training_table_medians_ratios_and_peak_shares() -> None:
    cfg = OmegaConf.create({"trainer": {"precision": "32-true"}, "compile": None})
    turns = training.AlternateLoops(cfg, ["diffusers"], warmup=0, steps=2)
    turns.loops = dict.fromkeys([training.BARE, "diffusers"], Contender(torch.nn.Identity(), lambda: None))
    turns.flops = {training.BARE: 6_000_000_000, "diffusers": 3_000_000_000}
    turns.sizes = {training.BARE: 1_000_000, "diffusers": 2_500_000}
    turns.peaks = {"matmul": [8e9, 12e9, 10e9]}
    seconds = {training.OURS: [1, 2, 4], training.BARE: [1, 1, 4], "diffusers": [3, 5, 6]}
    turns.clocks = {name: [training.Clock(wall, 2 * wall) for wall in each] for name, each in seconds.items()}
    lines = training.table(turns).splitlines()[2:5]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    ours, bare, other = rows
    # Two steps of 6 GFLOP in a median of 2 s; the median peak is 10 GFLOP/s.
    assert ours == ["src.train", "float32", "1.00", "6.0", "1000.0", "1.000 (1.000 to 1.000)", "1.000", "60%"]
    assert bare == ["bare loop", "float32", "1.00", "6.0", "500.0", "1.000 (0.500 to 1.000)", "1.000", "120%"]
    assert other == ["diffusers", "float32", "2.50", "3.0", "2500.0", "2.500 (1.500 to 3.000)", "2.500", "12%"]


class Processor:
    """A CPU clock on which each optimizer step takes `cost` seconds and nothing else takes time."""

    def __init__(self) -> None:
        self.cost, self.time = 1 / 16, 0.0

    def step(self, *_: Any) -> None:
        self.time += self.cost


@pytest.fixture
def processor(monkeypatch: Any) -> Iterator[Processor]:
    clock = Processor()
    monkeypatch.setattr("time.process_time", lambda: clock.time)
    hook = register_optimizer_step_post_hook(clock.step)
    yield clock
    hook.remove()


def test_our_budget_is_cpu_time(processor: Processor, tmp_path: Path) -> None:
    """95% of 5 s at 1/16 s per step are 76 steps; if steps take 1.5 times as long, training stops after 5 s."""
    tiny = [
        "model.model_channels=8",
        "model.num_res_blocks=1",
        "model.num_head_channels=8",
        "callbacks.bits_per_dim.num_samples=2",
    ]
    recipe = [*tiny, "data.batch_size=8", "callbacks.samples.num_samples=1", "sampler.steps=1"]
    where, spent, steps = quality.train_ours(recipe, 0, 5.0, tmp_path / "planned")
    assert (steps, spent) == (76, 76 / 16)
    assert read_checkpoint(open_run(str(where)).checkpoint)["global_step"] == steps

    build = quality.build
    with pytest.MonkeyPatch.context() as patch:

        def slower(cfg: Any) -> Any:
            processor.cost = 3 / 32 if cfg.trainer.max_steps == 76 else 1 / 16
            return build(cfg)

        patch.setattr(quality, "build", slower)
        where, spent, steps = quality.train_ours(recipe, 0, 5.0, tmp_path / "slower")
    assert (steps, spent) == (54, 54 * 3 / 32)  # the first count above 5 s
    assert read_checkpoint(open_run(str(where)).checkpoint)["global_step"] == steps


def test_peer_budget_is_cpu_time(processor: Processor, tmp_path: Path) -> None:
    cfg = compose_train(["data.batch_size=8"], tmp_path / "unused")
    images = torch.randint(17, (64, 1, 8, 8)).byte()
    contender, spent, steps = quality.train_peer("diffusers", cfg, images, 2.0)
    assert (steps, spent) == (32, 2.0)
    assert contender.sample is not None
    assert contender.sample(2, 3).shape == (2, 1, 8, 8)


class Constant(torch.nn.Module):
    """A network that returns x_0 and records its time arguments."""

    def __init__(self, x0: torch.Tensor) -> None:
        super().__init__()
        self.x0 = x0
        self.times: list[float] = []

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        self.times.append(time[0].item())
        return self.x0.expand_as(x)


def test_peer_samplers_call_network_at_its_times() -> None:
    x0 = torch.linspace(-0.9, 0.9, 64).view(1, 8, 8)
    net = Constant(x0)
    timed = sampling.TimedNet(net, 1000)
    table = schedules.cosine(1000)
    times = torch.tensor([1 / 1000, 0.5, 1.0])
    for time in times:
        sampling.ContinuousTimeNet(timed)(torch.zeros(2, 1, 8, 8), time.expand(2))
    assert net.times == pytest.approx(times.tolist())
    cases = {
        "DDPM": sampling.diffusers(timed, table, (1, 8, 8), "DDPMScheduler", 10),
        "DDIM": sampling.diffusers(timed, table, (1, 8, 8), "DDIMScheduler", 10),
        "DPM-Solver": sampling.diffusers(timed, table, (1, 8, 8), "DPMSolverMultistepScheduler", 10),
    }
    if find_spec("denoising_diffusion_pytorch"):
        cases["lucidrains"] = sampling.lucidrains(timed, 8, 10)
    for name, case in cases.items():
        net.times.clear()
        images = case.sample(range(2))
        assert_close(images, x0.expand(2, 1, 8, 8), rtol=0, atol=0.02, msg=name)
        assert len(net.times) == case.calls == 10
        assert net.times == sorted(net.times, reverse=True)
        assert 1 / 1000 <= net.times[-1] < net.times[0] <= 1


def test_gpu_benchmarks_run_on_cpu(monkeypatch: Any, capsys: Any) -> None:
    """The kernels' times add up to their total and include convolutions."""
    few = "--model unet_small --device cpu"
    monkeypatch.setattr("sys.argv", f"many {few} --batch 2 --batches 1 --steps 2 --modes 32-true".split())
    many.main()
    rows = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()[-2:]]
    assert [row[1:4] for row in rows] == [["32-true", "dpmpp_2m", "2"], ["32-true", "dpmpp_2m_sde", "2"]]
    began = perf_counter()
    settings = f"{few} --batch 2 --compile null --precision 32-true --steps 1 --rows 1000"
    monkeypatch.setattr("sys.argv", f"kernels {settings}".split())
    kernels.main()
    elapsed = 1000 * (perf_counter() - began)
    summary, *lines = [line for line in capsys.readouterr().out.splitlines() if line]
    rows = [line.split("|") for line in lines[2:]]
    assert any("conv" in row[4] for row in rows)
    assert sum(float(row[2].strip(" %")) for row in rows) == pytest.approx(100, abs=0.05 * len(rows))
    step, total = (float(each) for each in re.findall(r"([\d.]+) ms", summary))
    assert sum(float(row[1]) for row in rows) == pytest.approx(total, rel=0.01)
    assert 0 < 2 * step < elapsed and 0 < total < elapsed  # the median of three timed steps


def test_glyphs_are_deterministic_and_balanced(monkeypatch: Any) -> None:
    monkeypatch.setattr("benchmarks.glyphs.COUNT", 60)
    source, again = glyphs(None, 28, 1), glyphs(None, 28, 1)
    images = source.fetch(range(60))
    assert torch.equal(images, again.fetch(range(60)))
    assert images.shape == (60, 1, 28, 28)
    assert images.flatten(1).unique(dim=0).shape[0] == 60
    assert source.labels is not None
    assert source.labels.targets.bincount().tolist() == [6] * 10
    ink = (images > 127).flatten(1).float().mean(1)
    assert ink.min() > 0.02
    assert ink.max() < 0.5


def test_fixed_samples_wrap_around() -> None:
    images = torch.arange(5)
    (samples,) = FixedSamples(images, 7).sample(range(3, 7), 0, None)
    assert samples.tolist() == [3, 4, 0, 1]


def test_quality_table_compares_at_equal_time() -> None:
    def row(contender: str, minutes: float, distance: float) -> dict[str, Any]:
        metric = {"value": distance, "low": distance - 1, "high": distance + 1}
        return {"data": "digits", "contender": contender, "minutes": minutes, "metrics": {"fd_classifier": metric}}

    failed = {"data": "digits", "contender": "diffusers", "minutes": 5}
    rows = [row("baseline", 0, 10), row("src.train", 2, 20), row("diffusers", 2, 60), row("src.train", 5, 9), failed]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(rows).splitlines()[2:]]
    assert [line[-1] for line in lines] == ["", "1.00", "3.00", "1.00", ""]
    assert lines[2][9] == "60.0 [59.0, 61.0]"
    assert len({len(line) for line in lines}) == 1


def test_shares_count_each_action_once() -> None:
    step = "[LightningModule]DiffusionModule.optimizer_step"
    passes = {
        "[Strategy]SingleDeviceStrategy.training_step": [1.0, 2.0],
        "[Strategy]SingleDeviceStrategy.backward": [4.0],
    }
    around = {
        "run_training_epoch": [30.0],
        "save_checkpoint": [1.5],
        "[Callback]ModelCheckpoint{}.on_validation_end": [1.5],
    }
    found = shares({step: [8.0], **passes, **around, "[_TrainingEpochLoop].train_dataloader_next": [0.5, 0.25]})
    assert {name: value for name, value in found.items() if value} == {
        "forward": 3.0,
        "backward": 4.0,
        "clipping, optimizer": 1.0,
        "checkpoints": 1.5,
        "data": 0.75,
    }
    with pytest.raises(ValueError, match="PARTS"):
        shares({"other": [1.0]})
