"""Run Python commands in forks of one process that has imported the slow packages, so that each starts at once.

A command has its own process, arguments, environment, folder and exit status, as if it had been typed. Commands that
must import by themselves, or be killed, are started with `subprocess`.
"""

import json
import os
import runpy
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import IO

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
    requests, answers = _server()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    with tempfile.TemporaryDirectory() as folder:
        files = [os.path.join(folder, name) for name in ("stdin", "stdout", "stderr")]
        Path(files[0]).write_text(stdin)
        request = {"words": words, "cwd": str(cwd), "environment": environment, "files": files}
        print(json.dumps(request), file=requests, flush=True)
        status = int(answers.readline())
        return subprocess.CompletedProcess(words, status, *(Path(file).read_text() for file in files[1:]))


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
    import torchvision  # noqa: F401

    while line := sys.stdin.readline():
        if (child := os.fork()) == 0:
            _become(**json.loads(line))
            sys.exit()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
