"""`npdrt completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from npdrt.cli.common import Name


@click.command("completion")
@click.argument("shell", type=Name(["bash", "zsh", "fish"]), metavar="SHELL")
def command(shell: str) -> None:
    """Print the completion script of SHELL (bash, zsh or fish).

    \b
    bash: eval "$(npdrt completion bash)"      in ~/.bashrc
    zsh:  eval "$(npdrt completion zsh)"       in ~/.zshrc
    fish: npdrt completion fish > ~/.config/fish/completions/npdrt.fish
    """
    from npdrt.cli import cli

    kind = get_completion_class(shell)
    assert kind is not None  # the three shells are Click's own
    click.echo(kind(cli, {}, "npdrt", "_NPDRT_COMPLETE").source())
