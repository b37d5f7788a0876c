"""The grammar of names: numbers, items, patterns, near names."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grl_surgery import Edge, points
from grl_surgery.errors import AmbiguousPointError, PointNotFoundError, SurgeryError

names = st.text(alphabet="ab#_1.", min_size=1, max_size=6)


def test_a_name_that_occurs_once_carries_no_number():
    assert points.number([[("conv", 1), ("relu", 2)]]) == [["conv", "relu"]]


def test_what_occurs_twice_is_numbered_in_order():
    assert points.number([[("relu", 1), ("conv", 2), ("relu", 1)]]) == [["relu#1", "conv", "relu#2"]]


def test_the_same_thing_has_the_same_name_in_both_modes():
    train = [("conv", 1), ("relu", 2), ("aux", 4), ("relu", 4), ("fc", 5), ("relu", 6)]
    in_train, in_eval = points.number([train, [step for step in train if step[1] != 4]])
    assert in_train == ["conv", "relu#1", "aux", "relu#2", "fc", "relu#3"]
    assert in_eval == ["conv", "relu#1", "fc", "relu#3"]


@given(st.lists(names, max_size=12))
def test_numbered_names_never_collide_whatever_the_modules_are_called(bases):
    (numbered,) = points.number([[(points.escape(base), line) for line, base in enumerate(bases)]])
    assert len(set(numbered)) == len(bases)


@given(names, st.integers(1, 99))
def test_a_number_can_be_taken_off_again(name, count):
    assert points.split_number(f"{points.escape(name)}#{count}") == (points.escape(name), count)
    assert points.split_number(points.escape(name)) == (points.escape(name), None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("encoder", ("encoder", ())),
        ("encoder[0]", ("encoder", (0,))),
        ("backbone[out]", ("backbone", ("out",))),
        ("backbone['out'][-1]", ("backbone", ("out", -1))),
    ],
)
def test_items_are_written_behind_the_name(name, expected):
    assert points.split_items(name) == expected


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("glob:layer3.*", ["layer3.0", "layer3.conv"], ["layer3", "layer3.0.conv1", "layer30"]),
        ("glob:layer3.**", ["layer3.0", "layer3.0.conv1"], ["layer3", "layer4.0"]),
        ("glob:*.?.add", ["layer1.0.add", "layer1.0.add#2"], ["layer1.10.add", "add"]),
        (r"re:layer\d\.1", ["layer3.1", "layer3.1#2"], ["layer3.10", "xlayer3.1"]),
        ("glob:a[0]", ["a[0]"], ["a0"]),
    ],
)
def test_patterns_match_whole_names_with_or_without_their_numbers(pattern, matching, other):
    expression = points.pattern(pattern)
    assert [name for name in matching + other if points.matches(expression, name)] == matching


@given(
    st.text(alphabet="ab*?.", min_size=1, max_size=6), st.lists(st.sampled_from("ab"), min_size=1, max_size=4)
)
def test_whatever_a_glob_matches_lies_in_modules_that_get_opened(glob, parts):
    name = ".".join(parts)
    if re.fullmatch(points.pattern(f"glob:{glob}"), name):
        assert all(points.may_enclose(f"glob:{glob}", parent) for parent in points.ancestors(name))


def test_a_module_point_opens_what_encloses_it_and_an_operation_opens_its_module_too():
    modules = dict.fromkeys(["", "layer3", "layer3.0", "layer3.0.conv1"])
    assert points.enclosing("layer3.0.conv1", modules) == ["", "layer3", "layer3.0"]
    assert points.enclosing("layer3.0.add#2", modules) == ["", "layer3", "layer3.0"]
    assert points.enclosing("layer3[0]", modules) == [""]


def test_a_name_that_was_nearly_right_is_answered_with_near_ones():
    with pytest.raises(PointNotFoundError, match=r"no point 'layr3' .*\n  nearest: layer3, layer2"):
        points.match_name("layr3", ["conv1", "layer2", "layer3"])


def test_the_name_of_several_calls_is_answered_with_all_of_them():
    with pytest.raises(AmbiguousPointError, match=r"'act' is called 2 times.*\n  nearest: act#1, act#2"):
        points.match_name("act", ["act#1", "fc", "act#2"])


def test_torchvisions_name_for_a_second_call_is_understood():
    assert points.match_name("layer1.0.relu_1", ["layer1.0.relu#1", "layer1.0.relu#2"]) == "layer1.0.relu#2"


def test_torchvisions_name_for_a_call_that_does_not_exist_is_not_found():
    with pytest.raises(PointNotFoundError, match="there is no point 'relu_2'"):
        points.match_name("relu_2", ["relu#1", "relu#2"])


def test_a_module_that_is_really_called_like_torchvisions_second_call_comes_first():
    assert points.match_name("relu_1", ["relu_1", "relu#1", "relu#2"]) == "relu_1"


@pytest.mark.parametrize("edge", [("a", "b"), ["a", "b"], "a -> b", Edge("a", "b")])
def test_an_edge_can_be_written_in_several_ways(edge):
    assert points.parse_edge(edge) == Edge("a", "b")


@pytest.mark.parametrize("edge", ["a", ("a",), ("a", 3), 3, ("a", "b", "c")])
def test_what_is_no_edge_is_refused_with_one_that_is(edge):
    with pytest.raises(SurgeryError, match=r"is not an edge.*\n  for example: edge=\('layer2'"):
        points.parse_edge(edge)


def test_a_broken_regular_expression_is_refused():
    with pytest.raises(SurgeryError, match="not a regular expression"):
        points.pattern("re:layer(")
