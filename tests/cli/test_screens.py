"""What commands show on terminals of several widths, and what they answer to -h, --version, --show and --set help."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

import cli.convert
import cli.eval
import cli.train
from cli.errors import run
from pss import __version__, recipes
from pss.inference import table
from pss.training.console import fitted

SHORT = [
    "train.epochs=2", "optim.warmup_epochs=0", "train.batch_size=8", "model.depth=1", "model.embed_dim=24",
    "train.log_every_steps=2", "train.num_workers=1",
]  # fmt: skip
APPS = {"train": cli.train.app, "eval": cli.eval.app, "convert": cli.convert.app}


def call(app, *arguments):
    with pytest.raises(SystemExit) as done:
        run(app, [str(argument) for argument in arguments])
    return done.value.code or 0


def command(data, output, *options):
    settings = [word for setting in SHORT for word in ("--set", setting)]
    return [
        sys.executable, "-m", "cli.train", "digits", "--data", str(data), "--output", str(output), "--loader", "torch",
        *settings, *options,
    ]  # fmt: skip


def pane(words, width, *, until=None):
    """All lines that a terminal of a width has shown, and the exit code; at a line with `until`, Ctrl-C is pressed."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        words, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env=environment | {"TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(theirs)
    shown, end = b"", time.monotonic() + 150
    while select.select([ours], [], [], max(0, end - time.monotonic()))[0]:
        try:
            read = os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
        shown += read
        if until is not None and until in shown:
            process.send_signal(signal.SIGINT)
            until = None
    code = process.wait(timeout=60)
    os.close(ours)
    plain = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", shown).decode()
    return [line.rstrip() for line in re.split(r"[\r\n]+", plain) if line.strip()], code


@pytest.mark.parametrize(
    "width", [80, pytest.param(100, marks=pytest.mark.exhaustive), pytest.param(120, marks=pytest.mark.exhaustive)]
)
def test_bar_and_eta_are_always_on_the_screen(image_root, tmp_path, width):
    lines, code = pane(command(image_root, tmp_path / "run"), width)
    assert code == 0
    live = [line for line in lines if "━" in line]
    steps = [line for line in live if "epoch" in line]
    assert steps
    assert any("validating" in line for line in live)
    assert any("the first step" in line for line in live)
    for line in live:
        assert cell_len(line) <= width
    for line in steps:
        assert re.search(r"ETA (\d+:\d\d|–)$", line)
        assert "loss" in line
        assert ("step " in line) == (width >= 120)


def test_ctrl_c_is_130_and_the_run_goes_on(image_root, tmp_path):
    words = command(image_root, tmp_path / "run", "--set", "train.epochs=4000")
    lines, code = pane(words, 100, until=b"epoch 1/4000 ")
    assert code == 130
    assert any(re.match(r"stopped at step \d+; continue with --resume", line) for line in lines)


PARTS = st.lists(
    st.tuples(st.integers(0, 9), st.text(st.characters(codec="utf-8", categories=["L", "N"]), max_size=12))
)


@given(parts=PARTS, room=st.integers(10, 120))
def test_a_line_fits_or_is_down_to_what_must_stay(parts, room):
    line = fitted(parts, room)
    musts = [text for rank, text in parts if rank == 0 and text]
    assert cell_len(line) <= room or line == "  ".join(musts)
    assert all(text in line for text in musts)
    if cell_len(whole := "  ".join(text for _, text in parts if text)) <= room:
        assert line == whole


def rows():
    numbers = {
        "images_per_second": 12345.6, "images_per_second_with_loader": 4321.0, "latency_ms": 12.3,
    }  # fmt: skip
    spread = {
        f"{name}_{end}": value * (0.9 if end == "low" else 1.2)
        for name, value in numbers.items()
        for end in ("low", "high")
    }
    return [
        {
            "run": "run", "rho": rho, "knob": "ρ", "tokens": 196, "top1": 80.123, "top5": 95.2, "loss": 0.9,
            "gflops": 4.6, "gflops_low": None, "peak_memory_mib": 1234.5, **numbers, **spread,
        }
        for rho in (1.0, 0.6)
    ]  # fmt: skip


@pytest.mark.parametrize("width", [70, 80, 100, 120, 200])
def test_the_table_fits_and_says_what_it_leaves_out(width):
    shown = table.table_of(rows(), Console(width=width))
    assert "…" not in shown
    assert all(cell_len(line) <= width for line in shown.splitlines())
    assert "80.12" in shown
    assert ("12,346 (11,111–14,815)" in shown) == (width >= 120)
    assert ("12,346 ±20%" in shown) == (width < 120)
    assert ("in rho.csv" in shown) == (width < 100)


@pytest.mark.parametrize("name", APPS)
@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_has_two_names(capsys, name, word):
    assert call(APPS[name], word) == 0
    assert "Usage" in capsys.readouterr().out


@pytest.mark.parametrize("name", APPS)
def test_each_command_says_its_version(capsys, name):
    assert call(APPS[name], "--version") == 0
    assert capsys.readouterr().out == f"pss {__version__}\n"


def test_what_show_prints_is_a_recipe(capsys, tmp_path):
    assert call(cli.train.app, "digits", "--show", "--set", "train.epochs=7") == 0
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    assert recipes.get(str(tmp_path / "shown.yaml")) == recipes.get("digits").with_settings(["train.epochs=7"])


def test_set_help_shows_every_setting_of_the_run(capsys):
    assert call(cli.train.app, "digits", "--set", "help", "--set", "method=toe") == 0
    shown = capsys.readouterr().out
    assert "\ntrain.epochs = " in shown
    assert "\ntoe.rate = 0.5   (number in (0, 1])\n" in shown
    assert "Read with" in shown
    assert all(cell_len(line) <= 100 for line in shown.splitlines() if line.startswith("    "))


def test_what_a_shell_completes():
    from cli.common import recipe_names, setting_names

    assert dict(recipe_names("deit-s"))["deit-s-224"].startswith("DeiT-S at 224 px")
    assert list(setting_names("train.ep")) == ["train.epochs="]
    assert "data.progressive.start_size=" in setting_names("data.p")
