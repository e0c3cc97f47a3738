"""Halves and supports of the identity protocol."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest

from featstore.errors import InvalidInputError, NotFoundError
from heads.protocol.design import (
    ALL,
    check_folds,
    choose_validation,
    make_design,
    parse_shots,
)


@dataclass(frozen=True)
class Instance:
    image_key: str
    group: str


def instances(n_images, *, each=1, n_groups=None):
    """`each` instances of every image; groups of several images where `n_groups` is given."""
    return [
        Instance(image_key=f"i{n:03}", group=f"g{n % n_groups if n_groups else n:03}")
        for n in range(n_images)
        for _ in range(each)
    ]


def images_of(found, numbers):
    return {found[number].image_key for number in numbers}


def test_the_halves_share_no_image_and_leave_none_out():
    found = instances(21, each=3)
    design = make_design("fox", found, n_seeds=4)
    for seed in range(4):
        support = design.support(ALL, seed)
        assert sorted((*design.test, *support)) == list(range(63))
        assert not images_of(found, design.test) & images_of(found, support)
    assert len(images_of(found, design.test)) == 11
    assert design.n_images == 10


def test_supports_are_nested_and_hold_all_instances_of_their_images():
    found = instances(40, each=2)
    design = make_design("fox", found, n_seeds=3)
    for seed in range(3):
        sizes = [design.support(shots, seed) for shots in (0, 1, 5, 10, ALL)]
        assert [len(support) for support in sizes] == [0, 2, 10, 20, 40]
        assert all(set(small) < set(large) for small, large in itertools.pairwise(sizes))
        assert images_of(found, sizes[1]) == {found[sizes[1][0]].image_key}


def test_seeds_draw_other_supports_from_one_half():
    design = make_design("fox", instances(40), n_seeds=10)
    assert len({design.support(5, seed) for seed in range(10)}) == 10
    assert len({frozenset(design.support(ALL, seed)) for seed in range(10)}) == 1


def test_more_seeds_keep_the_first_ones_and_another_seed_changes_the_halves():
    found = instances(40)
    few, many = (make_design("fox", found, n_seeds=n) for n in (2, 5))
    assert few.drawn == many.drawn[:2]
    assert few.test == many.test
    assert make_design("fox", found, n_seeds=2, seed=1).test != few.test
    assert make_design("cow", found, n_seeds=2).test != few.test


def test_the_design_does_not_depend_on_the_order_of_the_instances():
    found = instances(12, each=2)
    turned = found[::-1]
    one, other = (make_design("fox", each, n_seeds=2) for each in (found, turned))
    assert images_of(found, one.test) == images_of(turned, other.test)
    assert images_of(found, one.support(3, 1)) == images_of(turned, other.support(3, 1))


def test_no_video_is_cut_but_one_video_alone_is():
    found = instances(40, n_groups=8)
    design = make_design("fox", found, n_seeds=1)
    groups = [
        {found[n].group for n in numbers} for numbers in (design.test, design.support(ALL, 0))
    ]
    assert not groups[0] & groups[1]
    assert design.n_images == 20
    assert design.has(20)
    assert not design.has(21)
    alone = make_design("fox", instances(6, n_groups=1), n_seeds=1)
    assert (len(alone.test), alone.n_images) == (3, 3)


def test_too_few_images_are_refused_with_their_number():
    with pytest.raises(InvalidInputError, match="fox has 3 marked instances in 1 image"):
        make_design("fox", instances(1, each=3), n_seeds=1)
    design = make_design("fox", instances(8), n_seeds=1)
    with pytest.raises(InvalidInputError, match="at most 4 for fox"):
        design.support(5, 0)


def test_shots_are_numbers_or_all():
    assert parse_shots(["0", " 5", "all"]) == (0, 5, ALL)
    for wrong in (["five"], ["-1"], [], ["1", "1"]):
        with pytest.raises(InvalidInputError, match="shots"):
            parse_shots(wrong)


def test_what_is_held_out_must_be_there_and_leave_enough():
    known = ["cow", "dog", "fox", "hare"]
    check_folds([["fox"], ["hare"]], known)
    with pytest.raises(NotFoundError, match="Did you mean 'fox'"):
        check_folds([["foxx"]], known)
    with pytest.raises(InvalidInputError, match="2 are left"):
        check_folds([["fox"], ["cow", "dog"]], known)
    with pytest.raises(InvalidInputError, match="one or more identities"):
        check_folds([[]], known)


def test_the_validation_identity_is_the_smallest_that_has_all_shots():
    counts = {"cow": 100, "dog": 41, "fox": 40, "hare": 12}
    assert choose_validation(counts, ["cow"], (0, 20, ALL)) == "fox"
    assert choose_validation(counts, ["fox"], (0, 20, ALL)) == "dog"
    assert choose_validation(counts, ["fox"], (0, 5)) == "hare"
    assert choose_validation(counts, [], (200,)) == "cow"
