"""What the documentation's site makes of the code: its tables of settings and commands, and the picture of schedules.

MkDocs calls the functions below by their names (`hooks` in mkdocs.yml).
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from html import escape
from typing import Any

_OUT_OF_DOCS = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and pictures that are made of the code."""
    from mkdocs.structure.files import File

    made = {"settings.md": settings_page(), "commands.md": commands_page(), "schedules.svg": schedules_picture()}
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A link to a file of the checkout leads nowhere on the site: its path stands there instead."""
    return _OUT_OF_DOCS.sub(lambda found: f"{found[1]} (`{found[2]}` in the checkout)", markdown)


def settings_page() -> str:
    """Every setting of every method: what it takes, its default, what it does, and what must be set for it."""
    from pss import methods
    from pss.config import Config
    from pss.explain import explain
    from pss.sections import RunSettings

    plain = Config.of(RunSettings(recipe="defaults"))
    shown: dict[str, dict[str, str]] = {}
    users: dict[str, list[str]] = {}
    for name in [plain.method, *sorted(methods.METHODS.keys() - {plain.method})]:
        for setting in explain(plain.with_method(name)):
            section = setting.name.rpartition(".")[0]
            row = f"| `{setting.name}` | {_cell(setting.takes)} | {_value(setting.value)} | {_cell(setting.doc)}"
            row += f" Read with {_cell(setting.reader)} only. |" if setting.reader else " |"
            shown.setdefault(section, {}).setdefault(setting.name, row)
            if name not in (using := users.setdefault(section, [])):
                using.append(name)
    lines = [
        "# All settings",
        "",
        "Change one with `--set NAME=VALUE`, or in [a file of your own](recipes.md). `pss-train RECIPE --set help`",
        "shows the values of that recipe. A setting that nothing in the run would read is refused, and so is a wrong",
        "value, before anything is loaded. The defaults below are those of a recipe that sets nothing.",
    ]
    for section, rows in shown.items():
        lines += ["", f"## {section or 'The method'}", ""]
        if section and len(users[section]) < len(methods.METHODS):
            lines += [f"With `method={'`, `'.join(users[section])}`.", ""]
        lines += ["| setting | takes | default | |", "|---|---|---|---|", *rows.values()]
    return "\n".join(lines) + "\n"


def commands_page() -> str:
    """The three commands with their options, as `--help` has them."""
    import typer.main

    import cli.convert
    import cli.eval
    import cli.train

    lines = [
        "# Commands",
        "",
        "What `--help` says of each. How a command ends is in [Recipes](recipes.md#how-a-command-ends).",
    ]
    for module in (cli.convert, cli.train, cli.eval):
        command: Any = typer.main.get_command(module.app)
        name = f"pss-{module.__name__.rpartition('.')[2]}"
        lines += ["", f"## {name}", "", " ".join(command.help.split()), "", "| option | |", "|---|---|"]
        lines += [f"| {option} | {_cell(told)} |" for option, told in _options(command)]
    return "\n".join(lines) + "\n"


def _options(command: Any) -> Iterator[tuple[str, str]]:
    for one in command.params:
        if one.param_type_name == "argument":
            yield f"`{one.metavar or one.name.upper()}`", one.help or ""
        elif not one.hidden and one.name not in ("install_completion", "show_completion"):
            default = one.default
            told = (one.help or "").strip()
            if isinstance(default, int | float | str) and not isinstance(default, bool) and default != "":
                told += f" Default: {default}."
            yield ", ".join(f"`{name}`" for name in one.opts), told


def schedules_picture() -> str:
    """The published schedules over six epochs as SVG, drawn in a grey that is read on white and on black."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from pss.schedules import Cosine, Cyclic, Linear, mean_rho

    steps, epochs = 120, 6
    grey, blue = "#7d8590", "#4c7ee0"
    with rc_context({"svg.hashsalt": "pss", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(7.2, 2.4), layout="constrained")
        axes = figure.subplots(1, 3, sharey=True)
        for ax, kind in zip(axes, (Linear, Cosine, Cyclic), strict=True):
            schedule = kind.published(steps_per_epoch=steps, epochs=epochs)
            total = steps * epochs
            ax.step([step / steps for step in range(total)], [schedule(step) for step in range(total)], color=blue)
            ax.set_title(f"{kind.__name__}, mean ρ {mean_rho(schedule, total):.2f}", color=grey, fontsize=10)
            ax.set_xlabel("epoch", color=grey)
            ax.set_yticks([0.2, 0.4, 0.6, 0.8, 1.0])
            ax.tick_params(colors=grey)
            ax.patch.set_alpha(0)
            for spine in ax.spines.values():
                spine.set_color(grey)
        axes[0].set_ylabel("ρ", color=grey)
        figure.patch.set_alpha(0)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()


def _value(text: str) -> str:
    return f"`{text}`" if text else "empty"


def _cell(text: str) -> str:
    return escape(" ".join(text.split()), quote=False).replace("|", "\\|")
