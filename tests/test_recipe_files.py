"""Recipes in files say what the same settings on the command line say, or are refused in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pss import recipes
from pss.recipes import files, own

ALL = sorted(recipes.RECIPES)


@pytest.fixture(autouse=True)
def _no_own_recipes(tmp_path, monkeypatch):
    monkeypatch.setenv(own.FOLDERS, str(tmp_path / "none"))


def put(folder, name, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


@pytest.mark.parametrize("name", ALL)
def test_a_recipe_that_was_shown_is_the_recipe(tmp_path, name):
    config = recipes.get(name)
    assert recipes.get(put(tmp_path, "shown.yaml", files.write(config))) == config
    assert recipes.get(put(tmp_path, "config.json", config.to_json())) == config


SETTINGS = {
    "train.epochs": st.integers(6, 90),
    "train.batch_size": st.sampled_from([64, 512]),
    "optim.lr": st.sampled_from(["1e-3", "0.002", "5E-4"]),
    "optim.clip_grad": st.sampled_from(["none", "1.0"]),
    "model.drop_path_rate": st.floats(0, 0.5).map(lambda value: round(value, 3)),
    "model.init": st.sampled_from(["none", "timm", "published"]),
    "data.crop_scale": st.sampled_from(["0.3,1", "0.08,1.0"]),
    "data.three_augment": st.booleans(),
    "compile.mode": st.sampled_from(["auto", "off"]),
    "method": st.sampled_from(["dense", "sampled", "toe"]),
}


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chosen=st.fixed_dictionaries({}, optional=SETTINGS), kind=st.sampled_from(["yaml", "toml", "json", "flat"]))
def test_a_file_says_what_set_says(tmp_path, chosen, kind):
    expected = recipes.get("cifar10").with_settings([f"{key}={written(value)}" for key, value in chosen.items()])
    tree = {"base": "cifar10", "recipe": "cifar10"}
    for key, value in chosen.items():
        branch = tree
        *sections, last = [key] if kind == "flat" else key.split(".")
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[last] = value
    text = {"yaml": yaml_of, "flat": yaml_of, "toml": toml_of, "json": json.dumps}[kind](tree)
    suffix = "yaml" if kind == "flat" else kind
    assert recipes.get(put(tmp_path, f"one.{suffix}", text)) == expected


def written(value):
    return str(value).lower() if isinstance(value, bool) else str(value)


def yaml_of(tree, indent=""):
    lines = []
    for key, value in tree.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", yaml_of(value, indent + "  ")]
        else:
            shown = f"[{value}]" if isinstance(value, str) and "," in value else written(value)
            lines.append(f"{indent}{key}: {shown}")
    return "\n".join(lines)


def toml_of(tree, prefix=""):
    own_lines = [f"{key} = {json.dumps(value)}" for key, value in tree.items() if not isinstance(value, dict)]
    below = [toml_of(value, f"{prefix}{key}.") for key, value in tree.items() if isinstance(value, dict)]
    head = [f"[{prefix[:-1]}]"] if prefix else []
    return "\n".join([*head, *own_lines, *below])


def test_a_base_is_another_file_or_a_recipe(tmp_path):
    put(tmp_path, "first.yaml", "base: deit-s-224\ntrain:\n  epochs: 100\n")
    second = recipes.get(put(tmp_path, "second.toml", 'base = "first.yaml"\nmethod = "dense"\n'))
    assert (second.recipe, second.train.epochs, second.method) == ("second", 100, "dense")
    assert second.model == recipes.get("deit-s-224").model


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {epochs: 3}", "has no method, and no base"),
        ("base: deit-s-225", "no recipe 'deit-s-225'; did you mean deit-s-224"),
        ("base: bad.yaml", "its own base"),
        ("base: missing.yaml", "missing.yaml not found"),
        ("base: [a, b]", "write the name of a recipe"),
        ("base: digits\nrecipe: ''", "recipe is ''"),
        ("base: digits\ntrain: {epoch: 3}", "did you mean train.epochs"),
        ("base: digits\ntrain: {epochs: soon}", "train.epochs=soon: train.epochs is 'soon'"),
        ("base: digits\ntrain: {epochs: 3, epochs: 4}", "'epochs' is there twice"),
        ("base: digits\ntrain: {epochs: }", "train.epochs is ''"),
        ("base: digits\ntrain: {epochs: {a: 1}}", "no key 'train.epochs.a'"),
        ("base: digits\ntrain: 4", "no key 'train'"),
        ("base: digits\ntrain: [[1, 2], 3]", "write one value, or a list of values"),
        ("base: digits\nschedule: {rho: 0.5}", "which nothing reads"),
        ("base: digits\ntoe: {rate: 0.5}", "toe has it: --set method=toe"),
        ("base: &a digits\ntrain: {epochs: *a}", "aliases"),
        ("base: !!python/object/apply:os.system ['touch hacked']", "base is"),
        ("a: [", "is no YAML file"),
        ("- 1", "holds no settings by name"),
        ("", "holds no settings by name"),
        ("[" * 5000, "bad.yaml"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_sentence_that_names_it(tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"bad\.yaml|missing\.yaml") as told:
        recipes.get(put(tmp_path, "bad.yaml", text))
    assert words in str(told.value)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(("suffix", "text"), [("json", '{"base": "digits", "base": "cifar10"}'), ("toml", "base = ")])
def test_other_kinds_of_files_are_as_strict(tmp_path, suffix, text):
    with pytest.raises(ValueError, match=rf"is no {suffix.upper()} file"):
        recipes.get(put(tmp_path, f"bad.{suffix}", text))


def test_one_of_a_later_version_is_refused(tmp_path):
    with pytest.raises(ValueError, match="written by a later version"):
        recipes.get(put(tmp_path, "config.json", json.dumps({"format": 99, "version": "9", "base": "digits"})))


def test_recipes_of_a_folder_and_of_packages_go_by_their_names(tmp_path, monkeypatch):
    put(tmp_path / "mine", "short.yaml", "base: digits\ntrain:\n  epochs: 7\n")
    monkeypatch.setenv(own.FOLDERS, str(tmp_path / "mine"))
    assert recipes.get("short").train.epochs == 7
    assert recipes.summaries()["short"] == str(tmp_path / "mine" / "short.yaml")
    put(tmp_path / "site", "their_recipes.py", "from pss.recipes import digits\n\ndef theirs():\n    return digits()\n")
    points = "[pss.recipes]\ntheirs = their_recipes:theirs\nshort = their_recipes:theirs\nodd = json:dumps\n"
    put(tmp_path / "site" / "theirs-1.dist-info", "entry_points.txt", points)
    put(tmp_path / "site" / "theirs-1.dist-info", "METADATA", "Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert recipes.get("theirs") == recipes.get("digits")
    assert recipes.get("their_recipes:theirs") == recipes.get("digits")
    with pytest.raises(ValueError, match="are both called short"):
        recipes.get("short")
    put(tmp_path / "mine", "digits.yaml", "base: cifar10\n")
    with pytest.raises(ValueError, match=r"digits is a recipe of pss, and .* has its name"):
        recipes.get("digits")


def test_the_home_folder_is_where_others_look(tmp_path, monkeypatch):
    monkeypatch.delenv(own.FOLDERS)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    put(tmp_path / "pss" / "recipes", "short.yaml", "base: digits\n")
    assert recipes.get("short").train == recipes.get("digits").train


def test_a_list_of_recipes_needs_no_torch():
    code = "import sys; from pss import recipes; assert recipes.summaries(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
