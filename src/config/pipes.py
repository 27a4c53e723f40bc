"""Standard output that is a pipe, whose reader may end first."""

import io
import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import NoReturn


@contextmanager
def quiet_pipe() -> Iterator[None]:
    """End the process silently if the reader of its output ends first, as `head` does."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        if not reader_left():
            raise
        end_silently()


@contextmanager
def print_at_end() -> Iterator[None]:
    """Hold back the output until the end, so that `quiet_pipe` sees a closed pipe instead of Hydra."""
    text = io.StringIO()
    try:
        with redirect_stdout(text):
            yield
    finally:
        sys.stdout.write(text.getvalue())


def reader_left() -> bool:
    """Return whether the reader of a pipe at stdout or stderr has ended."""
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def end_silently() -> NoReturn:
    """Exit with the status of SIGPIPE; what is left in the buffers goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)
    sys.exit(128 + signal.SIGPIPE)
