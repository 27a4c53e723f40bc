"""Commands in the code blocks of the documentation pass the checks of their command, in bash and in zsh."""

import re
import shlex

from src.config import resolvers  # noqa: F401 - conf/ needs what it registers
from src.config.overrides import check_overrides, expand_grid, split_arguments
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
            check_overrides(name, overrides, "-m" in flags)
        except UsageError as error:
            refused.append(f"src.{name} {rest}: {error}")
    assert refused == []


def test_brackets_in_commands_are_quoted_for_zsh():
    quoted = re.compile(r"'[^']*'|\"[^\"]*\"|#.*$")
    assert [rest for _, rest in sorted(commands()) if set("[]*?~") & set(quoted.sub("", rest))] == []
