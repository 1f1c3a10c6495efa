"""Quantised layers as they really run: every mode against the reference, the demands of kernels, compilation, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trocar.core.errors import ConfigError
from trocar.patch.quantised import GroupInput, QuantisedLinear, Quantiser, Transform, codes, execute, grid, memory
from trocar.patch.quantised.float8 import E4M3, LARGEST, float8_linear, float8_rows, float8_weight, scaled_mm
from trocar.patch.quantised.linear import MODES
from trocar.patch.quantised.numbers import int_mm
from trocar.patch.quantised.packed import packed_linear, packed_weight

W4, A8, FLOAT = Quantiser(bits=4), Quantiser(bits=8), Quantiser(bits=16)


def layer(
    weights: Quantiser = W4,
    activations: Quantiser = A8,
    shape: tuple[int, int] = (6, 8),
    seed: int = 0,
    shared: GroupInput | None = None,
    readers: int = 1,
    turned: bool = True,
) -> QuantisedLinear:
    g = torch.Generator().manual_seed(seed)
    rows, columns = shape
    weight = torch.randn(rows, columns, generator=g)
    weight[:: rows + 1] = 0  # a row of zeros
    block = 4 if columns % 4 == 0 else 1
    rotations = [torch.linalg.qr(torch.randn(block, block, generator=g))[0] for _ in range(2)]
    steps = (rotations[0], torch.randperm(columns, generator=g), rotations[1])
    transform = Transform(columns, torch.rand(columns, generator=g) + 0.5, steps) if turned else Transform(columns)
    owner, shared = shared is None, shared or GroupInput(transform, activations, readers)
    content: Any = weight if weights.is_float else (codes(weight, *grid(weight, weights), weights), *grid(weight, weights))
    return QuantisedLinear(shared, weights, content, torch.randn(rows, generator=g), owner)


class Pair(nn.Module):
    """Two layers that read one input."""

    def __init__(self, mode: str = "simulated", **options: Any) -> None:
        super().__init__()
        self.left = layer(readers=2, **options)
        self.right = layer(readers=2, seed=1, shared=self.left.shared, **options)
        execute(self, mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.left(x), self.right(x)], dim=-1)


quantisers = st.builds(Quantiser, bits=st.integers(2, 8), symmetric=st.booleans())
shapes = st.sampled_from([(), (0,), (1,), (3,), (2, 0), (2, 1), (2, 3), (17,)])


def simulated_inputs(lead: tuple[int, ...], columns: int, seed: int) -> torch.Tensor:
    x = torch.randn(*lead, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if lead and lead[0] > 1:
        x[0] = 0
    return x


def close(found: torch.Tensor, right: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, right, rtol=tolerance, atol=tolerance * max(float(right.abs().max()), 1) if right.numel() else 0)


@settings(max_examples=80, deadline=None)
@given(shapes, st.integers(1, 33), st.integers(1, 9), quantisers, quantisers, st.integers(0, 99))
def test_a_layer_in_integers_is_the_simulated_one(
    lead: tuple[int, ...], columns: int, rows: int, weights: Quantiser, activations: Quantiser, seed: int
) -> None:
    one, x = layer(weights, activations, (rows, columns), seed), simulated_inputs(lead, columns, seed)
    right = one(x)
    assert right.shape == (*lead, rows)
    assert execute(one, "integer") == {"integer": 1}
    close(one(x), right)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 20), st.integers(1, 20), st.integers(1, 12), st.integers(0, 99))
def test_products_filled_up_to_what_a_kernel_demands_are_the_same(rows: int, inner: int, columns: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-128, 128, shape, generator=g, dtype=torch.int8) for shape in ((rows, inner), (columns, inner)))
    right = (a.double() @ b.double().T).int()
    assert torch.equal(int_mm(a, b.T), right)
    assert torch.equal(int_mm(a, b.T, demanding=True), right)


def test_a_kernels_demands_are_met(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[torch.Size, torch.Size]] = []
    kernel = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: asked.append((a.shape, b.shape)) or kernel(a, b))
    for rows, inner, columns in ((1, 3, 5), (16, 8, 8), (17, 16, 9), (40, 1, 1)):
        found = int_mm(torch.ones(rows, inner, dtype=torch.int8), torch.ones(inner, columns, dtype=torch.int8), demanding=True)
        assert found.shape == (rows, columns)
        assert (found == inner).all()
    for a, b in asked:
        assert a[0] > 16
        assert a[1] == b[0]
        assert a[1] % 8 == 0
        assert b[1] % 8 == 0
    assert asked[1] == ((17, 8), (8, 8))  # and no more than that


def test_weights_of_four_bits_are_exact_in_float8() -> None:
    code, zero = torch.arange(16, dtype=torch.uint8).expand(16, 16), torch.arange(16, dtype=torch.uint8)[:, None]
    found = float8_weight(code, torch.ones(16, 1), zero).values[0]
    assert torch.equal(found.float(), torch.arange(16.0) - torch.arange(16.0)[:, None])
    five = float8_weight(torch.arange(1, 32, dtype=torch.uint8)[None], torch.ones(1, 1), torch.tensor([[16]])).values[0]
    assert torch.equal(five.float(), torch.arange(-15.0, 16.0)[None])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.integers(1, 33), st.floats(-12, 12), st.integers(0, 99))
def test_float8_activations_are_off_by_a_sixteenth_of_themselves(tokens: int, columns: int, size: float, seed: int) -> None:
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0, size, columns).exp()
    x[:1, :1] = 0
    found = float8_rows(x)
    value = found.values.float()[0] * found.step[0]
    assert found.values.dtype == E4M3
    assert ((value - x).abs() <= torch.maximum(x.abs() / 16, found.step[0] * 2.0**-10) * (1 + 1e-5)).all()
    again = float8_rows(x * 4)
    assert torch.equal(again.values.float(), found.values.float())
    if tokens and x.abs().max() > 0:
        assert found.values.float().abs().max() == LARGEST


@settings(max_examples=80, deadline=None)
@given(
    shapes,
    st.integers(1, 6),
    st.sampled_from([None, 1, 3, 4, 16]),
    st.integers(1, 20),
    st.integers(2, 4),
    st.booleans(),
    st.integers(0, 99),
)
def test_float8_products_are_those_of_the_values_they_round_to(
    lead: tuple[int, ...], groups: int, size: int | None, rows: int, bits: int, symmetric: bool, seed: int
) -> None:
    columns = groups * (size or 5)
    one = layer(Quantiser(bits=bits, symmetric=symmetric, group=size), FLOAT, (rows, columns), seed)
    x = simulated_inputs(lead, columns, seed).float()
    turned = float8_rows(one.shared.transform.online(x.reshape(-1, columns)))
    values = turned.values[0].double() * turned.step[0].double()
    right = (values @ one.transformed_weight().double().T).float().reshape(*lead, rows)
    assert execute(one, "float8") == {"float8": 1}
    assert one.bias is not None
    close(one(x) - one.bias, right)


def _multiplies_float8() -> bool:
    """Whether this torch has the product on the CPU at all, asked with a shape that every kernel takes."""
    one, scale = torch.ones(16, 16).to(E4M3), torch.ones(16, 1)
    try:
        torch._scaled_mm(one, one.T, scale_a=scale, scale_b=scale.T, out_dtype=torch.float32)
    except (RuntimeError, NotImplementedError):
        return False
    return True


@pytest.mark.skipif(not _multiplies_float8(), reason="this torch has no float8 product on the CPU")
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 20), st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_torchs_float8_product_is_the_one_in_float32(rows: int, inner: int, columns: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(count, inner, generator=g).mul_(50).to(E4M3) for count in (rows, columns))
    left, right = torch.rand(rows, 1, generator=g), torch.rand(columns, 1, generator=g)
    found = scaled_mm(a, b, left, right, kernel=True)
    close(found, scaled_mm(a, b, left, right, kernel=False), 1e-4)


def test_float8_products_of_groups_with_torchs_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    one, x = layer(Quantiser(bits=4, group=4), FLOAT, (6, 12)), torch.randn(3, 12)
    weight = one._float8_weight(x)
    right = float8_linear(float8_rows(x), weight)
    monkeypatch.setattr("trocar.patch.quantised.float8.scaled_mm", lambda *parts: scaled_mm(*parts, kernel=True))
    close(float8_linear(float8_rows(x), weight), right)


@pytest.mark.parametrize("bits", [5, 8, 16])
def test_float8_is_refused_where_weights_would_not_be_exact(bits: int) -> None:
    with pytest.raises(ConfigError, match="not exact in e4m3"):
        execute(nn.ModuleList([layer(Quantiser(bits=bits), FLOAT)]), "float8")
    assert not layer(Quantiser(bits=5, symmetric=True)).can("float8")


@pytest.mark.parametrize("activations", [4, 8, 16])
def test_float8_rounds_otherwise_and_comes_only_by_name(activations: int) -> None:
    one, x = layer(W4, Quantiser(bits=activations), (16, 64)), torch.randn(200, 64)
    exact = layer(W4, FLOAT, (16, 64))(x)
    own = float((one(x) - exact).norm() / exact.norm())
    assert "float8" not in execute(one)
    execute(one, "float8")
    error = float((one(x) - exact).norm() / exact.norm())
    assert 0.01 < error < 0.04  # 3 bits behind the leading one
    assert (own > 2 * error) == (activations == 4)


def test_what_cannot_run_in_a_mode_gets_another_by_name() -> None:
    model = nn.ModuleList([layer(), layer(Quantiser(bits=8)), layer(Quantiser(bits=12))])
    with pytest.raises(ConfigError, match=r"1 cannot run in mode 'float8'.*e4m3"):
        execute(model, "float8")
    assert execute(model, "float8", otherwise="auto") == {"simulated": 1, "integer": 1, "float8": 1}
    assert execute(model, "float8", otherwise="simulated") == {"simulated": 2, "float8": 1}
    with pytest.raises(ConfigError, match="2 cannot run in mode 'integer'"):
        execute(model, "float8", otherwise="integer")
    with pytest.raises(ConfigError, match="no mode 'quickly'"):
        execute(model, "float8", otherwise="quickly")
    with pytest.raises(ConfigError, match="one grid a row"):
        execute(nn.ModuleList([layer(activations=Quantiser(bits=8, group=4))]), "integer")


def test_a_whole_model_runs_in_every_mode() -> None:
    from trocar.anatomy import tiny_inputs, tiny_model
    from trocar.compress.duquant import preset, quantise

    model = tiny_model("llama")
    inputs = tiny_inputs(model, rows=2)
    quantise(model, inputs, preset("duquant", "W4A8", block_size=8), seed=0)
    with torch.inference_mode():
        right = model(**inputs).logits
        assert set(execute(model)) == {"integer"}
        close(model(**inputs).logits, right, 1e-4)
        execute(model, "float8")
        error = float((model(**inputs).logits - right).norm() / right.norm())
        assert 0 < error < 0.1
        words = model.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False, pad_token_id=0)  # one token at a time
        assert words.shape[1] == inputs["input_ids"].shape[1] + 3


def held(x: Any) -> int:
    return x.nbytes if isinstance(x, torch.Tensor) else sum(map(held, x)) if isinstance(x, tuple) else 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_what_is_held_and_nothing_is_kept_on_request(mode: str, dtype: torch.dtype) -> None:
    for weights in (W4, Quantiser(bits=4, symmetric=True)):
        pair, x = Pair(mode, weights=weights, shape=(32, 128)).to(dtype), torch.randn(3, 128, dtype=dtype)
        right = pair(x)
        counted = memory(pair, dtype)
        assert sum(held(one._ready[1]) for one in (pair.left, pair.right) if one._ready) == counted[mode]
        assert counted["stored"] == sum(part.nbytes for part in pair.buffers())
        assert counted["float"] == 2 * (32 * 128 + 32) * dtype.itemsize
        assert memory([pair.left], dtype)["float"] == counted["float"] // 2
        execute(pair, mode, keep=False)
        assert torch.equal(pair(x), right)
        assert pair.left._ready is None
    assert "float8" not in memory(Pair(weights=Quantiser(bits=8)))


@settings(max_examples=25, deadline=None)
@given(shapes, st.sampled_from([None, 32, 64, 96]), st.integers(2, 4), st.booleans(), st.integers(0, 99))
def test_packed_products_are_the_simulated_ones(lead: tuple[int, ...], group: int | None, bits: int, symmetric: bool, seed: int) -> None:
    one = layer(Quantiser(bits=bits, symmetric=symmetric, group=group), A8, (16, 192), seed)
    x = simulated_inputs(lead, 192, seed).float()
    right = one(x)
    assert execute(one, "packed") == {"packed": 1}
    close(one(x), right)


def test_only_the_reference_has_gradients_and_the_others_say_so() -> None:
    for mode in MODES:
        pair, x = Pair(mode, shape=(16, 32)), torch.randn(3, 32, requires_grad=True)
        found = pair(x)
        assert torch.equal(found.detach(), pair(x.detach()))
        if mode == "simulated":
            found.sum().backward()
            assert x.grad is not None
            assert x.grad.abs().max() > 0
        else:
            with pytest.raises(ConfigError, match="have no gradients"):
                (found.sum() + x.sum()).backward()
            compiled: Any = torch.compile(pair, backend="aot_eager", fullgraph=True) if mode == "integer" else None
            if compiled is not None:
                (compiled(x).sum() + x.sum()).backward()
                assert x.grad is not None
                assert x.grad.isnan().all()


def test_what_is_made_in_inference_mode_serves_outside_of_it() -> None:
    for mode in MODES:
        pair = Pair(mode, shape=(16, 32))
        with torch.inference_mode():
            x = torch.randn(3, 32)
            one = pair(x)
            x.mul_(2)
            assert not torch.equal(pair(x), one)
        pair(torch.randn(3, 32, requires_grad=True))


@pytest.mark.parametrize(("mode", "backend"), [("simulated", "aot_eager"), ("integer", "aot_eager"), ("float8", "eager")])
def test_a_compiled_model_is_one_graph_with_equal_results(mode: str, backend: str) -> None:
    torch._dynamo.reset()
    pair = Pair(mode)
    compiled: Any = torch.compile(pair, backend=backend, fullgraph=True)
    with torch.no_grad():
        x = torch.randn(3, 8)
        pair.left(x)  # the first of two readers: what is shared is waiting for the second
        for _ in range(2):
            found = compiled(x)
            assert torch.equal(found, pair(x))
        x.mul_(2)
        assert torch.equal(compiled(x), pair(x))
        assert not torch.equal(compiled(x), found)
        pair.left.get_buffer("codes").fill_(0)
        pair.left.forget()
        assert torch.equal(compiled(x), pair(x))
        execute(pair, "simulated" if mode == "integer" else "integer")
        assert torch.equal(compiled(x), pair(x))
    torch._dynamo.reset()


def test_a_gpu_is_asked_for_what_its_kernels_take() -> None:
    """Shapes, types and devices only: torch checks them without a GPU, on tensors without content."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="cuda")

        whole = int_mm(empty(3, 12, dtype=torch.int8), empty(5, 12, dtype=torch.int8).T)
        assert (whole.shape, whole.dtype, whole.device.type) == ((3, 5), torch.int32, "cuda")
        product = scaled_mm(empty(3, 12, dtype=E4M3), empty(5, 12, dtype=E4M3), empty(3, 1), empty(5, 1))
        assert (product.shape, product.dtype) == ((3, 5), torch.float32)
        parts = (empty(24, 128, dtype=torch.uint8), 256, empty(24, 2), empty(24, 2, dtype=torch.uint8))
        weight = packed_weight(*parts, torch.bfloat16)
        assert (weight.group, weight.scales.shape) == (128, (2, 24, 2))
        assert packed_linear(empty(3, 256, dtype=torch.bfloat16), weight).shape == (3, 24)
        with pytest.raises(ConfigError, match=r"in bfloat16, not torch\.float32"):
            packed_weight(*parts, torch.float32)
