"""Samples that cannot be read: files that are gone, damaged or on a server that does not answer."""

import errno
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

TRANSIENT = {
    *(errno.EIO, errno.EAGAIN, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTUNREACH),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.ECONNRESET, errno.ECONNABORTED),
}
"""Errors that network file systems get over."""

WAITS = (0.1, 0.4, 1.6)
"""Seconds before a file is read once more, after an error of these."""


class DataReadError(ValueError):
    """A sample, of the file or with the number `name`, cannot be read; the message is one line.

    `everywhere` says that it is raised in all processes at the same turn.
    """

    def __init__(self, message: str, name: str = "", everywhere: bool = False) -> None:
        super().__init__(message, name, everywhere)  # with which it is made again, in another process
        self.name = name
        self.everywhere = everywhere

    def __str__(self) -> str:
        return str(self.args[0])


def read(name: str, read_once: Callable[[], T]) -> T:
    """What `read_once` gives, tried again after errors that pass. Raises DataReadError, of the sample `name`."""
    for wait in (*WAITS, None):
        try:
            return read_once()
        except MemoryError:
            raise
        except Exception as error:  # whatever damaged bytes lead a decoder to
            if isinstance(error, OSError) and error.errno in TRANSIENT and wait is not None:
                time.sleep(wait)
                continue
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
            raise DataReadError(f"{name} cannot be read ({reason})", name) from error
    raise AssertionError
