"""`make gpu-check` without a GPU: the same code with a tiny network, and its failure messages."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import HANG_SECONDS
from tests.distributed.test_devices import environment


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, so that collecting the tests stays fast."""
    global REFERENCE, Row, all_rows, check_row, isolated, stated_peak
    from benchmarks.gpu_check import REFERENCE, Row, all_rows, check_row, isolated, stated_peak


CHOSEN = ["bf16-mixed", "sampling", "16-mixed, overflow", "32-true to bf16-mixed"]
"""The smallest selection with a value in every column and a row of each kind."""


@pytest.mark.faults
def test_each_kind_of_row_runs_on_cpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--folder", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--rows", *CHOSEN], env=environment(), cwd=Path(__file__).parents[2], text=True, capture_output=True,
        timeout=HANG_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "failed" not in done.stdout and "not run" not in done.stdout and "No failures." in done.stdout
    assert (tmp_path / "out" / "table.md").read_text() == done.stdout
    assert not list((tmp_path / "out").glob("runs_*"))  # large files are removed

    lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    cells = {name: others for name, *others in lines}
    assert list(cells)[:4] == ["run", REFERENCE, "32-true", "bf16-mixed"]
    for name in (REFERENCE, "32-true", "bf16-mixed"):
        loss, drift, skipped, speed, share, peak, estimate, ratio, within = cells[name]
        assert all(math.isfinite(float(x)) for x in (loss, drift.rstrip("%"), skipped, speed, estimate))
        assert float(loss) > 0 and float(speed) > 0 and float(estimate) > 0
        assert (share, peak, ratio, within) == ("-",) * 4  # GPU only
    assert cells["16-mixed, overflow"] == ["2 steps overflowed, 2 were skipped and recorded"]
    assert cells["32-true to bf16-mixed"][0].startswith("continued after step 6 with ")
    assert cells["sampling"][0].endswith(": 0 of 255 in 32-true, 0 of 255 in bf16-mixed")
    assert all(float(cells[f"32-true, batch of {count}"][0]) > 0 for count in (2, 4))

    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["wrong"] == [] and results["machine"]["matmul"] > 0
    assert list(results["rows"]) == [REFERENCE, "32-true", *CHOSEN]
    assert results["rows"]["bf16-mixed"]["losses"] != results["rows"]["32-true"]["losses"]


def training(**changes):
    """Return the metrics of a run on a GPU without failures."""
    return {
        "first_step": 0, "losses": [1.0, 1.0], "val_loss": 1.0, "skipped": 0, "recorded": 0, "recorded_fp16": 0,
        "ends_finite": True, "weights": [], "images_per_second": 100.0, "flops_per_image": 10**10, "devices": 1,
        "peak": 1000, "estimate": 1000, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"losses": [9.0, 1.04]}, None),
        ({"losses": [1.0, 1.06]}, "loss differs by +6.0%"),
        ({"losses": [1.0, math.nan]}, "loss differs by +nan%"),
        ({"ends_finite": False}, "not finite"),
        ({"peak": 1140}, None),
        ({"peak": 1160}, "memory is 1.16 times"),
        ({"peak": 840}, "memory is 0.84 times"),
        ({"skipped": 2, "recorded": 2, "recorded_fp16": 2}, None),
        ({"skipped": 2, "recorded": 1, "recorded_fp16": 1}, "2 steps skipped, 1 recorded"),
        ({"skipped": 1, "recorded": 1, "recorded_fp16": 0}, "0 of them as fp16"),
    ],
)
def test_training_rows_report_failures(changes, fault):
    row, machine = Row("bf16-mixed"), {"peak": 1e13, "matmul": 5e12}
    cells, faults = check_row(row, training(**changes), {REFERENCE: training()}, machine)
    assert cells[4] == "10.0%" and len(cells) == 9
    assert any(fault in message for message in faults) if fault else not faults
    assert check_row(row, training(), {}, {**machine, "peak": None})[0][4] == "20.0%"


def test_compiled_network_may_need_less_memory():
    row = Row("compile", ("compile=true",))
    for peak, wrong in ((500, False), (1200, True)):
        cells, faults = check_row(row, training(peak=peak), {REFERENCE: training()}, {"peak": 1e13})
        assert cells[-1] == "no" and bool(faults) is wrong


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"losses": [2.2]}, "loss differs by +10.0%"),
        ({"first_step": 0, "losses": [1.0, 2.0]}, "did not continue"),
        ({"weights": ["a", "b"]}, "parameter names differ"),
    ],
)
def test_resumed_rows_report_failures(changes, fault):
    done = {"32-true": training(losses=[1.0, 2.0]), "another": training(weights=["a"])}
    results = training(first_step=1, losses=[2.0], weights=["a"]) | changes
    _, faults = check_row(Row("resumed", does="resume", source="32-true"), results, done, {})
    assert any(fault in message for message in faults) if fault else not faults


def test_isolated_reports_errors_hangs_and_crashes(tmp_path):
    reading, writing = os.pipe()  # reaches EOF when all subprocesses have ended

    def hang():
        subprocess.Popen(["sh", "-c", "sleep 600; echo lives"], stdout=writing)
        time.sleep(600)
        os.write(writing, b"lives")

    def broken():
        raise ValueError("no such thing")

    log = tmp_path / "log"
    assert isolated(lambda: {"a": 1}, log, HANG_SECONDS) == {"a": 1}
    assert isolated(broken, log, HANG_SECONDS) == "ValueError: no such thing" and "Traceback" in log.read_text()
    assert isolated(lambda: os._exit(3), log, HANG_SECONDS) == "the process died"
    assert isolated(hang, log, 1) == "timed out after 1 s"
    os.close(writing)
    assert os.read(reading, 100) == b""
    os.close(reading)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Something else", None),
    ],
)
def test_stated_peak_matches_gpu_name(name, peak):
    assert stated_peak(name) == peak


def test_several_devices_add_ddp_and_fsdp_rows():
    names = [row.name for row in all_rows(1)]
    assert len(set(names)) == len(names) and not any("ddp" in name for name in names)
    more = {row.name for row in all_rows(6)} - set(names)
    assert more == {f"bf16-mixed, {strategy} on {n}" for strategy in ("ddp", "fsdp") for n in (2, 4)}
    assert all(row.source in names for row in all_rows(1) if row.source)
