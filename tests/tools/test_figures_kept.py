"""Figures of what models keep are made of a comparison's runs, and show what the models do."""

from __future__ import annotations

import pytest
import torch
from memory_loader import fit

from pss import recipes
from pss.inference.exhibit import View
from pss.inference.opening import load_run
from pss.runtime.processes import World
from tools.figures import kept
from tools.figures.figure import Source

HERE = World(rank=0, size=1, device=torch.device("cpu"))
TINY = ["model.embed_dim=24", "train.epochs=1", "train.batch_size=8", "optim.warmup_epochs=0", "data.prefetch_gb=0"]
ARMS = {"dense": "dense", "pss": "sampled", "dynamicvit": "dynamicvit"}


@pytest.fixture(scope="module")
def source(tmp_path_factory, converted_root):
    """A comparison with three short runs."""
    folder, runs = tmp_path_factory.mktemp("comparison"), []
    for arm, method in ARMS.items():
        config = recipes.get("digits").with_settings([*TINY, f"method={method}"])
        run = folder / "runs" / f"{arm}-s0"
        fit(config, run)
        runs.append({"column": "epochs", "arm": arm, "seed": 0, "run": run.name})
    told = {"data": str(converted_root), "recipe": "digits", "settings": [], "num_images": 320}
    return Source(folder, {"runs": runs, "plan": told, "num_classes": 4})


def test_every_figure_is_a_picture_of_its_arms(source):
    for figure in kept.FIGURES:
        assert figure.can_be_made(source)
        assert figure.make(source).startswith(b"\x89PNG")
    alone = Source(source.folder, source.result | {"runs": source.result["runs"][:1]})
    assert not any(figure.can_be_made(alone) for figure in kept.FIGURES)


def test_what_is_seen_is_what_the_model_keeps(source):
    exhibit, classes = kept.seen(source, "pss", (1.0, 0.4))
    method = load_run(source.folders("pss")[0], HERE.device).method
    assert classes == list("abcd")
    assert set(exhibit.frequencies[0]) == {1.0}
    patches = exhibit.grid[0] * exhibit.grid[1]
    tokens = method.tokens(0.4)[0] - method.model.num_prefix_tokens
    assert sum(exhibit.frequencies[1]) == pytest.approx(tokens)
    assert [len(view.kept) for view in exhibit.pictures[0].views] == [patches, tokens]


def test_patches_that_are_not_kept_are_grey_and_others_are_as_they_were():
    pixels = torch.arange(3 * 4 * 4, dtype=torch.uint8).view(3, 4, 4)
    view = View(kept=[1, 2], depths=None, top=[(0, 1.0)])
    shown = kept.blanked(pixels, kept.kept_of(view, (2, 2)))
    assert torch.equal(shown[:, :2, 2:], pixels[:, :2, 2:])
    assert torch.equal(shown[:, 2:, :2], pixels[:, 2:, :2])
    assert set(shown[:, :2, :2].flatten().tolist()) == set(shown[:, 2:, 2:].flatten().tolist()) == {175, 225}
