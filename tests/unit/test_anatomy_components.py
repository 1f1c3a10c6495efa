import contextlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trocar.anatomy.components import KINDS, LINEARS, Attention, Block, Channel, Head, Linear, Mlp, Neuron, parse
from trocar.core.errors import ComponentError

towers, numbers, roles = st.sampled_from(["", "text", "vision", "audio_2"]), st.integers(0, 10**6), st.sampled_from(LINEARS)
components = st.one_of(
    st.builds(Block, numbers, towers),
    st.builds(Attention, numbers, towers),
    st.builds(Mlp, numbers, towers),
    st.builds(Head, numbers, numbers, towers),
    st.builds(Neuron, numbers, numbers, towers),
    st.builds(Linear, numbers, roles, towers),
    st.builds(Channel, numbers, roles, st.sampled_from(["in", "out"]), numbers, towers),
)


@given(components)
def test_a_component_parses_as_it_prints(component):
    assert parse(str(component)) == component
    assert parse(component) is component
    assert KINDS[component.kind] is type(component)


@given(components, components)
def test_names_tell_components_apart(one, other):
    assert (str(one) == str(other)) == (one == other)
    assert (one < other) + (other < one) + (one == other) == 1


@given(st.lists(components))
def test_order_does_not_depend_on_where_it_starts(items):
    mixed = random.Random(0).sample(items, len(items))
    assert sorted(mixed) == sorted(items)
    assert [c.tower for c in sorted(items)] == sorted(c.tower for c in items)


@given(st.text(max_size=12))
def test_other_text_is_refused_and_never_read_as_something_else(text):
    with contextlib.suppress(ComponentError):
        assert str(parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "L",
        "L05",
        "L5.",
        "L5.H",
        "L5.H-1",
        "L5.q",
        "L5.mlp.q",
        "L5.attn.up",
        "L5.mlp.up.17",
        "vision",
        "Vision.L1",
        "L5 ",
        "L٥",
        "L5.H3.N1",
    ],
)
def test_near_misses_are_refused(text):
    with pytest.raises(ComponentError):
        parse(text)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Head(-1, 0),
        lambda: Head(0, 1.5),
        lambda: Block(True),
        lambda: Linear(0, "w"),
        lambda: Channel(0, "q", "up", 1),
        lambda: Mlp(0, "A B"),
    ],
)
def test_components_that_cannot_be_are_refused(make):
    with pytest.raises(ComponentError):
        make()


def test_reading_order():
    names = [
        "L0",
        "L0.attn",
        "L0.H0",
        "L0.H2",
        "L0.H10",
        "L0.mlp",
        "L0.N3",
        "L0.attn.q",
        "L0.mlp.down",
        "L0.mlp.down.in3",
        "L1",
        "text.L0",
        "vision.L0.H1",
    ]
    assert [str(c) for c in sorted(map(parse, reversed(names)))] == names
