"""Run Python commands in forks of one process that has imported the slow packages, so that each starts at once.

A command has its own process, arguments, environment, folder and exit status, as if it had been typed. Commands that
must import by themselves, or be killed, are started with `subprocess`.
"""

import atexit
import json
import os
import runpy
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]


@cache
def _server() -> tuple[IO[str], IO[str]]:
    """Start the server once per test process; it ends when this process does."""
    command = [sys.executable, "-m", "tests.fork_server"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin and process.stdout
    return process.stdin, process.stdout


def run_python(*words: str, cwd: Path, stdin: str = "", **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run `python WORDS`, with `-m module` or `-c code` first, in the environment of now with further `variables`."""
    (done,) = _run(words, cwd, stdin, [variables])
    return done


def run_ranks(count: int, *words: str, cwd: Path, **variables: str) -> "list[subprocess.CompletedProcess[str]]":
    """Run `python WORDS` in `count` processes, each with the environment, and all with the store, of torchrun."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": store.port, "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": True}
    shared |= {"TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_MAX_RESTARTS": 0}
    ranks = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]
    return _run(words, cwd, "", [variables | {name: str(value) for name, value in rank.items()} for rank in ranks])


def _run(
    words: tuple[str, ...], cwd: Path, stdin: str, variables: list[dict[str, str]]
) -> "list[subprocess.CompletedProcess[str]]":
    """Run the command once for each set of variables, all at the same time."""
    requests, answers = _server()
    with tempfile.TemporaryDirectory() as folder:
        commands: list[dict[str, Any]] = []
        for number, own in enumerate(variables):
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **own}
            files = [os.path.join(folder, f"{number}.{name}") for name in ("stdin", "stdout", "stderr")]
            Path(files[0]).write_text(stdin)
            commands.append({"words": words, "cwd": str(cwd), "environment": environment, "files": files})
        print(json.dumps(commands), file=requests, flush=True)
        return [
            subprocess.CompletedProcess(words, status, *(Path(file).read_text() for file in command["files"][1:]))
            for command, status in zip(commands, json.loads(answers.readline()), strict=True)
        ]


def _exit_at_once(statuses: list[int]) -> None:
    """End this process with the status, if there is one. Python would first free all modules: two seconds of work."""
    if statuses:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(statuses[0])


def _become(words: list[str], cwd: str, environment: dict[str, str], files: list[str]) -> None:
    """Run the command in this forked process."""
    for number, file in enumerate(files):
        os.dup2(os.open(file, os.O_RDONLY if number == 0 else os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - the old one has read the requests
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:1] = [cwd, *environment["PYTHONPATH"].split(os.pathsep)]
    kind, code, *rest = words
    sys.argv[:] = ["-c" if kind == "-c" else code, *rest]
    if kind == "-m":
        runpy.run_module(code, run_name="__main__", alter_sys=True)
    else:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    statuses: list[int] = []
    atexit.register(_exit_at_once, statuses)  # the first handler registered is the last that runs

    # What each command would import by itself takes as long as a short training run.
    import hydra.main
    import pandas  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    import torchvision.transforms.v2  # noqa: F401

    import src.training.module  # noqa: F401
    from src.config.search_path import CONF
    from src.runs.trust import known_targets
    from tests.speed import speed_up

    speed_up()  # in each fork too
    known_targets()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        for command in ("train", "sample", "evaluate"):
            hydra.compose(command)

    while line := sys.stdin.readline():
        children = []
        for command in json.loads(line):
            if (child := os.fork()) == 0:
                try:
                    _become(**command)
                except SystemExit as stop:
                    statuses.append(stop.code if isinstance(stop.code, int) else int(stop.code is not None))
                    raise
                except Exception:
                    statuses.append(1)
                    raise
                statuses.append(0)
                sys.exit()
            children.append(child)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
