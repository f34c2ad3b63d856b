"""The report, as a browser without a network shows it."""

from __future__ import annotations

import json
import re

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
