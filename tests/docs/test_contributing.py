"""The worked examples of CONTRIBUTING.md run as they stand, from a folder outside the repository."""

import csv
import json
import re
import shlex
from pathlib import Path

import pytest

from tests.fork_server import run_python

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FAST = ["trainer.accelerator=cpu", "trainer.max_steps=2", "data.batch_size=8", "sampler.steps=3"]
FAST += ["trainer.log_every_n_steps=1", "trainer.limit_val_batches=4", "callbacks=none", "neighbors.num_samples=0"]
# Run the commands one after another in this process: only the first pays for the imports.
LOOP = """
import json, runpy, sys
for arguments in json.load(sys.stdin):
    print("running", arguments, flush=True)
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
"""


def code_blocks() -> list[tuple[str, str]]:
    """Return the language and text of every fenced block of CONTRIBUTING.md that names a language."""
    return BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text())


def train_commands() -> list[str]:
    return [line for language, text in code_blocks() if language == "bash" for line in text.splitlines()]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """Write the files of CONTRIBUTING.md, run its commands with few steps, and return what they print."""
    folder = tmp_path_factory.mktemp("outside") / "mylab"
    for language, text in code_blocks():
        if language in ("python", "yaml"):
            match = re.search(r"^# ((?:mylab|conf)/\S+)$", text, re.MULTILINE)
            assert match, text
            path = folder / match[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    export, *commands = [line.replace("../mylab", str(folder)) for line in train_commands()]
    name, _, value = export.removeprefix("export ").partition("=")
    arguments = []
    for k, line in enumerate(commands):
        python, flag, *rest = shlex.split(line)
        assert (python, flag) == ("python", "-m"), line
        typed = {override.partition("=")[0] for override in rest}
        extra = [override for override in FAST if override.partition("=")[0] not in typed]
        arguments.append([*rest, *extra, f"hydra.run.dir={folder}/runs/{k}"])
    result = run_python("-c", LOOP, stdin=json.dumps(arguments), cwd=ROOT, **{name: value})
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return folder / "runs", len(arguments)


def test_commands_of_contributing_train_with_outside_parts(output):
    runs, count = output
    assert count == 7
    unfinished = [k for k in range(count) if not (runs / str(k) / "metrics.json").exists()]
    assert unfinished == []


def test_outside_callback_logs_its_values(output):
    runs, _ = output
    with (runs / "4" / "logs" / "version_0" / "metrics.csv").open() as file:
        norms = [row["train/weight_norm"] for row in csv.DictReader(file)]
    assert any(norm and float(norm) > 0 for norm in norms)


def test_outside_parts_reach_the_recorded_configuration(output):
    runs, _ = output
    targets = ["schedules.polynomial", "samplers.adams_bashforth", "networks.ConvNet", "datasets.gratings"]
    targets += ["callbacks.WeightNorm"]
    for k, target in enumerate(targets):
        assert f"mylab.{target}" in (runs / str(k) / ".hydra" / "config.yaml").read_text(), target
