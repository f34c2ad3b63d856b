"""What the commands have in common: their options, and what a shell is told to complete."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from pipelines import RemoteSet


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


CACHE_DIR: Any = typer.Option(
    "--cache-dir",
    help="For --data at an address: a folder on this machine's disk that its processes share (default: ~/.cache/pss).",
    show_default=False,
)
CACHE_GB: Any = typer.Option(
    "--cache-gb",
    help="How much of the disk that may take, in GB (default: what the data set has).",
    show_default=False,
)


def found_data(data: str | None, cache_dir: Path | None, cache_gb: float | None) -> Path | RemoteSet | None:
    """What --data names, opened if it is elsewhere. Raises `ValueError`."""
    if data is not None:
        from pipelines import find_data

        return find_data(data, cache_dir, cache_gb)
    if cache_dir is not None or cache_gb is not None:
        raise ValueError("--cache-dir and --cache-gb are for --data at an address; give it, or leave them out")
    return None


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
