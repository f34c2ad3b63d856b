"""The pages of the documentation run as they are printed, and the site is whole."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
import warm
from browser import CHROMIUM, Page

import cli.convert
import cli.eval
import cli.train
from pss import recipes

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
MODULES = {"pss-convert": cli.convert, "pss-train": cli.train, "pss-eval": cli.eval}


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(page):
    """Every line of ours that a page has a reader type."""
    for block in blocks(page, "sh") + blocks(page, "text"):
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"(torchrun .*--no-python )?pss-", line):
                yield line


LINES = [(page.stem, line) for page in PAGES for line in commands(page)]


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{page}-{number}" for number, (page, _) in enumerate(LINES)])
def test_every_command_parses(page, line):
    words = shlex.split(line.partition(" > ")[0], comments=True)
    start = next(number for number, word in enumerate(words) if word.startswith("pss-"))
    context = typer.main.get_command(MODULES[words[start]].app).make_context(words[start], words[start + 1 :])
    recipe = context.params.get("recipe")
    if recipe in recipes.RECIPES:
        settings = [text for text in context.params["settings"] or () if text != "help"]
        config = recipes.get(recipe)
        if not any(re.match(r"method=.*:", text) for text in settings):
            config.with_settings(settings)


def test_there_are_commands_on_the_pages():
    assert {"start", "own-data", "own-schedule", "own-recipe", "imagenet", "cluster"} <= {page for page, _ in LINES}


def test_no_page_starts_modules_where_commands_are_meant():
    """`python -m cli.train` finds whatever package of that name lies in the folder; the commands do not look there."""
    for page in [*PAGES, ROOT / "README.md", DOCS / "slurm.sh"]:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"-m cli\.", text), page
        assert all("--no-python" in line for line in text.splitlines() if "torchrun" in line and "pss-train" in line)


def run(folder, line, small=()):
    program, *words = shlex.split(line)
    module = MODULES[program].__name__
    done = warm.run(
        [sys.executable, "-m", module, *words, *small], cwd=folder, capture_output=True, timeout=600,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, f"{line}: {done.stderr}"
    return done.stdout


def run_page(folder, page, small):
    said = []
    for line in commands(page):
        trains = line.startswith("pss-train") and "--output" in line
        said.append(run(folder, line, small if trains else ()))
    return said


SMALL = ("--set", "train.epochs=2", "--set", "optim.warmup_epochs=0", "--loader", "torch")


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_five_minutes(tmp_path):
    run_page(tmp_path, DOCS / "start.md", SMALL)
    assert (tmp_path / "runs" / "digits" / "rho.png").exists()
    assert (tmp_path / "runs" / "rho.png").exists()


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_a_schedule_of_ones_own(tmp_path):
    page = DOCS / "own-schedule.md"
    (code,) = blocks(page, "python")
    (tmp_path / "refresh.py").write_text(code, encoding="utf-8")
    said = run_page(tmp_path, page, SMALL)
    planned = next(text for line, text in zip(commands(page), said, strict=True) if "--plan --set method=" in line)
    assert re.search(r"0\.4\b", planned)
    assert "0.6" not in re.findall(r"^ +(0\.\d) +\d", planned, re.MULTILINE)


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_a_recipe_of_ones_own(tmp_path):
    page = DOCS / "own-recipe.md"
    (recipe,), (code,) = blocks(page, "yaml"), blocks(page, "python")
    (tmp_path / "wide.yaml").write_text(recipe, encoding="utf-8")
    (tmp_path / "mine.py").write_text(code, encoding="utf-8")
    said = run_page(tmp_path, page, (*SMALL, "--set", "schedule.cooldown_epochs=1"))
    assert "embed_dim: 120" in said[0]
    assert (tmp_path / "runs" / "wide" / "summary.json").exists()


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The site, built as `make docs` builds it: any warning is an error."""
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "--quiet", "build", "--site-dir", str(folder)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=290, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return folder


@pytest.mark.exhaustive
def test_the_site_is_whole_and_asks_for_nothing_elsewhere(site):
    """Every page and picture that a page of the site names is there, with its anchor; nothing is loaded from afar."""
    pages = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html") if path.name != "404.html"}
    anchors = {path: set(re.findall(r'id="([^"]+)"', text)) for path, text in pages.items()}
    assert len(pages) > 20
    for path, text in pages.items():
        loaded = re.findall(r'<(?:script|img|link)[^>]*?(?:src|href)="(https?:[^"]+)"', text)
        assert loaded == [], path
        for target in re.findall(r'(?:src|href)="([^"]+)"', text):
            if re.match(r"(https?|data|mailto|javascript):", target):
                continue
            name, _, anchor = target.partition("#")
            there = (path.parent / name).resolve() if name else path
            assert there.exists(), f"{path.name} names {target}"
            if anchor and there in anchors and not anchor.startswith("__"):
                assert anchor in anchors[there], f"{path.name} names {target}"


@pytest.mark.exhaustive
def test_every_setting_is_on_its_page(site):
    from fields import FIELDS

    shown = set(re.findall(r"<code>([\w.]+)</code>", (site / "settings.html").read_text(encoding="utf-8")))
    assert {field.name for field in FIELDS} <= shown


@pytest.mark.exhaustive
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (400, False)])
def test_pages_fit_the_window_and_are_found(site, tmp_path, width, dark):
    """From the disk: no page is wider than the window, nothing fails to load, and the search finds a setting."""
    with Page(site / "index.html", tmp_path / "profile", width=width, dark=dark) as page:
        for name in ("index", "settings", "commands", "api", "alternatives", "own-schedule"):
            page.call("Page.navigate", url=(site / f"{name}.html").as_uri())
            wait(page, f"document.readyState === 'complete' && location.pathname.endsWith('/{name}.html')")
            assert page.run("document.documentElement.scrollWidth") <= width, name
        scheme = page.run("document.body.getAttribute('data-md-color-scheme')")
        assert scheme == ("slate" if dark else "default")
        page.run("document.querySelector('[data-md-toggle=search]').click()")
        page.run(
            "(() => { const q = document.querySelector('[data-md-component=search-query]'); q.focus();"
            " q.value = 'cooldown_epochs'; q.dispatchEvent(new KeyboardEvent('keyup', {key: 's', bubbles: true})); })()"
        )
        wait(page, "document.querySelectorAll('.md-search-result__item').length > 0")
        assert page.errors == []


def wait(page, condition):
    import time

    deadline = time.monotonic() + 60
    while not page.run(condition):
        assert time.monotonic() < deadline, condition
        time.sleep(0.1)
