"""Commands in the code blocks of the documentation pass the checks of their command, in bash and in zsh."""

import re
import shlex

from src.config import resolvers  # noqa: F401 - conf/ needs what it registers
from src.config.overrides import check_overrides, expand_grid
from src.config.words import expand_init_from, split_arguments
from src.errors import UsageError
from tests.docs.test_links import FENCE, PAGES

COMMAND = re.compile(r"^(?:torchrun .*? -m|python -m) src\.(\w+) ?(.*)$", re.MULTILINE)
TESTED_ELSEWHERE = ("CONTRIBUTING.md", "reference.md")


def commands() -> set[tuple[str, str]]:
    """Return (command, rest of the line) of each line that starts one of ours."""
    texts = [page.read_text() for page in PAGES if page.name not in TESTED_ELSEWHERE]
    blocks = [block.replace("\\\n", " ") for text in texts for block in FENCE.findall(text)]
    return {match for block in blocks for match in COMMAND.findall(block)}


def test_commands_of_the_documentation_are_accepted():
    refused = []
    for name, rest in sorted(commands()):
        words = shlex.split(rest.replace("/...", "/X").replace("=...", "=X"), comments=True)
        overrides, flags = split_arguments(words)
        if name == "compare":
            overrides = [word for word in overrides if "=" in word]  # the others are folders
        try:
            if name == "evaluate":
                overrides = expand_grid(name, overrides, "sampler")
            check_overrides(name, expand_init_from(overrides, name), "-m" in flags)
        except UsageError as error:
            refused.append(f"src.{name} {rest}: {error}")
    assert refused == []


def shell_blocks() -> list[str]:
    """Return the code blocks with commands to paste into a shell; a script with `#!` runs in its own."""
    fenced = [block.partition("\n") for page in PAGES for block in FENCE.findall(page.read_text())]
    blocks = [block.rstrip("`") for fence, _, block in fenced if fence in ("```", "```bash")]
    starts = re.compile(r"^(python|make|torchrun|pip|git|source|export) ", re.MULTILINE)
    return [block.replace("\\\n", " ") for block in blocks if starts.search(block) and not block.startswith("#!")]


def test_commands_quote_what_zsh_expands():
    """zsh matches file names by these characters, and reports an error if none matches."""
    quoted = re.compile(r"'[^']*'|\"[^\"]*\"")
    lines = [line for block in shell_blocks() for line in block.splitlines() if not line.startswith("#")]
    assert len(lines) > 50
    assert [line for line in lines if re.search(r"[\[\]{}*?~()^!]|(^|\s)=", quoted.sub("", line))] == []


def test_comments_of_commands_are_safe_in_zsh():
    """An interactive zsh runs a comment: alone in its line it fails without effect, after a command it is arguments."""
    quoted = re.compile(r"'[^']*'|\"[^\"]*\"")
    lines = [quoted.sub("", line) for block in shell_blocks() for line in block.splitlines()]
    assert [line for line in lines if not line.startswith("#") and "#" in line] == []
    comments = [line for block in shell_blocks() for line in block.splitlines() if line.startswith("#")]
    assert [line for line in comments if set("`'\"$;&|<>") & set(line)] == []
