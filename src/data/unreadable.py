"""Read files that may disappear or be damaged while a run trains."""

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from src.errors import DataReadError

T = TypeVar("T")


TRANSIENT = {
    *(errno.EIO, errno.EAGAIN, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTUNREACH),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.ECONNRESET, errno.ECONNABORTED),
}
"""Errors that network file systems get over."""


WAITS = (0.1, 0.4, 1.6)
"""Seconds before a file is read once more, after an error of these."""


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
