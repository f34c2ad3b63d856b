"""Every setting is in `--set help`, with what it takes and what it does."""

from __future__ import annotations

import pytest
from fields import FIELDS

from pss import recipes
from pss.explain import explain, takes, written

SHOWN = {name: list(explain(recipes.get("digits").with_method(name))) for name in ("sampled", "avit", "dynamicvit")}


@pytest.mark.parametrize("method", SHOWN)
def test_all_settings_of_a_run_are_there_once_with_their_docs(method):
    names = [setting.name for setting in SHOWN[method]]
    assert len(names) == len(set(names))
    expected = {field.name for field in FIELDS if field.name.split(".")[0] in {name.split(".")[0] for name in names}}
    assert expected == set(names)
    assert [setting.name for setting in SHOWN[method] if not setting.doc or not setting.takes] == []


def test_every_field_of_every_method_says_what_it_does():
    from pss.methods import METHODS

    for name in METHODS:
        for setting in explain(recipes.get("digits").with_method(name)):
            assert setting.doc.endswith((".", ")")), setting


def test_what_is_shown_may_be_set():
    config = recipes.get("cifar10")
    settings = [f"{one.name}={one.value}" for one in explain(config) if one.reader is None]
    assert config.with_settings(settings) == config


def test_one_that_nothing_reads_names_its_reader():
    readers = {one.name: one.reader for one in SHOWN["sampled"]}
    assert readers["model.own_head"] == "model.weights"
    assert readers["train.epochs"] is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("train.epochs", "integer ≥ 1"),
        ("train.ema_decay", "number in [0, 1)"),
        ("optim.betas", "2 × number in [0, 1)"),
        ("schedule.low", "0.2, 0.4, 0.6, 0.8, 1, or none"),
        ("model.rel_pos", "none, bias, separable, rope"),
        ("model.own_head", "true, false"),
        ("schedule.rhos", "number in (0, 1], …"),
        ("data.rand_augment", "text, or none"),
    ],
)
def test_what_a_setting_takes_is_read_off_its_declaration(name, words):
    assert takes(next(field.hint for field in FIELDS if field.name == name)) == words


def test_values_are_written_as_set_takes_them():
    assert [written(value) for value in ((0.08, 1.0), None, True, 1e-5, 4 / 3, "x", ())] == [
        "0.08,1", "none", "true", "1e-05", repr(4 / 3), "x", "",
    ]  # fmt: skip
