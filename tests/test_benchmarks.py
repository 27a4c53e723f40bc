"""What the benchmarks count, draw and say."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import training_utils
from diffusers.training_utils import EMAModel

from benchmarks import kernels, many
from benchmarks.glyphs import glyphs
from benchmarks.peers import PEERS, Work, as_large_as, flops
from benchmarks.quality import Given, table
from benchmarks.shares import shares
from benchmarks.training import compose_train
from src.models.winograd import Conv3x3


def test_arithmetic_is_that_of_plain_convolutions() -> None:
    layer, x = Conv3x3(64, 128), torch.randn(4, 64, 16, 16, requires_grad=True)
    assert layer.winograd_pays(x)
    assert flops(lambda: layer(x).sum().backward()) == 3 * 2 * 9 * 64 * 128 * 4 * 16 * 16  # forward, and two backward


def test_batches_of_others_are_the_images_between_minus_one_and_one() -> None:
    images = torch.tensor([0, 16]).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    work = Work(images, 64, 32, (1, 2), 1, (True, False), 16, torch.device("cpu"), levels=17)
    assert work.batch().unique().tolist() == [-1, 1]


def test_others_have_attention_at_the_levels_where_ours_has_it() -> None:
    cfg = compose_train(["model=unet_patched", "data=mnist"], Path("unused"))
    work = as_large_as(cfg.model, cfg.data, torch.zeros(0, 1, 28, 28), torch.device("cpu"))
    assert list(cfg.model.attention) == [7, 4]  # of 14, 7 and 4 patches each way
    assert work.attention == (False, True, True)


def test_diffusers_samples_with_the_averaged_weights_and_trains_on_with_its_own(monkeypatch: Any) -> None:
    work = Work(torch.zeros(8, 1, 8, 8), 4, 32, (1, 2), 1, (True, False), 16, torch.device("cpu"), levels=17)
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


def test_what_runs_on_a_gpu_runs_on_a_cpu(monkeypatch: Any, capsys: Any) -> None:
    """With numbers that fit together: the kernels' times add up to about the step, convolutions among them."""
    few = "--model unet_small --device cpu"
    monkeypatch.setattr("sys.argv", f"many {few} --at-once 2 --batches 1 --steps 2 --ways 32-true".split())
    many.main()
    row = capsys.readouterr().out.splitlines()[-1].split("|")
    assert float(row[3]) > 0
    assert row[1].strip() == "32-true"
    settings = f"{few} --batch 2 --compile null --precision 32-true --steps 1 --rows 1000"
    monkeypatch.setattr("sys.argv", f"kernels {settings}".split())
    kernels.main()
    said, *lines = [line for line in capsys.readouterr().out.splitlines() if line]
    rows = [line.split("|") for line in lines[2:]]
    assert any("conv" in row[4] for row in rows)
    step = float(said.split(": ")[1].split()[0])
    assert step / 2 < sum(float(row[1]) for row in rows) < 4 * step  # the profiler makes it slower


def test_printed_digits_are_the_same_each_time_and_of_ten_classes(monkeypatch: Any) -> None:
    monkeypatch.setattr("benchmarks.glyphs.COUNT", 60)
    source, again = glyphs(None, 28, 1), glyphs(None, 28, 1)
    images = source.fetch(range(60))
    assert torch.equal(images, again.fetch(range(60)))
    assert images.shape == (60, 1, 28, 28)
    assert images.flatten(1).unique(dim=0).shape[0] == 60
    assert source.labels is not None
    assert source.labels.numbers.bincount().tolist() == [6] * 10
    ink = (images > 127).flatten(1).float().mean(1)
    assert ink.min() > 0.02
    assert ink.max() < 0.5


def test_samples_that_are_there_are_given_by_their_numbers() -> None:
    images = torch.arange(5)
    (given,) = Given(images, 7).sample(range(3, 7), 0, None)
    assert given.tolist() == [3, 4, 0, 1]


def test_the_table_compares_with_ours_of_the_same_time() -> None:
    def row(contender: str, minutes: float, distance: float) -> dict[str, Any]:
        figure = {"value": distance, "low": distance - 1, "high": distance + 1}
        return {"data": "digits", "contender": contender, "minutes": minutes, "figures": {"fd_classifier": figure}}

    failed = {"data": "digits", "contender": "diffusers", "minutes": 5}
    rows = [row("floor", 0, 10), row("src.train", 2, 20), row("diffusers", 2, 60), row("src.train", 5, 9), failed]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(rows).splitlines()[2:]]
    assert [line[-1] for line in lines] == ["", "1.00", "3.00", "1.00", ""]
    assert lines[2][7] == "60.0 [59.0, 61.0]"
    assert len({len(line) for line in lines}) == 1


def test_a_step_is_split_into_what_it_holds_and_nothing_counts_twice() -> None:
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
    with pytest.raises(ValueError, match="otherwise than PARTS has them: other"):
        shares({"other": [1.0]})
