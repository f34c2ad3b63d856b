"""What the commands have in common: their options, and what a shell is told to complete."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer


def make_app() -> typer.Typer:
    """An empty command, with `-h` beside `--help`."""
    return typer.Typer(
        add_completion=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def _show_version(asked: bool) -> None:
    if asked:
        from pss.version import __version__

        typer.echo(f"pss {__version__}")
        raise typer.Exit


VERSION: Any = typer.Option("--version", help="Show the version and leave.", is_eager=True, callback=_show_version)


def recipe_names(incomplete: str) -> Iterator[tuple[str, str]]:
    """For a shell: recipes that begin so, each with a line on it."""
    from pss.recipes import summaries

    yield from (told for told in summaries().items() if told[0].startswith(incomplete))


def setting_names(incomplete: str) -> Iterator[str]:
    """For a shell: settings of every run that begin so; those of methods would take as long as torch to load."""
    from pipelines.settings import hints_of, is_section
    from pss.sections import RunSettings

    def below(kind: Any, prefix: str) -> Iterator[str]:
        for name, hint in hints_of(kind).items():
            if is_section(hint):
                yield from below(hint, f"{prefix}{name}.")
            elif prefix or name == "method":
                yield f"{prefix}{name}="

    yield from (name for name in below(RunSettings, "") if name.startswith(incomplete))
