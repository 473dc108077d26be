"""Write the reference of the command line from its own help: `cli_page.py docs/cli.md`."""

import re
import sys
from importlib.metadata import version
from pathlib import Path

from tinygpt.cli import make_app

INTRODUCTION = """\
<!-- Made by scripts/docs from the program's help, with cyclopts {version}: do not edit. -->

# Command line

Results go to stdout, everything else to stderr. The exit code is 0 for success, 1 for failure, 2
for wrong use, 129 after a closed terminal, 130 after Ctrl-C and 143 after SIGTERM. `minimiggy` is
another name of the same program.

Every command also takes `--threads N`, the number of cores to use (all of them by default);
`--strict`, which makes an error of the notice that a fast kernel cannot run here; and `--debug`,
which shows the traceback of an error.
"""


def cli_page() -> str:
    """The page as Markdown, one section for each verb."""
    text = make_app("tinygpt").generate_docs(output_format="markdown", usage_name="tinygpt")
    verbs = text[text.index("\n## tinygpt ") :]  # the title and the contents are what Sphinx makes
    verbs = re.sub(
        r"\*\*Every command\*\*:\n\n(\* .*\n)+\n*", "", verbs
    )  # the introduction has them
    verbs = re.sub(r"(#tinygpt-doctor)-", r"\1---", verbs)  # the anchor of a heading with --
    verbs = re.sub(r"\\?\[default: ([^]]+)\]", _default, verbs)
    return INTRODUCTION.format(version=version("cyclopts")) + verbs.rstrip() + "\n"


def _default(found: re.Match[str]) -> str:
    """Literal values as code: the stars of a pattern are no emphasis."""
    value = found[1]
    return f"[default: `{value}`]" if "*" in value or "\\" in value else found[0]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(cli_page(), encoding="utf-8")
