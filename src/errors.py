"""What the user asked for and cannot be had: said in one line, which names the remedy."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hydra.errors import CompactHydraException, InstantiationException
from omegaconf.errors import OmegaConfBaseException


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
        from src.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold what took the room
        raise UsageError(explain()) from error


@contextmanager
def data_errors() -> Iterator[None]:
    """Within this, data that cannot be read any more end in one line."""
    from src.data.unreadable import DataReadError

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
