"""Quote overrides and commands so that they can be pasted into a shell."""

import os
import re
import shlex

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import ListConfig


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
    if isinstance(value, list | tuple | ListConfig):
        return f"[{','.join(map(literal, value))}]"
    text = str(value)
    plain = re.fullmatch(r"(hf://)?[\w./@%+-]([\w ./@%+-]*[\w./@%+-])?", text, re.ASCII)
    if plain and OverridesParser.create().parse_override(f"name={text}").value() == text:
        return text
    return quoted(text)


def quoted(text: str) -> str:
    """Return `text` in Hydra's quotes."""
    return QuotedString(escaped(text), Quote.single).with_quotes()


def escaped(text: str) -> str:
    """Return `text` with `${` escaped, so that OmegaConf resolves nothing in it."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def shell_word(text: str) -> str:
    """Return `text` quoted for bash and zsh, always on one line."""
    if re.fullmatch(r"[\w=./@%+:-]+", text, re.ASCII):
        return text
    if not text.isprintable():
        octal = "".join(
            f"\\{byte:03o}" if byte < 32 or byte > 126 or byte in b"\\'" else chr(byte) for byte in os.fsencode(text)
        )
        return f"$'{octal}'"
    return shlex.quote(text) if re.search(r'[$`"\\!]', text) else f'"{text}"'
