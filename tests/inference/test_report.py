"""The report, as a browser without a network shows it."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import browser
import pytest
import torch
from memory_loader import MemoryLoader

from pss import recipes
from pss.inference import report, sweep
from pss.inference.opening import load_run
from pss.runtime.processes import World
from pss.training.trainer import Trainer

pytest.importorskip("plotly")

HERE = World(rank=0, size=1, device=torch.device("cpu"))
RHOS = [1.0, 0.6, 0.2]
NAMES = ["first", "</script><b>second</b>", "third", "fourth"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Two runs, their sweep, and the report on them."""
    base = tmp_path_factory.mktemp("reported")
    runs = []
    for method in ("sampled", "dense"):
        config = recipes.get("digits").with_settings(
            ["model.embed_dim=24", "model.depth=2", "train.epochs=2", "train.batch_size=8", "optim.warmup_epochs=0",
             "train.log_every_steps=2", f"method={method}"]
        )  # fmt: skip
        folder = base / method
        folder.mkdir()
        (folder / "config.json").write_text(config.to_json(), encoding="utf-8")
        loaders = MemoryLoader(), MemoryLoader(train=False)
        Trainer(config, *loaders, classes=NAMES, output=folder, world=HERE).fit()
        runs.append(load_run(folder, HERE.device))
    found = sweep.sweep(
        runs,
        names=["sampled", "dense"],
        points=RHOS,
        make_loader=lambda config: MemoryLoader(train=False, batch_size=16),
        batch_size=4,
        world=HERE,
    )
    report.write(found, runs, ["sampled", "dense"], base / "report.html")
    return found, base / "report.html"


def test_everything_is_in_the_file(swept):
    from plotly.offline import get_plotlyjs

    _, path = swept
    text = path.read_text(encoding="utf-8")
    own = text.replace(get_plotlyjs(), "")
    assert len(own) < len(text) / 10
    assert not re.search(r"(src|href)=.(?!data:)", own)
    assert "{{" not in own
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', own, flags=re.DOTALL)
    content = json.loads(data)
    assert [len(run["pictures"]) for run in content["runs"]] == [12, 12]
    assert NAMES[1] in {picture["label"] for picture in content["runs"][0]["pictures"]} < set(NAMES)
    assert content["runs"][0]["training"]["top1"]["steps"] == [5, 10]
    hours = content["runs"][0]["training"]["loss"]["hours"]
    assert hours == sorted(hours)
    assert 0 < hours[0] < hours[-1] < 1


def confusion(exhibit, place, count):
    table = [[0] * count for _ in range(count)]
    for label, answer in zip(exhibit.labels.tolist(), exhibit.answers[place].tolist(), strict=True):
        table[label][answer] += 1
    return table


def test_classes_are_counted_at_every_point(swept):
    """Against the accuracy in the table, and counted image by image."""
    found, path = swept
    for run, name, exhibit in zip(data_of_runs(path), ("sampled", "dense"), found.exhibits, strict=True):
        assert run["classes"]["names"] == NAMES
        assert run["classes"]["sizes"] == [10] * 4
        for place, point in enumerate(run["classes"]["points"]):
            table = confusion(exhibit, place, 4)
            assert [row[:4] for row in point["matrix"]] == table
            assert point["right"] == [table[number][number] for number in range(4)]
            (top1,) = [row["top1"] for row in found.rows if (row["run"], row["rho"]) == (name, RHOS[place])]
            assert 100 * sum(point["right"]) / 40 == pytest.approx(top1)
            wrong = sorted(-table[a][b] for a in range(4) for b in range(4) if a != b and table[a][b])
            assert [-images for _, _, images, _ in point["confusions"]] == wrong
            for label, answer, images, share in point["confusions"]:
                assert table[NAMES.index(label)][NAMES.index(answer)] == images
                assert share == images / 10


def data_of_runs(path):
    return json.loads(data_of(path.read_text(encoding="utf-8")))["runs"]


def test_of_many_classes_the_worst_are_shown(swept):
    """120 classes, of which the split lacks five: class n has n right answers of 120, all others go to class 0."""
    exhibit = swept[0].exhibits[0]
    labels = torch.arange(5, 120).repeat_interleave(120)
    answers = torch.where(torch.arange(120).repeat(115) < labels, labels, torch.zeros_like(labels))
    half = replace(exhibit, points=[0.5, 1.0], labels=labels, answers=torch.stack([torch.zeros_like(labels), answers]))
    found = report._classes(half, [f"c{number}" for number in range(120)])
    assert found["names"] == [f"c{number}" for number in range(5, 35)]
    assert found["all"] == 115
    assert found["points"][1]["right"] == list(range(5, 35))
    assert found["points"][0]["right"] == [0] * 30
    for row, right in zip(found["points"][1]["matrix"], range(5, 35), strict=True):
        assert sum(row) == 120
        assert row[-1] == 120 - right  # class 0 has no column of its own
    assert found["points"][1]["confusions"][0] == ["c5", "c0", 115, round(115 / 120, 4)]
    assert len(found["points"][1]["confusions"]) == 12


ODD = [
    "<!--<script>", "]]></script><script>throw 1</script>", "a \u2028 b\u2029", "&lt;b&gt; & <b>bold</b>",
    "\"'`${1}{{data}}\\", "\u202eright to left\u200f", "\udcff\ud800", "", "x" * 300, "🦆", "$a$ %{x} _b_",
    "line\nbreak\ttab\0",
]  # fmt: skip


def of_names(swept, names):
    """The same two runs under other names, with classes of other names."""
    found, runs = swept[0], [load_run(swept[1].parent / name, HERE.device) for name in ("sampled", "dense")]
    calls = dict(zip(("sampled", "dense"), names, strict=True))
    pictures = [[replace(one, label=n % len(ODD)) for n, one in enumerate(some.pictures)] for some in found.exhibits]
    exhibits = [replace(one, pictures=some) for one, some in zip(found.exhibits, pictures, strict=True)]
    rows = [row | {"run": calls[row["run"]]} for row in found.rows]
    return sweep.Sweep(rows, exhibits), [replace(run, classes=ODD) for run in runs], names


def data_of(page):
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, flags=re.DOTALL)
    return data


def test_no_name_leaves_the_place_it_is_shown_in(swept, tmp_path):
    usual = report.page(swept[0], *plain(swept))
    for name in ODD:
        page = report.page(*of_names(swept, [name, "other"]))
        for tag in ("<script", "</script", "<!--"):
            assert page.count(tag) == usual.count(tag), (name, tag)
        data = data_of(page)
        assert not re.search("[<>&\u2028\u2029\ud800-\udfff]", data)
        content = json.loads(data)
        assert content["runs"][0]["name"] == name
        assert {picture["label"] for picture in content["runs"][0]["pictures"]} == set(ODD)
        report.files.write(tmp_path / "report.html", page)  # it can be encoded


def plain(swept):
    return [load_run(swept[1].parent / name, HERE.device) for name in ("sampled", "dense")], ["sampled", "dense"]


@pytest.mark.skipif(browser.CHROMIUM is None, reason="Chromium is not installed")
def test_odd_names_are_shown_as_they_are(swept, tmp_path):
    pytest.importorskip("websocket")
    names = ["<b>a</b> &amp; <!--<script>" + "x" * 300, "$\\frac{$ %{x} [b]"]
    report.files.write(tmp_path / "report.html", report.page(*of_names(swept, names)))
    with browser.Page(tmp_path / "report.html", tmp_path / "profile", width=400) as page:
        legend = page.run("[...get('throughput').querySelectorAll('.legendtext')].map(one => one.textContent)")
        assert legend[0].startswith("<b>a</b> &amp; <!--<script>x")
        assert legend[1] == names[1]
        assert page.run("document.querySelectorAll('b').length") == 0
        assert page.run("[...document.querySelectorAll('#rows tbody td:first-child')].map(one => one.textContent)") == [
            name for name in names for _ in RHOS
        ]
        labels = page.run("[...document.querySelectorAll('.label')].map(one => one.textContent)")
        assert set(labels) == {f"labelled \u2068{name}\u2069" for name in ODD}
        assert page.run("document.documentElement.scrollWidth") <= 400
        assert page.errors == []


LOGS = {
    "skipped steps": [
        {"kind": "step", "step": step, "loss": None if step in (0, 2) else 1.0 + step, "lr": 0.1} for step in range(5)
    ] + [{"kind": "epoch", "step": 4, "train_seconds": 3.0, "val_loss": float("inf"), "top1": 50.0}],
    "rows of another kind": [
        {"kind": "step"}, {"kind": "step", "step": "x", "loss": 1.0}, {"kind": "note", "step": 1, "loss": "high"},
        {"kind": "step", "step": 3, "loss": float("nan")}, {"kind": "step", "step": 4, "loss": 2.0},
        {"kind": "epoch", "step": 4, "top1": True}, {"kind": "epoch", "step": 8, "val_loss": 0.5},
    ],
    "nothing": [],
    "nothing but what was skipped": [{"kind": "step", "step": 1, "loss": None}],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "steps"), list(zip(LOGS, ([1, 3, 4], [4], None, None), strict=True)))
def test_curves_are_drawn_of_what_is_a_number(swept, monkeypatch, kind, steps):
    monkeypatch.setattr(report, "read_rows", lambda folder, kind_: [r for r in LOGS[kind] if r["kind"] == kind_])
    training = json.loads(data_of(report.page(swept[0], *plain(swept))))["runs"][0]["training"]
    assert (training and training["loss"]["steps"]) == steps
    assert training is None or len(training["loss"]["hours"]) == len(steps)


def test_a_log_that_cannot_be_read_is_not_missed(swept, monkeypatch):
    def unreadable(folder, kind):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(report, "read_rows", unreadable)
    assert json.loads(data_of(report.page(swept[0], *plain(swept))))["runs"][0]["training"] is None


def test_numbers_that_are_not_finite_are_null(swept, tmp_path):
    rows = [row | {"loss": float("nan"), "sparsity": float("-inf")} for row in swept[0].rows]
    found = replace(swept[0], rows=rows)
    assert json.loads(data_of(report.page(found, *plain(swept))))["rows"][0]["loss"] is None
    sweep.write(rows, tmp_path)
    assert json.loads((tmp_path / "rho.json").read_text(), parse_constant=pytest.fail)[0]["loss"] is None


@pytest.mark.skipif(browser.CHROMIUM is None, reason="Chromium is not installed")
def test_the_slider_shows_what_each_image_keeps(swept, tmp_path):
    pytest.importorskip("websocket")
    found, path = swept
    with browser.Page(path, tmp_path) as page:
        cards = "[...document.querySelectorAll('.card')].map(card => ({...card.dataset}))"
        veils = "[...document.querySelectorAll('.frame path')].map(one => one.getAttribute('d').split('M').length - 1)"
        seen = []
        for run, exhibit in enumerate(found.exhibits):
            page.run(f"get('run').value = {run}; get('run').dispatchEvent(new Event('change'))")
            for position, rho in enumerate(sorted(RHOS)):
                page.run(f"get('rho').value = {position}; get('rho').dispatchEvent(new Event('input'))")
                views = [picture.views[RHOS.index(rho)] for picture in exhibit.pictures]
                shown = page.run(cards)
                assert [int(card["kept"]) for card in shown] == [{1.0: 16, 0.6: 9, 0.2: 2}[rho]] * 12
                assert page.run(veils) == [16 - len(view.kept) for view in views]
                assert [card["prediction"] for card in shown] == [NAMES[view.top[0][0]] for view in views]
                for card, view in zip(shown, views, strict=True):
                    assert float(card["probability"]) == pytest.approx(view.top[0][1], abs=1e-4)
                shares = page.run("get('map').data[0].z.flat()")
                assert shares == pytest.approx(exhibit.frequencies[RHOS.index(rho)], abs=1e-4)
                classes = confusion(exhibit, RHOS.index(rho), 4)
                assert page.run("get('right').data[0].x") == [10 * classes[number][number] for number in range(4)]
                assert page.run("get('matrix').data[0].z") == [[part / 10 for part in row] for row in classes]
                mistakes = "[...document.querySelectorAll('#confusions tbody tr')].map(row => row.cells[2].innerText)"
                assert sum(map(int, page.run(mistakes))) == 40 - sum(classes[number][number] for number in range(4))
                seen.append([card["prediction"] for card in shown])
        assert len({tuple(one) for one in seen[:3]}) > 1  # predictions change with rho
        points = page.run("get('throughput').data.map(line => line.x)")
        assert points == [
            [row["images_per_second"] for row in found.rows if row["run"] == run][::-1] for run in ("sampled", "dense")
        ]
        assert page.run("get('throughput').data[0].hovertemplate.includes('images/s')")
        page.run("document.querySelector('input[value=hours]').click()")
        assert max(page.run("get('top1').data[0].x")) < 1  # hours, not steps
        for width in (1200, 400):
            page.resize(width)
            assert page.run("document.documentElement.scrollWidth") <= width
        light = page.run("getComputedStyle(document.body).backgroundColor")
        ink = page.run("get('cost').layout.font.color")
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
        assert page.run("getComputedStyle(document.body).backgroundColor") != light
        assert page.run("new Promise(done => setTimeout(() => done(get('cost').layout.font.color), 300))") != ink
        assert page.errors == []
