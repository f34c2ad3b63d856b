"""The plan of a batch on a GPU: every image's steps in order, every layer's list of images, and few launches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.augment import RandAugment, RandAugmentSpec, RandomErasing, ThreeAugment
from pipelines.augment.operations import Op
from pipelines.augment.plan import BLUR_COLUMNS, FRESH, HEAD, LAYER, Kind, layers_of, make_plan, num_launches

STEPS = {op: [int(op)] for op in Op} | {
    Op.NONE: [],
    Op.TRANSLATE_X: [Op.SHEAR_X],
    Op.TRANSLATE_Y: [Op.SHEAR_Y],
    Op.BLUR: [Op.BLUR, BLUR_COLUMNS],
}
"""What the kernels carry out for each operation."""
COUNTED = {Op.AUTO_CONTRAST, Op.EQUALIZE, Op.CONTRAST}
TABLED = COUNTED | {Op.INVERT, Op.POSTERIZE, Op.SOLARIZE, Op.SOLARIZE_ADD, Op.BRIGHTNESS}


@given(
    lists=st.integers(1, 6).flatmap(
        lambda layers: st.lists(
            st.lists(st.sampled_from(list(Op)), min_size=layers, max_size=layers), min_size=1, max_size=8
        )
    )
)
@settings(max_examples=200)
def test_every_image_takes_its_steps_and_is_listed_where_it_does(lists: list[list[Op]]) -> None:
    operations = np.array(lists, dtype=np.int64).T
    plan = make_plan(len(lists), operations, np.full(operations.shape, 0.5))
    layers = plan.table[:, HEAD:].reshape(len(lists), -1, LAYER)
    words, listed = layers[:, :, 0], layers[:, :, 4]
    first = (words >= FRESH).argmax(axis=1)
    assert ((words >= FRESH).sum(axis=1) == 1).all()
    for image, (own, wanted) in enumerate(zip(words % FRESH, lists, strict=True)):
        expected = [step for op in wanted for step in STEPS[op]] or [Op.NONE]
        assert own[first[image] :].tolist() == expected
        assert not own[: first[image]].any()
    ends = layers_of(plan.ends)
    assert len(ends) == layers.shape[1]
    for number, (counted, tabled, pointwise, gathered) in enumerate(ends):
        order = listed[:, number]
        assert sorted(order) == list(range(len(lists)))
        steps = words[order, number] % FRESH
        active = first[order] <= number
        assert active.tolist() == [True] * gathered + [False] * (len(lists) - gathered)
        assert set(steps[:counted]) <= COUNTED
        assert set(steps[counted:tabled]) <= TABLED - COUNTED
        assert set(steps[tabled:pointwise]) <= {Op.COLOR, Op.NONE}
        assert not set(steps[pointwise:gathered]) & (TABLED | {Op.COLOR, Op.NONE})
        assert gathered > 0
    assert ends[-1][-1] == len(lists)


def test_parameters_of_the_steps() -> None:
    operations = np.array([[Op.SHEAR_X, Op.TRANSLATE_Y, Op.ROTATE, Op.POSTERIZE, Op.SOLARIZE, Op.BLUR, Op.NONE]])
    arguments = np.array([[0.3, -7.0, 90.0, 3.0, 128.0, 1.0, 5.0]])
    plan = make_plan(7, operations, arguments)
    layers = plan.table[:, HEAD:].reshape(7, 2, LAYER)
    values = np.ascontiguousarray(layers[:, :, 1:4]).view(np.float64)
    np.testing.assert_allclose(values[:5, 1, :2], [[0.3, 0], [0, -7], [0, 1], [0b11100000, 0], [128, 0]], atol=1e-12)
    box = values[5, 1]
    assert box[0] + 2 * box[1:].sum() == pytest.approx(1)
    np.testing.assert_array_equal(values[5, 0], box)
    assert layers[5, :, 0].tolist() == [Op.BLUR + FRESH, BLUR_COLUMNS]


def test_flips_and_rectangles_lie_at_the_head() -> None:
    rectangles = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    plan = make_plan(3, flips=np.array([True, False, True]), erased=(np.array([2, 0]), rectangles, np.array([-9, 11])))
    assert plan.table[:, :HEAD].tolist() == [[1, 5, 6, 7, 8, 11], [0] * 6, [1, 1, 2, 3, 4, -9]]
    assert num_launches(plan.ends) == 1
    assert layers_of(plan.ends) == [(0, 0, 3, 3)]
    assert len(layers_of(plan.ends)[0]) == Kind.IDLE


@pytest.mark.parametrize("num", [256, 1024])
def test_recipes_take_few_launches(num: int) -> None:
    """Whatever the batch; torch's form takes hundreds."""
    rand_augment = RandAugment(
        RandAugmentSpec.parse("rand-m9-mstd0.5-inc1-n2"), seed=0, fill=(1, 2, 3), interpolation="bicubic"
    )
    index = np.arange(num)
    erased = RandomErasing(0.25, seed=0).draw(index, 1, 224)
    for augment, most in ((rand_augment, 9), (ThreeAugment(seed=0), 14)):
        plan = make_plan(num, *augment.draw(index, 1, 224), erased=erased)
        assert num_launches(plan.ends) == most
