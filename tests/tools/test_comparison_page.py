"""From rows to lines, page, table and pictures, with figures that are known."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from tools import compare_methods, seed_figures
from tools.comparing import arms as known_arms
from tools.comparing.comparison import EPOCHS
from tools.comparing.lines import lines
from tools.comparing.page import as_csv, limits, markdown
from tools.comparing.picture import draw
from tools.figures import dynamicvit, sampling

TOP1 = {"dense": (80.0, 82.0), "quick": (81.0, 85.0)}


def point(rho, top1, seconds):
    return {
        "rho": rho, "knob": "ρ", "top1": top1, "images": 8, "num_images": 20, "seconds_1": [seconds] * 7,
        "seconds_batch": [4 * seconds] * 7, "gflops": 2.0, "gflops_backbone": 1.5, "gflops_extra": 0.5,
        "gflops_total": 2.0,
        "parameters_backbone": 3_000_000, "parameters_extra": 0, "images_per_second": 2 / seconds,
    }  # fmt: skip


def trained():
    made = []
    for column in ("epochs", "time"):
        for arm, before in (("dense", 0), ("quick", 1)):
            for seed, top1 in enumerate(TOP1[arm]):
                log = [
                    {
                        "epoch": n, "loss": 1.0, "val_loss": 1.0, "top1": top1, "train_seconds": 30.0 * (2 - before),
                        "by_rho": {"0.5 stage": {"steps": 3, "ms_per_step": 5.0}, "1": {"steps": 1, "ms_per_step": 9}},
                    }
                    for n in (1, 2)
                ]  # fmt: skip
                speed = 0.5 if arm == "quick" else 1.0
                made.append(
                    {
                        "column": column, "arm": arm, "seed": seed, "run": f"{arm}-s{seed}", "epochs": 2,
                        "epochs_before": before, "seconds": 120.0 - 60 * before, "seconds_before": 30.0 * before,
                        "training_backbone": 1.0, "training_extra": 0.0, "training_teacher": 0.0, "training_step": 3.0,
                        "arithmetic_epochs": 2.0 - before,
                        "points": [point(1.0, top1, speed), point(0.5, top1 - 10, speed / 2)], "log": log,
                    }
                )  # fmt: skip
    return made


@pytest.fixture
def result():
    runs = trained()
    arm = {"note": "", "start": None, "times": 1, "equal_time": True}
    made = {
        "title": "two ways", "plan": {
            "epochs": 2, "seeds": [0, 1], "reference": "dense", "arms": {"dense": arm, "quick": dict(arm)},
            "data": "set", "recipe": "digits", "settings": [], "num_images": 320,
        },
        "equal_time": {"0": {"dense": 2}, "1": {"dense": 2}}, "environment": {"device": "cpu", "threads": "1"},
        "num_images": 320, "num_val_images": 20, "num_classes": 10, "img_size": 32, "batch_size": 8, "published": [],
        "runs": runs, "lines": lines(runs, "dense"),
    }  # fmt: skip
    return made | {"limits": limits(made)}


def test_lines_pair_by_seed_and_within_rounds(result):
    dense, quick = result["lines"][:2]
    assert quick["points"][0]["difference"].mean == 2.0
    assert quick["points"][0]["difference"].deviation == pytest.approx(2**0.5)
    assert quick["points"][0]["rate_of_dense"] == (2.0, 2.0, 2.0)
    assert quick["points"][1]["rate_of_dense"] == (4.0, 4.0, 4.0)  # against dense at its first point
    assert quick["points"][0]["latency_of_dense"] == (0.5, 0.5, 0.5)
    assert quick["points"][0]["images_per_second"] == (4.0, 4.0, 4.0)
    assert quick["time_of_dense"] == [0.75, 0.75]
    assert quick["arithmetic_of_dense"] == 0.5
    assert dense["points"][1]["difference"].mean == -10.0


def test_the_page_and_the_table_say_the_same(result):
    told = markdown(result)
    assert (
        "| quick | 1 + 2 | 83.00 ± 2.83 | +2.00 (-10.71 to +14.71) | 90.0 ± 0.0 s | 0.75 ± 0.00 | 30.0 ± 0.0 s |"
        in told
    )
    assert "| dense | 2 | 81.00 ± 1.41 |  | 2.0 ± 0.0 min | 1 | – |" in told
    assert "quick cannot be trained within the given time" in told
    assert "Not all arms met the training time that they were given (in brackets: at the pace of its runs" in told
    assert "whose speed changed): quick -25% (-25%)." in told
    assert "2 are made, of which one in twenty" in told
    rows = list(csv.DictReader(io.StringIO(as_csv(result))))
    assert [(row["column"], row["arm"], row["point"]) for row in rows][:3] == [
        ("epochs", "dense", "1.0"), ("epochs", "dense", "0.5"), ("epochs", "quick", "1.0"),
    ]  # fmt: skip
    assert (float(rows[2]["top1"]), float(rows[2]["difference_sd"])) == (83.0, pytest.approx(2**0.5))


def test_a_machine_that_has_become_slower_is_told_from_too_many_epochs(result):
    for run in result["runs"]:
        if (run["column"], run["arm"]) == ("time", "quick"):
            run |= {"epochs": 3, "seconds": 120.0, "seconds_before": 40.0}  # a third slower than before
    result["lines"] = lines(result["runs"], "dense")
    (late,) = [line for line in result["lines"] if (line["column"], line["arm"]) == ("time", "quick")]
    assert late["time_of_dense"] == pytest.approx([160 / 120] * 2)
    assert late["time_at_pace"] == [1.0, 1.0]
    assert "quick +33% (+0%)." in limits(result)[-1]
    alone = lines([run for run in result["runs"] if run["column"] == "time"], "dense")
    assert {line["time_at_pace"] for line in alone} == {None}


def test_tables_of_dynamicvit_are_of_arms_of_their_own(result, tmp_path, capsys):
    known = known_arms.read(Path(dynamicvit.__file__).with_suffix(".toml"))
    assert set(known) == {name for one in dynamicvit.FIGURES for name in one.arms}
    for run in result["runs"]:
        run["arm"] = {"dense": "dense", "quick": "ratio-1"}[run["arm"]]
    result["runs"] += [
        run | {"arm": name} for run in trained() if run["arm"] == "quick" for name in ("ratio-2", "ratio-4")
    ]
    result["lines"] = lines(result["runs"], "dense")
    compare_methods.write(result, tmp_path)
    seed_figures.main([str(tmp_path), "--output", str(tmp_path / "made"), "--numbers", "3"])
    told = (tmp_path / "made" / "dynamicvit_ratio.md").read_text()
    assert "| ratio-4 | 83.00 ± 2.83 | 1.5 | 2 | 79.29 | – |" in told
    with pytest.raises(SystemExit):
        seed_figures.main([str(tmp_path), "--output", str(tmp_path / "made"), "--numbers", "4"])
    assert "keep-0.5; compare them; tables have theirs in the arms files of tools/figures/" in capsys.readouterr().err


def test_tables_of_the_sampling_paper_are_of_arms_of_their_own(result, tmp_path):
    own = known_arms.read(Path(sampling.__file__).with_suffix(".toml"))
    assert set(own) == {name for one in sampling.FIGURES for name in one.arms} - {"pss", "dynamicvit"}
    for old, new in (("dense", "bias-without"), ("quick", "bias-with")):
        result["runs"] += [
            run | {"arm": name} for run in trained() if run["arm"] == old for name in (new, f"{new}-pss")
        ]
    result["lines"] = lines(result["runs"], "dense")
    compare_methods.write(result, tmp_path)
    seed_figures.main([str(tmp_path), "--output", str(tmp_path / "made"), "--numbers", "29"])
    told = (tmp_path / "made" / "pss_table3.md").read_text()
    assert "| bias-with-pss | 83.00 ± 2.83 | 1.00 ± 0.00 | 80.4 |" in told


def test_figures_of_a_comparison_with_their_manifest(result, tmp_path, capsys):
    compare_methods.write(result, tmp_path / "out")
    told = seed_figures.main([str(tmp_path / "out"), "--output", str(tmp_path / "figures")])
    for one in told["figures"]:
        content = (tmp_path / "figures" / one["file"]).read_bytes()
        assert content.startswith(b"\x89PNG" if one["file"].endswith(".png") else b"# two ways")
        assert one["n"] == 2
        assert one["command"].startswith("python -m tools.compare_methods --data set")
    assert not {number for one in told["figures"] for number in one["numbers"]} & set(told["left"])
    page = (tmp_path / "figures" / "figures.md").read_text()
    assert "PSS figure 4 (numbers 24)" in page
    assert "Numbers 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11" in page
    kept = json.loads((tmp_path / "figures" / "figures.json").read_text())
    assert kept == told
    with pytest.raises(SystemExit):
        seed_figures.main([str(tmp_path / "out"), "--output", str(tmp_path / "figures"), "--numbers", "14"])
    assert (
        "no figure 14 can be made; there are 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 15, 16, 17, 18, 19, 20"
        in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        seed_figures.main([str(tmp_path), "--output", str(tmp_path / "figures")])
    assert "name the --output of a finished tools.compare_methods" in capsys.readouterr().err


def test_every_number_has_a_maker_whose_arms_are_in_the_files():
    assert {number for one in seed_figures.FIGURES for number in one.numbers} == set(seed_figures.WANTED)
    known = set(known_arms.read(known_arms.BUILT_IN))
    for path in seed_figures.ARMS_FILES:
        known |= set(known_arms.read(path))
    assert {name for one in seed_figures.FIGURES for name in one.arms} <= known


def test_training_for_the_figures_is_one_comparison_of_all_arms(result, tmp_path, monkeypatch, capsys):
    asked = []

    def compare(words, columns):
        assert columns == [EPOCHS]  # what figures are made of
        asked.extend(words)
        compare_methods.write(result, tmp_path / "out")

    monkeypatch.setattr(compare_methods, "main", compare)
    seed_figures.main([str(tmp_path / "out"), "--output", str(tmp_path / "made"), "--data", "set", "--epochs", "3"])
    assert asked[: asked.index("--arms-file")] == [
        "--data", "set", "--output", str(tmp_path / "out"), "--recipe", "digits", "--epochs", "3", "--turn", "3",
        "--seeds", "0", "1", "--rounds", "3",
    ]  # fmt: skip
    assert [Path(word).stem for word in asked[asked.index("--arms-file") + 1 :]] == [
        "dynamicvit", "sampling", "sparsifiner", "svite",
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        seed_figures.main([str(tmp_path / "out"), "--output", str(tmp_path / "made"), "--epochs", "3"])
    assert "--epochs is of what is trained; name --data too" in capsys.readouterr().err


def test_arms_of_twice_the_epochs_and_at_equal_epochs_only_are_told_as_such(result):
    result["plan"]["arms"]["quick"] |= {"times": 2, "equal_time": False}
    page = markdown(result)
    assert "But quick, for 2 times as many." in page
    assert "cannot be trained within the given time" not in " ".join(limits(result))
    result["lines"] = [line for line in result["lines"] if (line["arm"], line["column"]) != ("quick", "time")]
    assert any("; 1 are made," in line for line in limits(result))


def test_a_comparison_at_equal_epochs_only_has_that_table_and_that_mark(result):
    own = [run for run in result["runs"] if run["column"] == "epochs"]
    result |= {"runs": own, "lines": lines(own, "dense"), "equal_time": {}}
    page = markdown(result)
    assert "## Equal epochs" in page
    assert "qual training time" not in page
    assert any("; 1 are made," in line for line in limits(result))
    assert draw(result).startswith(b"\x89PNG")
