"""Names of runs and classes are text, in whatever they are written."""

from __future__ import annotations

import io
import warnings
from dataclasses import replace

import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from pipelines.base import DataConfig
from pss.inference import plots, sweep, table
from pss.inference.publishing import card as cards
from pss.inference.publishing.facts import Facts
from pss.inference.text import cell, markdown, printable, shortened
from pss.runtime.processes import World

NAMES = [
    "deit[lr=1e-3]", "a[/b]", "[red]x[/]", ":smile:", "$\\frac{", "a$b$c", "_hidden", "^{", "<b>x</b>", "|", "`x`",
    "---", "# x", "🦆", "日本語" * 20, "x" * 300, "100%", "{0}", "%(x)s", "\\", "[link=file:///etc]x[/link]", "a b",
]  # fmt: skip


def row(name, **more):
    spread = {f"{key}{end}": 1.0 for key in ("images_per_second", "images_per_second_with_loader", "latency_ms")
              for end in ("", "_low", "_high")}  # fmt: skip
    return spread | {
        "run": name, "rho": 0.5, "knob": "ρ", "tokens": 3, "top1": 50.0, "top5": 90.0, "loss": 1.0, "gflops": 1.0,
        "gflops_low": None, "peak_memory_mib": None, "num_images": 5, "device": "a|b", "torch": "2", "batch_size": 4,
    } | more  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_table_shows_names_as_they_are(capsys, name):
    table.show([row(name), row("other")])
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].startswith(f"{name} ")
    assert len(shown) == 3 + (shown[2].strip() == "")


def test_so_does_the_progress_bar(monkeypatch):
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=400, markup=False, emoji=False)
    monkeypatch.setattr(sweep, "Console", lambda **options: console)
    for name in NAMES:
        with sweep.progress(name, 5, World(0, 1, None)) as advance:
            advance(1)
    assert all(name in written.getvalue() for name in NAMES)


@pytest.mark.parametrize("names", [NAMES[:4], NAMES[4:11], NAMES[11:]])
def test_the_picture_reads_no_formulas_and_leaves_no_run_out(monkeypatch, names):
    shown = []
    saved = Figure.savefig

    def watch(figure, *arguments, **options):
        legends = [figure.axes[1].get_legend(), *figure.legends]  # beside the axes, where there are many runs
        texts = [text for legend in legends if legend is not None for text in legend.get_texts()]
        shown.extend(text.get_text() for text in texts)
        assert not any(text.get_parse_math() for text in texts)
        saved(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", watch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = plots.plot_sweep([row(name, images_per_second=number + 1.0) for number, name in enumerate(names)])
    assert shown == [shortened(name, 44) for name in names]
    assert Image.open(io.BytesIO(picture)).size == (1650, 690)


def test_names_are_printable():
    for name, shown in [
        ("a\nb", "a\\nb"), ("\x1b[2J", "\\x1b[2J"), ("\udcff", "\\udcff"), ("a\u2028", "a\\u2028"),
        ("\u202ex", "\\u202ex"), ("🦆 é 日本", "🦆 é 日本"), ("a[/b]", "a[/b]"),
    ]:  # fmt: skip
        assert printable(name) == shown
        shown.encode("utf-8")
    assert sweep.distinct_names(["runs/a\udcff", "runs/a\udcfe"]) == ["a\\udcff", "a\\udcfe"]
    assert shortened("abcdefghij", 5) == "ab…ij"
    assert shortened("abcde", 5) == "abcde"


KNOWN = Facts(architecture="x", rel_pos="bias", num_classes=3, num_parameters=5, data=DataConfig())


@pytest.mark.parametrize("name", [*NAMES, "a\n---\nlicense: mit", "a | b | c"])
def test_a_card_keeps_its_form(name):
    card, usual = (
        cards.text(one, rows=[row(one)], facts=replace(KNOWN, architecture=one, dataset=one, recipe=one), plain=False,
                   picture=True)
        for one in (name, "usual")
    )  # fmt: skip
    assert len(card.splitlines()) == len(usual.splitlines())
    assert card.splitlines().count("---") == 2
    heading = next(line for line in card.splitlines() if line.startswith("# "))
    assert heading == f"# {markdown(name)}"
    plain = "".join(one for place, one in enumerate(heading) if heading[place - 1] != "\\")
    assert not set("|`<>[]*_") & set(plain[2:])


def test_a_spreadsheet_computes_no_name():
    for name in ("=1+1", "+x", "-2", "@SUM(A1)"):
        assert cell(name) == f"'{name}"
    assert cell("\x1b[31m=x") == "\\x1b[31m=x"
    assert (cell("plain"), cell(-2.5), cell(None)) == ("plain", -2.5, None)
