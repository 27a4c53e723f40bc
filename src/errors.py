"""Messages for users: errors on one line that name the setting, the rule and the fix, and commands to paste.

Imports only the standard library.
"""

import difflib
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class UsageError(ValueError):
    """A request that cannot be satisfied; the message is one line that names the setting, the rule and the fix."""


class DataReadError(ValueError):
    """A sample that cannot be read; `name` is its file or index, and the message is one line.

    `everywhere` means that all processes raise it at the same step.
    """

    def __init__(self, message: str, name: str = "", everywhere: bool = False) -> None:
        super().__init__(message, name, everywhere)  # all arguments, so that it can be pickled
        self.name = name
        self.everywhere = everywhere

    def __str__(self) -> str:
        return str(self.args[0])


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error reports that a device or the machine ran out of memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without importing it
        return True
    signs = ["can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED", "bad_alloc"]
    signs.append("could not create a primitive")  # oneDNN, on a CPU
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn errors of constructors and loaders into UsageError. Use it only before any computation starts."""
    try:
        yield
    except Exception as error:
        configures = any(kind.__module__.startswith(("hydra.", "omegaconf.")) for kind in type(error).__mro__)
        if not (configures or isinstance(error, ValueError | TypeError | OSError | ImportError)):
            raise
        # Hydra wraps the error of a constructor into an InstantiationException.
        cause = error.__cause__ if type(error).__name__ == "InstantiationException" and error.__cause__ else error
        message = " ".join(str(cause).split())
        # Numbers in lists as they are typed; a text in quotes may have a comma and a space itself.
        message = re.sub(r"=\[[^\]'\"]*\]", lambda match: match[0].replace(", ", ","), message)
        if isinstance(cause, TypeError):
            message = f"a setting has a value of the wrong type ({message}); HYDRA_FULL_ERROR=1 shows which"
        raise UsageError(message) from error


@contextmanager
def memory_errors(explain: Callable[[], str]) -> Iterator[None]:
    """Turn an out-of-memory error into a UsageError with the message that `explain` returns."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # its traceback holds tensors
        raise UsageError(explain()) from error


@contextmanager
def optional_package(setting: str, package: str, otherwise: str = "") -> Iterator[None]:
    """Turn an ImportError into a ValueError that says how to install the package that a setting needs."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{setting} needs the package {package}; pip install {package}{otherwise}") from error


@contextmanager
def data_errors() -> Iterator[None]:
    """Turn an error that reports unreadable data into a UsageError."""
    try:
        yield
    except DataReadError as error:
        raise UsageError(f"{error}: restore or remove it, and start again") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error that is not blank, or its class name."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line of at most 200 characters, or its class name."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def sentence(error: BaseException) -> str:
    """Return the first sentence of an error, without its final period."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0].rstrip(".")


def first_names(names: Sequence[str], count: int = 5) -> str:
    """List the first names and count the rest, for a message."""
    return ", ".join(map(printable, names[:count])) + (f" and {len(names) - count} more" if len(names) > count else "")


def printable(name: str) -> str:
    """Return a name with escapes for line breaks, control characters, and bytes that are not UTF-8."""
    return name if name.isprintable() else ascii(name)[1:-1]


def counted(count: int, noun: str) -> str:
    """Return a number with its noun, such as "1 image" or "2,000 classes"."""
    return f"{count:,} {noun}{'' if count == 1 else 'es' if noun.endswith('s') else 's'}"


def absence(path: Path) -> str:
    """Return why there is no file at a path, for a message: nothing is there, a link to nothing, or a pipe."""
    if path.exists():
        return "is neither a file nor a folder" if not path.is_dir() else "is a folder"
    return f"is a link to {os.readlink(path)}, which does not exist" if path.is_symlink() else "does not exist"


def near_matches(word: str, known: Sequence[str], count: int = 1, cutoff: float = 0.6) -> list[str]:
    """Return the known words most similar to `word`; empty if none is similar, or if it starts several of them."""
    if sum(each.startswith(f"{word}_") for each in known) > 1:
        return []
    return difflib.get_close_matches(word, known, n=count, cutoff=cutoff)


def did_you_mean(name: str, known: Sequence[str], otherwise: str | None = None) -> str:
    """Return the end of an error: the known names most similar to an unknown one, or the alternative to none."""
    if close := near_matches(name, known, 3, 0.5):
        return f"did you mean {' or '.join(close)}?"
    return f"choose one of {first_names(known)}" if otherwise is None else otherwise


def check_command(module: str, commands: Sequence[str]) -> None:
    """Exit with status 2 if `python -m module` names none of the commands; it would only define functions."""
    package, _, name = module.partition(".")
    if name in commands:
        return
    close = near_matches(name.rpartition(".")[2], commands)
    hint = f"did you mean {package}.{close[0]}? The" if close else "the"
    known = ", ".join(f"{package}.{command}" for command in commands)
    sys.stderr.write(f"error: {module} is not a command: {hint} commands are {known}\n")
    sys.exit(2)


def format_override(name: str, value: object) -> str:
    """Return `name=value` as one shell word that Hydra parses to exactly this value.

    A string stays a string, even `null`, `1e3` or one with commas; a sequence becomes a list.
    """
    return shell_word(f"{name}={literal(value)}")


def command(name: str, *words: str) -> str:
    """Return the command line of `src.<name>` with overrides that are quoted already or need no quotes."""
    return " ".join([f"python -m src.{name}", *words])


def literal(value: object) -> str:
    """Return `value` in Hydra's override grammar."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{','.join(map(literal, value))}]"
    text = str(value)
    plain = re.fullmatch(r"(hf://)?[\w./@%+-]([\w ./@%+-]*[\w./@%+-])?", text, re.ASCII)
    return text if plain and not _is_number_or_constant(text) else quoted(text)


def _is_number_or_constant(text: str) -> bool:
    """Return whether Hydra may parse a text to another value than a string."""
    try:
        float(text)
    except ValueError:
        return text.lower() in ("null", "true", "false")
    return True


def quoted(text: str) -> str:
    """Return `text` in Hydra's quotes: it doubles the backslashes before a quote, also the last one."""
    quote = '"' if "'" in text and '"' not in text else "'"  # rather than escapes
    return quote + re.sub(rf"(\\*)({quote}|\Z)", lambda m: m[1] * 2 + (m[2] and f"\\{quote}"), escaped(text)) + quote


def escaped(text: str) -> str:
    """Return `text` with `${` escaped, so that OmegaConf resolves nothing in it."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def shell_word(text: str) -> str:
    """Return `text` quoted for bash and zsh, always on one line."""
    if re.fullmatch(r"[\w./@%+:-][\w=./@%+:-]*", text, re.ASCII):
        return text
    if not text.isprintable():
        octal = "".join(
            f"\\{byte:03o}" if byte < 32 or byte > 126 or byte in b"\\'" else chr(byte) for byte in os.fsencode(text)
        )
        return f"$'{octal}'"
    if re.search("[$`!]", text) or (re.search(r'["\\]', text) and "'" not in text):
        return shlex.quote(text)
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'  # shlex would leave the quotes for each '
