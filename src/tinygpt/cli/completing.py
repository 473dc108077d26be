"""``tinygpt completion``: what a shell needs to complete commands and flags."""

from __future__ import annotations

from typing import Literal

from tinygpt.cli.console import program_name


def completion(shell: Literal["bash", "zsh", "fish"], /) -> None:
    """Print a script that completes commands and flags in a shell.

    In bash: tinygpt completion bash > ~/.local/share/bash-completion/completions/tinygpt. In zsh
    write it to a file _tinygpt in a folder of $fpath, in fish to
    ~/.config/fish/completions/tinygpt.fish.

    Parameters
    ----------
    shell
        The shell.
    """
    from tinygpt.cli import make_app

    print(make_app(program_name()).generate_completion(shell=shell))
