"""Read errors during training: retries, and their exchange between processes."""

import errno
import time
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from src.errors import DataReadError

T = TypeVar("T")

TRANSIENT = {
    *(errno.EIO, errno.EAGAIN, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTUNREACH),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.ECONNRESET, errno.ECONNABORTED),
}
"""Errors from which network file systems recover."""

RETRY_DELAYS = (0.1, 0.4, 1.6)
"""Seconds to wait before each further attempt after a transient error."""


def read_with_retries(name: str, read: Callable[[], T]) -> T:
    """Return what `read` returns, after retries if errors are transient. Raises DataReadError for the sample `name`."""
    for delay in (*RETRY_DELAYS, None):
        try:
            return read()
        except MemoryError:
            raise
        except Exception as error:  # decoders raise almost anything on corrupted bytes
            if isinstance(error, OSError) and error.errno in TRANSIENT and delay is not None:
                time.sleep(delay)
                continue
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
            raise DataReadError(f"{name} cannot be read ({reason})", name) from error
    raise AssertionError


def read_error_hint(skip_unreadable: bool) -> str:
    """Return the end of an error message about a sample that cannot be read."""
    if skip_unreadable:
        return "check that the data still exist"
    return "restore or remove it, or add data.skip_unreadable=true"


class ReadErrors:
    """The unreadable samples of a run, which its processes exchange."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        """Samples replaced by others so far."""
        self.skipped: dict[str, str] = {}
        """Errors by sample, not yet exchanged or warned about."""
        self._group: Any = None

    def sync(self, failure: str, world_size: int) -> None:
        """Raise DataReadError in all processes if any has a `failure`; else warn about all skipped samples.

        Every process of the run must call it.
        """
        reports = [(failure, self.skipped)] if world_size == 1 else self._gather(failure, world_size)
        if first := next((failure for failure, _ in reports if failure), ""):
            raise DataReadError(first, everywhere=True)
        for _, skipped in reports:
            self.skipped = self.skipped | skipped
        self.warn()

    def warn(self) -> None:
        """Warn once about each skipped sample."""
        new = {name: message for name, message in self.skipped.items() if name not in self.names}
        self.names |= new.keys()
        self.skipped = {}
        for message in new.values():
            warnings.warn(f"{message}; it is replaced by another sample", stacklevel=2)

    def _gather(self, failure: str, world_size: int) -> list[tuple[str, dict[str, str]]]:
        """Return the failure and the skipped samples of each process; exchanges one integer if there are none."""
        import torch
        from torch import distributed

        if self._group is None:
            self._group = distributed.new_group(backend="gloo")  # does not synchronize with the devices
        any_report = torch.tensor(int(bool(failure or self.skipped)))
        distributed.all_reduce(any_report, distributed.ReduceOp.MAX, self._group)
        reports: list[Any] = [("", {})] * world_size
        if any_report:
            distributed.all_gather_object(reports, (failure, self.skipped), self._group)
        return reports
