"""The patch file: one valid form, every other one refused by the same parser in `read_header` and in `load`, with nothing touched."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from trocar.anatomy import fingerprint, tiny_model
from trocar.core.errors import PatchFormatError
from trocar.patch import Adapter, AddVector, Base, Effect, Factors, Gate, LowRank, Patch, Remove, ScaleAt, SparseReplace, read_header
from trocar.patch import format as file_format

BASE = Base(fingerprint="f" * 32, structure="s" * 32, family="llama", dtype="F32", tensors={"w": "t" * 32})
FAST = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def make() -> Patch:
    ops = (
        SparseReplace("model.w", (4, 3), torch.arange(6.0).reshape(2, 3), torch.tensor([1, 3]), "rows"),
        SparseReplace("model.v", (5, 5), torch.ones(3, dtype=torch.bfloat16), torch.tensor([0, 7, 24]), "flat"),
        SparseReplace("model.mask", (3,), torch.tensor([True, False, True])),
        LowRank("model.x", torch.ones(2, 4), torch.ones(5, 2)),
        Gate({"L0.H1": 0.0, "L1.mlp": 0.5}),
        AddVector("L0.resid_post", torch.ones(4), positions=[-1, 3]),
        ScaleAt({"L0.H1": 0.0, "L1.N9": 2.0}, "last+generated"),
        Adapter({"a.q": Factors(torch.ones(1, 3), torch.ones(2, 1), 0.5)}, task="CAUSAL_LM"),
        Remove(["L1.N3", "L2"]),
    )
    effects = (Effect(changed=6, norm=1.5), *[None] * 8)
    return Patch(BASE, ops, "test", {"rate": 0.001, "names": ["é", "\u2028"]}, [{"name": "accuracy", "after": 1.0}], effects)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("good") / "p.safetensors"
    make().save(path)
    return path


def refused(path: Path, says: str | None = None) -> str:
    """Both readers refuse the file with the same sentence."""
    messages = []
    for reader in (read_header, Patch.load):
        with pytest.raises(PatchFormatError, match=says) as caught:
            reader(path)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    return messages[0]


def forge(good: Path, path: Path, change=lambda meta, table: None, body=lambda body: body, text=None) -> Path:
    """Write the good file again with its description, table or body changed and the checksum made right, as a skilled forger would."""
    raw = good.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    table, content = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])
    meta = json.loads(table.pop("__metadata__")["trocar"])
    content = bytes(body(content) or content)
    change(meta, table)
    meta.pop("digest", None)
    digest = file_format._digest(file_format._dumps(meta))
    digest.update(content)
    described = file_format._dumps(meta | {"digest": digest.hexdigest()})
    described = text(described) if text else described
    header = json.dumps({"__metadata__": {"trocar": described}} | table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content)
    return path


def test_forging_nothing_gives_the_same_file(good, tmp_path):
    assert forge(good, tmp_path / "p").read_bytes() == good.read_bytes()


def test_equal_patches_are_equal_files_and_other_readers_can_open_them(good, tmp_path):
    make().save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == good.read_bytes()
    Patch.load(good).save(tmp_path / "saved.safetensors")
    assert (tmp_path / "saved.safetensors").read_bytes() == good.read_bytes()
    with safe_open(good, framework="pt") as file:
        assert set(file.metadata()) == {"trocar"}
        assert torch.equal(file.get_tensor("0.values"), torch.arange(6.0).reshape(2, 3))


def test_header_and_load_agree(good):
    header, patch = read_header(good), Patch.load(good)
    assert header.digest == patch.digest
    assert header.nbytes == patch.nbytes == good.stat().st_size
    assert header.rows() == patch.summary()
    assert header.settings == patch.settings
    assert header.base == patch.base
    assert [record.kind for record in header.ops] == [op.kind for op in patch.ops]


def test_reading_a_header_needs_no_torch(good):
    code = (
        "import sys; from trocar.patch import read_header; rows = read_header(sys.argv[1]).rows(); print(len(rows));"
        "assert not {'torch', 'transformers', 'pickle5'} & set(sys.modules), 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code, str(good)], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "9"), done.stderr


@FAST
@given(st.data())
def test_any_changed_byte_is_noticed(good, tmp_path, data):
    raw = bytearray(good.read_bytes())
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    path = tmp_path / "p"
    path.write_bytes(raw)
    refused(path)


@FAST
@given(st.data())
def test_any_other_length_is_noticed(good, tmp_path, data):
    raw = good.read_bytes()
    path = tmp_path / "p"
    path.write_bytes(
        data.draw(st.one_of(st.integers(0, len(raw) - 1).map(lambda n: raw[:n]), st.binary(min_size=1).map(lambda b: raw + b)))
    )
    refused(path)


@FAST
@given(st.binary(max_size=200), st.booleans())
def test_foreign_bytes_are_refused(tmp_path, content, framed):
    path = tmp_path / "p"
    path.write_bytes(len(content).to_bytes(8, "little") + content if framed else content)
    refused(path)


def test_missing_files_folders_and_other_formats(tmp_path, good):
    refused(tmp_path / "none", "cannot be read")
    refused(tmp_path, "cannot be read")
    save_file({"w": torch.ones(2)}, tmp_path / "checkpoint")
    refused(tmp_path / "checkpoint", "not a Trocar patch")
    save_file({"w": torch.ones(2)}, tmp_path / "other", metadata={"trocar": "{}"})
    refused(tmp_path / "other", "not a Trocar patch")

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    (tmp_path / "pickle").write_bytes(pickle.dumps(Bomb()))
    refused(tmp_path / "pickle")
    torch.save({"w": torch.ones(2)}, tmp_path / "zip")
    refused(tmp_path / "zip")
    with zipfile.ZipFile(tmp_path / "archive", "w") as archive:
        archive.write(good, "p.safetensors")
    refused(tmp_path / "archive")
    assert not (tmp_path / "executed").exists()


def set_op(number, **fields):
    return lambda meta, table: meta["ops"][number].update(fields)


def drop_op_field(number, name):
    return lambda meta, table: meta["ops"][number].pop(name)


HEADERS = {
    "a newer version": (lambda meta, table: meta.update(version=2), "version 2"),
    "no version": (lambda meta, table: meta.pop("version"), "version None"),
    "another format": (lambda meta, table: meta.update(format="pickle"), "not a Trocar patch"),
    "an unknown operation": (set_op(0, kind="run-code"), "unknown kind 'run-code'"),
    "an operation without a kind": (drop_op_field(0, "kind"), "unknown kind"),
    "an operation named by a class": (set_op(0, kind="os.system"), "unknown kind"),
    "an operation that is no mapping": (lambda meta, table: meta["ops"].__setitem__(0, 3), "unknown kind"),
    "an unknown key": (lambda meta, table: meta.update(run="rm"), "run"),
    "an unknown key of an operation": (set_op(3, alpha=2.0), "alpha"),
    "a missing key": (drop_op_field(3, "transposed"), "transposed"),
    "a key of the wrong type": (set_op(3, transposed="no"), "transposed"),
    "a number as text": (set_op(3, rank="2"), "rank"),
    "a truth value as a number": (set_op(3, rank=True), "rank"),
    "a negative size": (set_op(3, rank=-2), "rank"),
    "a huge size": (set_op(3, outputs=2**60), "outputs"),
    "a rank above the matrix": (set_op(3, rank=6), "rank 6"),
    "a path as a name": (set_op(3, parameter="../../x"), "parameter"),
    "an absolute path as a name": (set_op(3, parameter="/etc/passwd"), "parameter"),
    "another shape": (set_op(0, shape=[4, 5]), "as its operation says"),
    "another dtype": (set_op(0, dtype="F16"), "as its operation says|does not lie"),
    "another count": (set_op(0, count=1), "as its operation says"),
    "more rows than there are": (set_op(0, count=5), "do not fit"),
    "another layout": (set_op(0, layout="cols"), "as its operation says"),
    "an unknown layout": (set_op(0, layout="diagonal"), "layout"),
    "an infinite factor": (set_op(4, factors={"L0.H1": 1e999}), "not a number|cannot be read"),
    "no gates": (set_op(4, factors={}), "no component"),
    "a component that is none": (set_op(4, factors={"L0.X1": 0.0}), "factors"),
    "unsorted positions": (set_op(5, positions=[3, -1]), "sorted"),
    "unsorted components": (set_op(8, components=["L2", "L1.N3"]), "sorted"),
    "repeated components": (set_op(8, components=["L2", "L2"]), "unique"),
    "a removal of an attention": (set_op(8, components=["L2.attn"]), "only heads"),
    "an operation after the removal": (
        lambda meta, table: meta["ops"].reverse() or meta["effects"].reverse(),
        "after a removal",
    ),
    "one effect too few": (lambda meta, table: meta["effects"].pop(), "effects"),
    "a negative effect": (lambda meta, table: meta["effects"][0].update(changed=-1), "changed"),
    "a base without a fingerprint": (lambda meta, table: meta["base"].pop("fingerprint"), "fingerprint"),
    "an unknown dtype of the base": (lambda meta, table: meta["base"].update(dtype="F4"), "dtype"),
    "settings that are a list": (lambda meta, table: meta.update(settings=[]), "settings"),
    "a method that is too long": (lambda meta, table: meta.update(method="x" * 10_000), "method"),
    "a tensor that nothing uses": (
        lambda meta, table: table.update(extra={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
        "no operation uses",
    ),
    "a tensor that is missing": (lambda meta, table: table.pop("0.values"), "is missing"),
    "a tensor of another dtype": (lambda meta, table: table["0.values"].update(dtype="I32"), "as its operation says"),
    "a tensor of another shape": (lambda meta, table: table["0.values"].update(shape=[3, 2]), "as its operation says"),
    "overlapping tensors": (lambda meta, table: table["0.values"].update(data_offsets=[0, 24]), "does not lie"),
    "a negative offset": (lambda meta, table: table["0.values"].update(data_offsets=[-24, 0]), "does not lie"),
    "a further key of a tensor": (lambda meta, table: table["0.values"].update(strides=[1]), "not written as"),
    "tensors in another order": (lambda meta, table: table.update({"0.index": table.pop("0.index")}), "not written as"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_say_something_wrong(good, tmp_path, name):
    change, says = HEADERS[name]
    if "infinite" in name:
        path = forge(good, tmp_path / "p", text=lambda text: text.replace('"L0.H1":0.0', '"L0.H1":1e999'))
    else:
        path = forge(good, tmp_path / "p", change)
    message = refused(path, says)
    assert message.startswith(str(path))
    assert "[PatchFormatError: docs/errors/patch-format.md]" in message
    assert len(message) < 700


TEXTS = {
    "a key that appears twice": (lambda text: text.replace('{"base"', '{"method":"x","base"', 1), "twice"),
    "NaN": (lambda text: text.replace("0.001", "NaN"), "not a number"),
    "Infinity": (lambda text: text.replace("0.001", "Infinity"), "not a number"),
    "a number beyond all floats": (lambda text: text.replace("0.001", "1e400"), "not a number"),
    "a number of a million digits": (lambda text: text.replace("0.001", "9" * 1_000_000), "not a number"),
    "deep nesting": (lambda text: text.replace("0.001", "[" * 100_000 + "]" * 100_000), "cannot be read|nested"),
    "nesting a little too deep": (lambda text: text.replace("0.001", "[" * 40 + "]" * 40), "nested more than"),
    "another spelling of a number": (lambda text: text.replace("0.001", "1e-3"), "not written as"),
    "spaces": (lambda text: text.replace(":", ": ", 1), "not written as"),
    "keys in another order": (lambda text: json.dumps(dict(reversed(json.loads(text).items())), separators=(",", ":")), "not written as"),
    "half a character": (lambda text: text.replace('"test"', '"\\ud800"'), "cannot be read"),
    "no JSON": (lambda text: text[:-1], "cannot be read"),
    "a list": (lambda text: "[]", "not a Trocar patch"),
    "nothing": (lambda text: "", "cannot be read"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_descriptions_that_are_written_wrongly(good, tmp_path, name):
    change, says = TEXTS[name]
    refused(forge(good, tmp_path / "p", text=change), says)


BODIES = {
    "unsorted rows": ("0.index", [3, 1], "sorted"),
    "repeated rows": ("0.index", [1, 1], "unique"),
    "a row too far": ("0.index", [1, 4], "from 0 to 3"),
    "a negative row": ("0.index", [-1, 1], "from 0"),
    "unsorted entries": ("1.index", [0, 24, 7], "sorted"),
    "an entry too far": ("1.index", [0, 7, 25], "to 24"),
}


@pytest.mark.parametrize("name", BODIES)
def test_indices_are_checked_before_use(good, tmp_path, name):
    key, values, says = BODIES[name]
    raw = good.read_bytes()
    start = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])[key]["data_offsets"][0]

    def change(body):
        new = np.array(values, dtype="<i4").tobytes()
        body[start : start + len(new)] = new
        return body

    refused(forge(good, tmp_path / "p", body=change), says)


def test_truth_values_are_zero_or_one(good, tmp_path):
    raw = good.read_bytes()
    start = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["2.values"]["data_offsets"][0]

    def change(body):
        body[start] = 2
        return body

    refused(forge(good, tmp_path / "p", body=change), "truth values")


@pytest.mark.parametrize(("length", "says"), [(2**63, "not a safetensors"), (file_format.MAX_HEADER + 8, "more than"), (0, "not a safe")])
def test_absurd_header_lengths(tmp_path, length, says):
    path = tmp_path / "p"
    with path.open("wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(file_format.MAX_HEADER + 100)
    refused(path, says)


def test_too_many_operations(good, tmp_path):
    def change(meta, table):
        meta["ops"] = [{"kind": "gate", "factors": {"L0.H1": 0.0}}] * (file_format.MAX_OPS + 1)
        meta["effects"] = [None] * len(meta["ops"])
        table.clear()

    refused(forge(good, tmp_path / "p", change, body=lambda body: b""), "8192|too|items")


def test_a_file_that_changes_while_it_is_read(good, monkeypatch):
    """What was checked is what is used: the values come out of the same pass that hashes them."""
    monkeypatch.setattr(file_format._Reader, "_tensor", lambda self, name, spec, digest, buffer: None)
    with pytest.raises(PatchFormatError, match="checksum"):
        Patch.load(good)


def test_a_refused_file_touches_no_model(good, tmp_path):
    model = tiny_model("llama")
    before = fingerprint(model)
    weight = model.get_parameter("model.norm.weight")
    patch = Patch.of(model, [SparseReplace("model.norm.weight", (32,), torch.ones(1), torch.tensor([3]), "flat")])
    patch.save(tmp_path / "p")
    raw = bytearray((tmp_path / "p").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "p").write_bytes(raw)
    with pytest.raises(PatchFormatError):
        Patch.load(tmp_path / "p").apply(model)
    assert fingerprint(model) == before
    assert weight[3] != 1


def test_what_could_not_be_loaded_is_not_made():
    op = (Gate({"L0.H1": 0.0}),)
    for bad in ({"a": "\ud800"}, {"a": 10**30}, {"a": float("inf")}, {"a": object()}, {"a": json.loads("[" * 40 + "]" * 40)}):
        with pytest.raises(PatchFormatError):
            Patch(BASE, op, "m", bad)
    with pytest.raises(PatchFormatError, match="method"):
        Patch(BASE, op, "m" * 600)
    with pytest.raises(PatchFormatError, match="header"):
        Patch(BASE, op, "m", {"a": "x" * file_format.MAX_HEADER}).save("never-written")
    assert not Path("never-written").exists()


def test_no_load_path_can_run_code():
    folder = Path(file_format.__file__).parent
    for file in folder.rglob("*.py"):
        source = file.read_text()
        for word in ("pickle", "torch.load", "eval(", "exec(", "__import__", "zipfile", "tarfile", "trust_remote_code=True", "yaml"):
            assert word not in source.replace(".eval()", ""), f"{file.name}: {word}"


NAMES = st.from_regex(r"\A[a-z_]{1,8}(\.[a-z0-9_]{1,8}){0,3}\Z")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)

POSITIONS = st.sampled_from([None, "last", "generated", "last+generated", [0, 2]])


@st.composite
def any_op(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 6))

    def values(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    name = draw(NAMES)
    kind = draw(st.sampled_from(["whole", "rows", "cols", "flat", "low-rank", "gate", "vector", "scale", "adapter"]))
    if kind == "low-rank":
        rank = draw(st.integers(1, min(rows, columns)))
        return LowRank(name, values(rank, columns), values(rows, rank), draw(st.booleans()))
    if kind == "gate":
        return Gate({f"L{layer}.H{layer}": float(layer) for layer in range(rows)})
    if kind == "scale":
        return ScaleAt({f"L{layer}.N{layer}": float(layer) for layer in range(rows)}, draw(POSITIONS))
    if kind == "vector":
        return AddVector(f"L{rows}.resid_post", values(columns), draw(POSITIONS))
    if kind == "adapter":
        return Adapter({f"{name}{n}": Factors(values(1, columns), values(rows, 1), draw(st.floats(-9, 9))) for n in range(3)})
    if kind == "whole":
        return SparseReplace(name, (rows, columns), values(rows, columns))
    extent = {"rows": rows, "cols": columns, "flat": rows * columns}[kind]
    index = torch.tensor(sorted(draw(st.sets(st.integers(0, extent - 1), min_size=1))))
    shape = {"rows": (len(index), columns), "cols": (rows, len(index)), "flat": (len(index),)}[kind]
    return SparseReplace(name, (rows, columns), values(*shape), index, kind)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(any_op(), max_size=4), st.dictionaries(st.text(max_size=5), JSON, max_size=3), st.text(max_size=20))
def test_whatever_is_saved_is_loaded(tmp_path, ops, settings_, method):
    patch = Patch(BASE, tuple(ops), method, settings_)
    patch.save(tmp_path / "p")
    again = Patch.load(tmp_path / "p")
    assert again == patch
    assert again.settings == settings_
    assert again.method == method
    for op, loaded in zip(patch.ops, again.ops, strict=True):
        assert op.record() == loaded.record()
        for key, tensor in op.tensors().items():
            assert torch.equal(tensor.view(torch.uint8), loaded.tensors()[key].view(torch.uint8))
