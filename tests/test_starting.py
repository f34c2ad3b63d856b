"""What is held against settings where a run starts: its shapes, its steps, its folders and its machine."""

from __future__ import annotations

import pytest

from pipelines.storage.manifest import MapsEntry
from pss import methods, recipes
from pss.config import ScheduleConfig
from pss.methods.sampled import build_schedule
from pss.planning.plan import plan
from pss.starting import check_folders, check_machine, check_maps, check_shapes, check_steps


def config(*settings, recipe="digits"):
    return recipes.get(recipe).with_settings(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.img_size=33"], r"data.img_size is 33 pixels, .* set data.img_size=32"),
        (["data.img_size=7", "model.patch_size=16"], r"data.img_size is 7 pixels, .* set data.img_size=16"),
        (["model.patch_size=none"], None),
        (["model.num_heads=none", "model.embed_dim=50"], r"model.embed_dim is 50, which 3 heads .* model.embed_dim=51"),
        (["model.embed_dim=none", "model.num_heads=5"], r"model.embed_dim is 192, which 5 heads"),
        (["model.rel_pos=rope", "model.embed_dim=90"], r"model.rel_pos is rope, .* set model.embed_dim=96"),
        (["model.name=deit_tiny_distilled_patch16_224"], r"model.global_pool=avg"),
        (["data.progressive.start_size=20", "data.progressive.end_epoch=2"], r"data.progressive.start_size is 20"),
        (
            ["data.img_size=64", "data.progressive.start_size=16", "data.progressive.end_epoch=6",
             "data.progressive.multiple=4"],
            r"data.progressive, .* images of \d+ pixels, .* set data.progressive.multiple=8",
        ),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_named_by_their_settings(settings, message):
    if message is None:
        check_shapes(config(*settings))
        return
    with pytest.raises(ValueError, match=message) as refused:
        check_shapes(config(*settings))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_every_recipe_has_shapes_that_fit(recipe):
    check_shapes(config(recipe=recipe))


def test_lengths_are_compared_with_the_steps_there_are():
    with pytest.raises(ValueError, match=r"optim.warmup_epochs is 0.01, .* the 44 steps of an epoch"):
        check_steps(config("optim.warmup_epochs=0.01"), 44)
    with pytest.raises(ValueError, match=r"optim.cooldown_epochs is 0.001"):
        check_steps(config("optim.cooldown_epochs=0.001"), 44)
    with pytest.raises(ValueError, match=r"schedule.period_steps is 2,201, and the run has 2,200 steps"):
        check_steps(config("schedule.period_steps=2201"), 44)
    with pytest.raises(ValueError, match=r"the run has 1,760 steps before its cooldown"):
        check_steps(config("schedule.period_steps=2200", "schedule.cooldown_epochs=10"), 44)
    check_steps(config("schedule.period_steps=2200", "optim.warmup_epochs=0.02"), 44)


def test_a_run_has_a_folder_of_its_own(tmp_path, monkeypatch):
    data = tmp_path / "data"
    (data / "train" / "cat").mkdir(parents=True)
    (tmp_path / "link").symlink_to(data)
    monkeypatch.chdir(tmp_path)
    for output, message in (
        (tmp_path, "current folder"), (data, "is the data set itself"), (tmp_path / "link", "is the data set itself"),
        (data / "train" / "run", "inside the data set"), (tmp_path / "link" / "run", "inside the data set"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            check_folders(data, output)
    notes = tmp_path / "notes"
    notes.mkdir()
    check_folders(data, notes)  # empty
    (notes / "slurm-1.out").write_text("a scheduler's")
    check_folders(data, notes)
    for name in ("thesis.tex", "b", "c", "d"):
        (notes / name).write_text("mine")
    with pytest.raises(ValueError, match=r"holds other things \(b, c, d and 1 more\); name a new folder"):
        check_folders(data, notes)
    (notes / "config.json").write_text("{}")  # what is wrong with that, a run's own check says
    check_folders(data, notes)
    check_folders(data, tmp_path / "new" / "run")


GPU, CPU = {"device": "cuda", "backends": {"dali"}}, {"device": "cpu", "backends": {"torch"}}


@pytest.mark.parametrize(
    ("setting", "machine", "reader"),
    [
        ("data.gpu_decoding.pipelines=2", GPU, None),
        ("data.gpu_decoding.pipelines=2", CPU, "--loader dali on a GPU"),
        ("data.gpu_decoding.cpu_share=0.2", GPU | {"backends": {"torch"}}, "--loader dali on a GPU"),
        ("data.gpu_decoding.cpu_share=0.2", GPU | {"backends": {"ffcv", "dali"}}, None),  # validation is DALI's
        ("data.gpu_decoding.cpu_share=0.2", CPU | {"backends": {"dali"}}, "--loader dali on a GPU"),
        ("compile.max_graphs=4", GPU, None),
        ("compile.max_graphs=4", CPU, "compile.mode=on, or auto on a GPU"),
        ("compile.backend=aot_eager", CPU, "compile.mode=on, or auto on a GPU"),
        # A job may come back with one process.
        ("train.timeout_seconds=60", CPU, None),
        ("train.parallel=fsdp", CPU, None),
    ],
)
def test_what_only_another_machine_reads_is_refused_where_it_was_asked_for(setting, machine, reader):
    check_machine(config(setting), [], **machine)  # brought along by a recipe, say
    if reader is None:
        check_machine(config(setting), [setting], **machine)
        return
    with pytest.raises(ValueError, match=f"{setting.split('=')[0]} is .*{reader}"):
        check_machine(config(setting), [setting], **machine)


# Which rho comes when.


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ([], "ρ: cyclic 0.2→1.0 within each epoch of 45 steps"),
        (["schedule.cooldown_epochs=10"], "ρ: cyclic 0.2→1.0 within each epoch of 45 steps, then 10 epochs at 1.0"),
        (["schedule.period_steps=9", "schedule.low=0.4", "schedule.shuffle=true"],
         "ρ: cyclic 0.4→1.0 every 9 steps in random order"),
        (["schedule.name=fixed"], "ρ: 0.6 throughout"),
        (["schedule.name=fixed", "schedule.rho=0.4", "schedule.cooldown_epochs=1"], "ρ: 0.4, then 1 epoch at 1.0"),
        (["schedule.name=linear", "schedule.cooldown_epochs=5"],
         "ρ: linear 0.2→1.0 over 45 epochs, then 5 epochs at 1.0"),
        (["schedule.name=cosine", "schedule.form=cut", "schedule.cooldown_epochs=5"],
         "ρ: cosine 0.2→1.0 over 50 epochs (cut), then 5 epochs at 1.0"),
        (["schedule.name=list", "schedule.rhos=0.5,1"], "ρ: the list 0.5, 1.0 over and over, one a step"),
        (["schedule.name=stages"], "ρ: 0.4 for 35 epochs, then 1.0 for 15 epochs"),
        (["schedule.name=stages", "schedule.rhos=0.4,0.6,1", "schedule.lengths=0.5,0.25,0.25", "train.epochs=11",
          "schedule.cooldown_epochs=1"],
         "ρ: 0.4 for 5 epochs, then 0.6 for 2.51 epochs, then 1.0 for 2.49 epochs, then 1 epoch at 1.0"),
        (["schedule.cooldown_epochs=50"], "ρ: 1.0 throughout (schedule.cooldown_epochs=50 is the whole run)"),
        (["method=dense"], "ρ: 1 throughout"),
    ],
)  # fmt: skip
def test_the_course_says_which_rho_comes_when(settings, told):
    assert methods.build(config(*settings), 10, 45).course() == told


def test_a_method_with_stages_of_its_own_has_a_course(monkeypatch):
    stages = {0: 0.5, 1: 0.25}
    dense = methods.METHODS["dense"]
    monkeypatch.setattr(dense, "stage", lambda method, at: methods.Stage(stages.get(at.epoch, 1.0)))
    made = methods.build(config("method=dense", "train.epochs=4"), 10, 3)
    assert made.course() == "ρ: 0.25 to 1, 3 levels"


@pytest.mark.parametrize(
    "chosen",
    [
        {"name": "fixed", "rho": 0.4},
        {"name": "list", "rhos": (0.4, 0.4)},
        {"name": "stages", "rhos": (0.4, 0.4), "lengths": (2, 5)},
    ],
)
@pytest.mark.parametrize("cooled", [1, 3])
def test_a_cooldown_ends_every_schedule(chosen, cooled):
    """Four tenths, then all patches: it was trained at four tenths to the end."""
    run = config("train.epochs=5")
    schedule = build_schedule(run, ScheduleConfig(**chosen, cooldown_epochs=cooled), 7)
    assert [schedule(step) for step in range(35)] == [0.4] * (35 - 7 * cooled) + [1.0] * 7 * cooled


def test_a_fixed_schedule_with_a_cooldown_is_planned_so():
    chosen = ["schedule.name=fixed", "schedule.rho=0.4", "schedule.cooldown_epochs=3", "train.epochs=12"]
    planned = plan(config(*chosen), num_images=320, num_classes=10)
    assert [(level.rho, level.share) for level in planned.levels] == [(0.4, 0.75), (1.0, 0.25)]
    assert planned.cooldown_epochs == 3
    assert planned.course == "ρ: 0.4, then 3 epochs at 1.0"
    section = config(*chosen).section_of(ScheduleConfig)
    assert list(section.evened(10)) == []  # a constant cannot be shuffled


@pytest.mark.parametrize("lengths", [(), (0.75, 0.25), (3, 1)])
def test_stages_are_planned_with_their_lengths(lengths):
    chosen = ["schedule.name=stages", "schedule.rhos=0.4,1", "train.epochs=12"]
    if lengths:
        chosen.append(f"schedule.lengths={','.join(map(str, lengths))}")
    planned = plan(config(*chosen), num_images=320, num_classes=10)
    short = 0.75 if lengths else 0.5
    assert [(level.rho, level.share) for level in planned.levels] == [(0.4, short), (1.0, 1 - short)]
    assert planned.rhos[0] == 0.4
    assert planned.cooldown_epochs == 12 * (1 - short)
    assert list(config(*chosen).section_of(ScheduleConfig).evened(10)) == []


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["schedule.lengths=1,2,3"], r"schedule.lengths has 3 numbers for 2 stages \(schedule.rhos=0.4,1.0\)"),
        (["schedule.rhos=0.4,0.6,1", "schedule.lengths=2,1"], "schedule.lengths has 2 numbers for 3 stages"),
        (["schedule.lengths=10000,1"], r"stage 2 of schedule.name=stages \(rho 1.0\) has no step among the 500"),
        (["schedule.lengths=0,1"], "schedule.lengths"),
    ],
)
def test_stages_that_do_not_fit_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        check_steps(config("schedule.name=stages", *settings), 10)


def test_a_plan_of_too_many_steps_is_refused_before_it_begins():
    with pytest.raises(ValueError, match=r"has 40,000,000,000 steps, .* set train.max_steps="):
        plan(config("train.epochs=1000000"), num_images=1_280_000)


@pytest.mark.parametrize(
    ("covers", "geometry", "named", "refused"),
    [
        ("square", "whole", "auto", True),
        ("square", "reference", "auto", False),
        ("whole", "whole", "auto", False),
        ("square", "whole", "mine.npy", False),  # nobody has said what that file is of
    ],
)
def test_label_maps_are_of_the_part_of_the_images_that_the_run_takes_them_for(covers, geometry, named, refused):
    settings = [f"data.label_maps={named}", "model.name=lvvit_s", "model.global_pool=token", "method=dense"]
    run = config(*settings, *([f"tokens.label_geometry={geometry}"] if geometry != "whole" else []))
    maps = {"train": MapsEntry("train.maps.1.npy", "timm:x", "0", 224, covers, (4, 4), 5, 10, 0.9)}
    if refused:
        with pytest.raises(ValueError, match=r"train.maps.1.npy .*central squares.* tokens.label_geometry=reference"):
            check_maps(run, maps)
    else:
        check_maps(run, maps)
    check_maps(run, {})
    check_maps(config(), maps)
