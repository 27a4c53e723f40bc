"""Run commands in one process: `python -m tests.config.run_commands` reads lists of words from stdin, as JSON."""

import contextlib
import importlib
import io
import json
import os
import sys

from src.config.cli import launch
from tests.speed import speed_up

TASKS = {"schedules": "show_schedules", "dashboard": "show_dashboard", "doctor": "examine"}


def run(module: str, *words: str) -> dict[str, object]:
    """Run `python -m src.<module> <words>`; return its status and output, and whether it imported torch."""
    task = getattr(importlib.import_module(f"src.{module}"), TASKS.get(module, module))
    environment, folder, status = dict(os.environ), os.getcwd(), 0
    sys.argv = [f"{module}.py", *words]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            launch(module, task, together="sampler" if module == "evaluate" else None)
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
    for name in os.environ.keys() - environment.keys():  # the names of output folders
        del os.environ[name]
    os.chdir(folder)
    return {"status": status, "out": out.getvalue(), "err": err.getvalue(), "torch": "torch" in sys.modules}


if __name__ == "__main__":
    speed_up()
    print("\n" + json.dumps([run(*words) for words in json.load(sys.stdin)]))
