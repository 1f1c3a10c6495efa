"""The arithmetic of low-bit rows: grids, codes, packed bytes, integer products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trocar.core.errors import ConfigError
from trocar.patch.quantised import (
    GroupInput,
    QuantisedLinear,
    Quantiser,
    Transform,
    codes,
    dequantise,
    execute,
    grid,
    integer_linear,
    integer_rows,
    integer_weight,
    pack,
    unpack,
)
from trocar.patch.quantised import quantised as rounded

rows = arrays("float32", st.tuples(st.integers(1, 4), st.integers(1, 12)), elements=st.floats(-100, 100, width=32, allow_subnormal=False))
quantisers = st.builds(Quantiser, bits=st.integers(2, 8), symmetric=st.booleans())


@settings(max_examples=150, deadline=None)
@given(rows, quantisers)
def test_twice_is_once_and_levels_and_errors_are_bounded(values: object, quantiser: Quantiser) -> None:
    x = torch.as_tensor(values).double()
    once = rounded(x, quantiser)
    step, _ = grid(x, quantiser)
    torch.testing.assert_close(rounded(once, quantiser), once, rtol=1e-9, atol=1e-9)
    assert all(len(row.unique()) <= 2**quantiser.bits for row in once)
    assert ((once - x).abs() <= step / 2 * (1 + 1e-9) + 1e-12).all()


@settings(max_examples=60, deadline=None)
@given(rows, quantisers)
def test_order_is_kept(values: object, quantiser: Quantiser) -> None:
    x = torch.as_tensor(values).sort(dim=-1).values
    assert (rounded(x, quantiser).diff(dim=-1) >= 0).all()


@settings(max_examples=60, deadline=None)
@given(st.floats(-1e3, 1e3, width=32, allow_subnormal=False), st.integers(1, 9), quantisers)
def test_constant_rows_are_exact(value: float, columns: int, quantiser: Quantiser) -> None:
    x = torch.full((2, columns), value, dtype=torch.float64)
    torch.testing.assert_close(rounded(x, quantiser), x, rtol=1e-9, atol=1e-9)


def test_sixteen_bits_pass_through() -> None:
    x = torch.randn(3, 5)
    assert rounded(x, Quantiser(bits=16)) is x


def test_zero_points_can_be_stored_even_where_a_row_has_one_sign() -> None:
    x = torch.tensor([[5.0, 6.0, 7.0], [-7.0, -6.0, -5.0]])
    _, zero = grid(x, Quantiser(bits=4))
    assert zero.flatten().tolist() == [0.0, 15.0]


def test_a_clip_cuts_the_range_and_a_group_has_its_own_grid() -> None:
    x = torch.tensor([[-1.0, 0.0, 3.0, 0.1, -0.1, 0.05]])
    step, _ = grid(x, Quantiser(bits=4, group=3))
    torch.testing.assert_close(step, torch.tensor([[4 / 15, 0.2 / 15]]))
    clipped = rounded(x, Quantiser(bits=4, clip=0.5))
    assert clipped.max() <= 1.5 + 4 / 15 / 2
    with pytest.raises(ConfigError, match="Groups of 4 columns do not divide rows of 6"):
        grid(x, Quantiser(group=4))


@settings(max_examples=60, deadline=None)
@given(rows, quantisers)
def test_codes_and_values_say_the_same(values: object, quantiser: Quantiser) -> None:
    x = torch.as_tensor(values)
    step, zero = grid(x, quantiser)
    code = codes(x, step, zero, quantiser)
    assert code.dtype == torch.uint8
    assert torch.equal(dequantise(code, step, zero), rounded(x, quantiser))


@settings(max_examples=60, deadline=None)
@given(arrays("uint8", st.tuples(st.integers(1, 3), st.integers(1, 9)), elements=st.integers(0, 15)))
def test_packing_is_undone(values: object) -> None:
    code = torch.as_tensor(values)
    assert torch.equal(unpack(pack(code), code.shape[1]), code)
    signed = code.view(torch.int8) - 8
    assert torch.equal(unpack(pack(signed), code.shape[1], signed=True), signed)
    assert pack(code).shape[1] == -(-code.shape[1] // 2)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 20), st.integers(1, 40), st.integers(1, 12), quantisers, quantisers, st.integers(0, 99), st.booleans())
def test_integer_products_are_the_simulated_ones(
    tokens: int, columns: int, out: int, a: Quantiser, w: Quantiser, seed: int, zeros: bool
) -> None:
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(tokens, columns, generator=g, dtype=torch.float64), torch.randn(out, columns, generator=g, dtype=torch.float64)
    if zeros:
        x[:1], weight[-1:] = 0, 0
    step, zero = grid(weight, w)
    ready = integer_weight(codes(weight, step, zero, w), step, zero, w)
    torch.testing.assert_close(integer_linear(integer_rows(x, a), ready), rounded(x, a) @ rounded(weight, w).T, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_follows_and_input_stays(dtype: torch.dtype) -> None:
    x = torch.randn(4, 6, dtype=dtype)
    before = x.clone()
    assert rounded(x, Quantiser()).dtype == dtype
    assert torch.equal(x, before)


def _layer(bits: int = 4, readers: int = 1, shape: tuple[int, int] = (6, 8), **settings: Any) -> QuantisedLinear:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=g)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=g))[0]
    columns = shape[1]
    transform = Transform(columns, torch.rand(columns, generator=g) + 0.5, (rotation, torch.randperm(columns, generator=g)))
    quantiser = Quantiser(bits=bits, **settings)
    turned = transform.weight(weight)
    content = turned if quantiser.is_float else (codes(turned, *grid(turned, quantiser), quantiser), *grid(turned, quantiser))
    return QuantisedLinear(GroupInput(transform, Quantiser(bits=8), readers), quantiser, content, torch.randn(shape[0], generator=g))


def test_a_layer_in_integers_is_the_simulated_layer_and_leaves_its_input_alone() -> None:
    layer, x = _layer(), torch.randn(2, 3, 8)
    before = x.clone()
    simulated = layer(x)
    layer.mode = "integer"
    torch.testing.assert_close(layer(x), simulated, rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before)


def test_siblings_in_integers_share_the_work() -> None:
    layer = _layer(readers=2)
    other = QuantisedLinear(layer.shared, layer.quantiser, (layer.code(), layer.get_buffer("step"), layer.get_buffer("zero")), None, False)
    x = torch.randn(3, 8)
    with torch.no_grad():
        assert layer.shared.integers(x) is layer.shared.integers(x)
        expected = [layer(x), other(x)]
        layer.mode = other.mode = "integer"
        for one, right in zip((layer(x), other(x)), expected, strict=True):
            torch.testing.assert_close(one, right, rtol=1e-5, atol=1e-5)
        assert layer.shared._last is None


@pytest.mark.parametrize("settings", [{}, {"symmetric": True}, {"group": 32}, {"group": 64}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_products_are_the_simulated_ones(settings: dict[str, Any], dtype: torch.dtype) -> None:
    layer = _layer(shape=(32, 128), **settings).to(dtype)
    x = torch.randn(2, 3, 128, dtype=dtype)
    simulated = layer(x)
    assert execute(layer, "packed") == {"packed": 1}
    error = (layer(x).float() - simulated.float()).norm() / simulated.float().norm()
    assert error < (1e-5 if dtype == torch.float32 else 1e-2)


def test_layers_run_where_they_can() -> None:
    grouped, wide = _layer(group=4), _layer(bits=12)
    assert execute(torch.nn.ModuleList([_layer(), grouped, wide])) == {"simulated": 2, "integer": 1}
    with pytest.raises(ConfigError, match="0 cannot run in mode 'integer': integer products need one grid a row"):
        execute(torch.nn.ModuleList([grouped]), "integer")
    with pytest.raises(ConfigError, match="at most 8 bits"):
        execute(torch.nn.ModuleList([wide]), "integer")
    with pytest.raises(ConfigError, match="a multiple of 16 outputs"):
        execute(torch.nn.ModuleList([_layer()]), "packed")
    with pytest.raises(ConfigError, match="no mode 'fast'"):
        execute(torch.nn.ModuleList([_layer()]), "fast")


def test_the_effective_weight_is_what_a_float_layer_would_hold() -> None:
    layer, x = _layer(bits=16), torch.randn(5, 8, dtype=torch.float64)
    layer.shared.quantiser = Quantiser(bits=16)
    right = torch.nn.functional.linear(x.float(), layer.effective_weight(), layer.bias)
    torch.testing.assert_close(layer(x.float()), right, rtol=1e-5, atol=1e-5)


def test_casting_a_model_does_not_round_steps_and_rotations() -> None:
    layer = _layer()
    step, rotation = layer.get_buffer("step").clone(), layer.shared.get_buffer("rotation0").clone()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.get_buffer("step"), step)
    assert torch.equal(layer.shared.get_buffer("rotation0"), rotation)
    assert layer(torch.randn(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_siblings_share_the_work_but_never_a_stale_result() -> None:
    shared, calls = _layer(readers=2).shared, []
    inner = shared.values
    shared.values = lambda x: calls.append(1) or inner(x)  # type: ignore[method-assign]
    x = torch.randn(3, 8)
    with torch.no_grad():
        first, second = shared(x), shared(x)
        assert first is second
        assert len(calls) == 1
        assert shared._last is None  # nothing is kept after the last reader
        one = shared(x)
        x.mul_(2)
        assert not torch.equal(shared(x), one)
        assert not torch.equal(shared(x.clone() * 3), one)
