"""Errors for users: one line that names the setting, the rule and the fix."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hydra.errors import CompactHydraException, InstantiationException
from omegaconf.errors import OmegaConfBaseException


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, of a device or of the machine."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # of torch, not imported here
        return True
    signs = ["can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED", "bad_alloc"]
    signs.append("could not create a primitive")  # oneDNN, on a CPU
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


class UsageError(CompactHydraException):
    """What the user asked for cannot be done; the message says why and what to do instead, in one line.

    Hydra prints such an error of a sweep's job without a traceback.
    """


USER_ERRORS = (ValueError, TypeError, OSError, ImportError, InstantiationException, OmegaConfBaseException)


@contextmanager
def usage_errors() -> Iterator[None]:
    """Within this, nothing has been computed yet: what constructors and loaders refuse is for the user to mend."""
    try:
        yield
    except USER_ERRORS as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        what = " ".join(str(cause).split())
        if isinstance(cause, TypeError):
            what = f"a setting has a value of the wrong type ({what}); HYDRA_FULL_ERROR=1 shows which"
        raise UsageError(what) from error


@contextmanager
def memory_errors(explain: Callable[[], str]) -> Iterator[None]:
    """Within this, running out of memory ends in one line, that of `explain`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        from src.errors import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold what took the room
        raise UsageError(explain()) from error


@contextmanager
def data_errors() -> Iterator[None]:
    """Within this, data that cannot be read any more end in one line."""
    from src.errors import DataReadError

    try:
        yield
    except DataReadError as error:
        raise UsageError(f"{error}: restore or remove it, and start again") from error


def first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def sentence(error: BaseException) -> str:
    """The first sentence of an error, without its final stop."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0].rstrip(".")


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
