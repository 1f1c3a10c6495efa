"""The anatomy of one model: its towers, blocks, roles, sizes, linear maps and parameter slices, found through the family table. Floor 1."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from trocar.anatomy.components import KINDS, LINEARS, MLP_LINEARS, Attention, Block, Channel, Component, Head, Linear, Mlp, Neuron, parse
from trocar.anatomy.experts import BESIDE, EXPERTS, SHARED, Experts, check_experts
from trocar.anatomy.families import EXPERT_FAMILIES, FAMILIES, Family, TowerRow
from trocar.anatomy.linear import LinearView, Slice, base_layer, check_linear
from trocar.anatomy.paths import base_parameters, first, get, join, prefixed, refuse_experts, unwrap
from trocar.core.errors import ComponentError, UnknownFamilyError, UnsupportedModelError, nearest

ADDING = "To add a family, add a row to trocar.anatomy.families (or call register) and run trocar.anatomy.conformance.check."
_FUSED = {"q": "qkv", "k": "qkv", "v": "qkv", "up": "gate_up", "gate": "gate_up"}


class Tower:
    """One stack of blocks. Sizes are read from the modules, so that they stay true after heads, neurons or blocks were removed."""

    def __init__(self, model: nn.Module, row: TowerRow, family: str, root_path: str, experts: bool = False) -> None:
        self.row, self.name, self.modality = row, row.name, row.modality
        self.root_path, self.root = root_path, get(model, root_path)
        assert self.root is not None
        config = getattr(model, "config", None)
        self.config: Any = getattr(config, row.config, config) if row.config else config
        chosen: dict[str, Any] = {"causal": row.causal, "residual": row.residual}
        chosen.update({field: then for key, value, field, then in row.when if getattr(self.config, key, None) == value})
        self.causal: bool = chosen["causal"]
        self.residual: str = chosen["residual"]
        blocks_path = first(self.root, row.blocks) or ""
        self.blocks: list[nn.Module] = list(get(self.root, blocks_path))  # type: ignore[arg-type]
        self.blocks_path = join(root_path, blocks_path)
        self.embedding_path = prefixed(root_path, first(self.root, row.embedding))
        self.final_norm_path = prefixed(root_path, first(self.root, row.final_norm) if row.final_norm else None)
        self.pooler_path = prefixed(root_path, first(self.root, row.pooler) if row.pooler else None)
        self.head_path = first(model, row.head) if row.head else None
        self.embedding, self.final_norm = get(model, self.embedding_path), get(model, self.final_norm_path)
        self.pooler, self.head = get(model, self.pooler_path), get(model, self.head_path)
        self._roles: list[dict[str, tuple[str, nn.Module]]] = [self._resolve(layer, family, experts) for layer in range(len(self.blocks))]
        self._transposed = {
            (layer, role): check_linear(module, self.path(layer, role))
            for layer, roles in enumerate(self._roles)
            for role, (_, module) in roles.items()
            if role in LINEARS or role in SHARED or role in self.row.layouts
        }
        self._head_size = [self._find_head_size(layer) for layer in range(len(self.blocks))]
        for layer in range(len(self.blocks)):
            self._check_sizes(layer)

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def width(self) -> int:
        """The width of the residual stream."""
        return self._shape(0, "o")[0] if self.blocks else int(self.config.hidden_size)

    def has(self, layer: int, role: str) -> bool:
        """Whether block `layer` has a module of its own for `role` (a fused k has none: it has `qkv`)."""
        return role in self._roles[self._layer(layer)]

    def module(self, layer: int, role: str) -> nn.Module:
        """The module that is called for `role` in the forward pass: an adapter layer where there is one, the place for hooks."""
        return self._role(layer, role)[1]

    def path(self, layer: int, role: str) -> str:
        """The module's dotted name in the model."""
        return join(self.blocks_path, str(layer), self._role(layer, role)[0])

    def roles(self, layer: int) -> tuple[str, ...]:
        return tuple(self._roles[self._layer(layer)])

    def linears(self, layer: int) -> tuple[str, ...]:
        """The linear maps of a block, fused or not: q, k, v, o, up, (gate,) down."""
        return tuple(role for role in LINEARS if self.has(layer, role) or self._fused(layer, role))

    def head_size(self, layer: int) -> int:
        return self._head_size[self._layer(layer)]

    def heads(self, layer: int) -> int:
        """The number of query heads."""
        return self._shape(layer, "o")[1] // self.head_size(layer)

    def kv_heads(self, layer: int) -> int:
        """The number of key/value heads; fewer than `heads` with grouped queries."""
        if self.has(layer, "k"):
            return self._shape(layer, "k")[0] // self.head_size(layer)
        return (self._shape(layer, "qkv")[0] // self.head_size(layer) - self.heads(layer)) // 2

    def group(self, layer: int) -> int:
        """How many query heads share a key/value head."""
        return self.heads(layer) // self.kv_heads(layer)

    def neurons(self, layer: int) -> int:
        return self._shape(layer, "down")[1]

    def experts(self, layer: int) -> Experts | None:
        """The block's mixture of experts; None for a dense block. Raises UnsupportedModelError for experts in an unknown form."""
        if not self.has(layer, EXPERTS):
            return None
        path, module = self.path(layer, EXPERTS), self.module(layer, EXPERTS)
        beside, shared = ({role: self.path(layer, role) for role in roles if self.has(layer, role)} for roles in (BESIDE, SHARED))
        return Experts(path, module, *check_experts(module, path), beside, shared)

    def _resolve(self, layer: int, family: str, experts: bool) -> dict[str, tuple[str, nn.Module]]:
        block, found = self.blocks[layer], {"block": ("", self.blocks[layer])}
        for role, names in {"attn": self.row.attn, "mlp": self.row.mlp, **self.row.roles}.items():
            if names and (name := first(block, names)) is not None:
                found[role] = (name, get(block, name))  # type: ignore[assignment]
        if EXPERTS in found and not experts:
            refuse_experts(block, join(self.blocks_path, str(layer)))
        mlp = () if EXPERTS in found else (("down",), ("up", "gate_up"))
        for wanted in (("q", "qkv"), ("k", "qkv"), ("v", "qkv"), ("o",), *mlp):
            if not any(role in found for role in wanted):
                here = join(self.blocks_path, str(layer))
                refuse_experts(block, here)
                looked = " or ".join(f"{here}.{name}" for role in wanted for name in self.row.roles.get(role, "").split("|") if name)
                raise UnknownFamilyError(f"The block {here} ({type(block).__name__}) of this {family} model has no {looked}.", ADDING)
        return found

    def _role(self, layer: int, role: str) -> tuple[str, nn.Module]:
        roles = self._roles[self._layer(layer)]
        if role not in roles:
            if role in (*MLP_LINEARS, "gate_up"):
                self._refuse_experts(layer)
            raise ComponentError(f"Block {layer} of this model has no module for the role '{role}'.", nearest(role, roles))
        return roles[role]

    def _refuse_experts(self, layer: int) -> None:
        """Raise UnsupportedModelError if the block holds experts."""
        if self.has(layer, EXPERTS):
            refuse_experts(self.blocks[layer], join(self.blocks_path, str(layer)))

    def _layer(self, layer: int) -> int:
        if not 0 <= layer < len(self.blocks):
            raise ComponentError(f"{join(self.name, f'L{layer}')} does not exist.", f"Layers run from 0 to {len(self.blocks) - 1}.")
        return layer

    def _shape(self, layer: int, role: str) -> tuple[int, int]:
        """(out, in) of a linear module."""
        rows, columns = base_layer(self.module(layer, role)).get_parameter("weight").shape
        return (columns, rows) if self._transposed[layer, role] else (rows, columns)

    def _fused(self, layer: int, role: str) -> bool:
        fused = _FUSED.get(role, "")
        return self.has(layer, fused) and role in self.row.layouts[fused].removeprefix("head:").split(",")

    def _find_head_size(self, layer: int) -> int:
        name = self._role(layer, "q" if self.has(layer, "q") else "qkv")[0]
        owner = get(self.blocks[layer], name.rpartition(".")[0])  # the module that cuts q into heads knows their size
        for key in ("head_dim", "head_size", "attention_head_size"):
            for holder in (owner, self.config):
                if isinstance(size := getattr(holder, key, None), int):
                    return size
        return self.config.hidden_size // self.config.num_attention_heads

    def _check_sizes(self, layer: int) -> None:
        size, width_in, here = self.head_size(layer), self._shape(layer, "o")[1], join(self.blocks_path, str(layer))
        rows = self._shape(layer, "q" if self.has(layer, "q") else "qkv")[0]
        wrong = width_in % size or (self.has(layer, "q") and rows != width_in) or self.kv_heads(layer) < 1
        if wrong or self.heads(layer) % self.kv_heads(layer):
            raise UnsupportedModelError(
                f"{here}: {rows} rows of q, {width_in} inputs of o and heads of {size} do not fit together.",
                "Attention must consist of equal heads, the query heads a multiple of the key/value heads.",
            )

    def __repr__(self) -> str:
        return f"Tower({self.name!r}, {self.n_layers} blocks of {self.blocks_path})"


class Anatomy:
    """What a model is made of. Make one with `Anatomy.of(model)`; make a new one after modules were replaced.

    model: the module inside DDP, torch.compile and PEFT wrappers, to which all names are relative; family: its row; towers: by name,
    `""` for the only one.
    """

    def __init__(self, model: nn.Module, family: Family, towers: Mapping[str, Tower]) -> None:
        self.model: Any = model
        self.family, self.towers = family, dict(towers)
        self._names: dict[int, str] | None = None

    @classmethod
    def of(cls, model: nn.Module | Anatomy, experts: bool = False) -> Anatomy:
        """Resolve a transformers model of a known family: base model, any task head, inside DDP, torch.compile or PEFT.

        experts: accept mixtures of experts too. A block that holds one has attention, norms and `Tower.experts`, but no MLP roles: whoever
        asks for its neurons or linear maps is refused as without `experts`.

        Raises UnknownFamilyError (no row for `config.model_type`, or the row's names are not there) and UnsupportedModelError (quantised
        weights, experts, parameters shared between blocks, FSDP, merged adapters).
        """
        if isinstance(model, Anatomy):
            return model
        model = unwrap(model)
        model_type: Any = getattr(getattr(model, "config", None), "model_type", None)
        known = {**EXPERT_FAMILIES, **FAMILIES} if experts else FAMILIES
        if model_type not in known:
            refuse_experts(model, "")
            raise UnknownFamilyError(
                f"{type(model).__name__} has "
                + (f"model type '{model_type}', which is not in the family table." if model_type else "no config.model_type to look up."),
                f"{nearest(str(model_type), FAMILIES)} {ADDING}",
            )
        family = known[model_type]
        towers = []
        for row in family.towers:
            roots = [
                root for root in row.root.split("|") if (module := get(model, root)) is not None and first(module, row.blocks) is not None
            ]
            if roots:
                towers.append(Tower(model, row, family.name, roots[0], experts))
        if not towers:
            looked = ", ".join(join(root, name) for row in family.towers for root in row.root.split("|") for name in row.blocks.split("|"))
            raise UnknownFamilyError(
                f"This {type(model).__name__} has none of the block lists of its family {family.name}: {looked}.", ADDING
            )
        if len(towers) == 1:
            towers[0].name = ""
        anatomy = cls(model, family, {tower.name: tower for tower in towers})
        anatomy._refuse_sharing()
        return anatomy

    def tower(self, name: str | None = None) -> Tower:
        """The tower called `name`; without a name, the only one. Raises ComponentError that lists the towers."""
        if name is None and len(self.towers) == 1:
            return next(iter(self.towers.values()))
        if name not in self.towers:
            names = [f"'{tower}'" for tower in self.towers] if "" not in self.towers else []
            known = f"Its towers: {', '.join(names)}." if names else "It has one tower, without a name."
            raise ComponentError(f"{type(self.model).__name__} has no tower '{name or ''}'.", known)
        return self.towers[name]

    def check(self, component: Component | str) -> Component:
        """The component, if this model has it. Raises ComponentError naming the admissible range."""
        item = parse(component)
        tower = self.tower(item.tower)  # type: ignore[attr-defined]
        tower._layer(item.layer)
        if isinstance(item, Head | Neuron):
            self._in_range(item, tower.heads(item.layer) if isinstance(item, Head) else tower.neurons(item.layer))
        if isinstance(item, Linear | Channel) and item.role in MLP_LINEARS:
            tower._refuse_experts(item.layer)
        if isinstance(item, Linear | Channel) and item.role not in (known := tower.linears(item.layer)):
            raise ComponentError(f"{item} does not exist: this block has no '{item.role}'.", f"Its linear maps: {', '.join(known)}.")
        if isinstance(item, Channel):
            view = self._view(tower, item.layer, item.role)
            self._in_range(item, view.in_features if item.side == "in" else view.out_features)
        return item

    def components(self, kind: str | type[Component], tower: str | None = None) -> list[Component]:
        """All components of a kind (block, attention, head, mlp, neuron, linear, channel), in order; of all towers by default."""
        name = kind if isinstance(kind, str) else kind.kind
        if name not in KINDS:
            raise ComponentError(f"'{name}' is not a kind of component.", nearest(name, KINDS))
        towers = sorted(self.towers.values(), key=lambda t: t.name) if tower is None else [self.tower(tower)]
        return [item for t in towers for layer in range(t.n_layers) for item in self._of_layer(name, t, layer)]

    def linear(self, component: Component | str) -> LinearView:
        """The view of a linear map, `L5.mlp.down`."""
        item = self.check(component)
        if not isinstance(item, Linear):
            raise ComponentError(f"{item} is not a linear map.", "Name one, for instance L5.attn.o or L5.mlp.down.")
        return self._view(self.tower(item.tower), item.layer, item.role)

    def slices(self, component: Component | str) -> list[Slice]:
        """The parameter entries that make up a component, biases included.

        Head: its q rows and o columns, and the k and v rows it reads, marked `shared` when its group has other heads. Neuron: its rows of
        up and gate, its column of down. Channel: a row and its bias entry, or a column. Linear: weight and bias. Attention, Mlp: their
        projections and what lies between (query and key norms), without the norms of the residual stream; Block: everything in it. The
        bias of o or down belongs to the attention or MLP, not to a head or neuron. Adapter weights belong to no component.
        """
        item = self.check(component)
        tower, layer = self.tower(item.tower), item.layer  # type: ignore[attr-defined]

        def view(role: str) -> LinearView:
            return self._view(tower, layer, role)

        if isinstance(item, Head):
            size, group = tower.head_size(layer), tower.group(layer)
            own = range(item.index * size, (item.index + 1) * size)
            kv = range(item.index // group * size, (item.index // group + 1) * size)
            return view("q").row(own) + view("o").column(own) + view("k").row(kv, group > 1) + view("v").row(kv, group > 1)
        if isinstance(item, Neuron):
            rows = [part for role in tower.linears(layer) if role in ("up", "gate") for part in view(role).row([item.index])]
            return rows + view("down").column([item.index])
        if isinstance(item, Channel):
            return view(item.role).row([item.index]) if item.side == "out" else view(item.role).column([item.index])
        if isinstance(item, Linear):
            return view(item.role).whole()
        return [Slice(name, 0, range(parameter.shape[0]) if parameter.ndim else range(0)) for name, parameter in self._inside(item, tower)]

    def name_of(self, parameter: nn.Parameter) -> str:
        """A parameter's name in the model; a tied one has its first."""
        if self._names is None:
            self._names = {id(value): name for name, value in self.model.named_parameters()}
        return self._names[id(parameter)]

    def _of_layer(self, kind: str, tower: Tower, layer: int) -> list[Any]:
        name = tower.name
        if kind in ("head", "neuron"):
            make, count = (Head, tower.heads(layer)) if kind == "head" else (Neuron, tower.neurons(layer))
            return [make(layer, index, name) for index in range(count)]
        if kind == "linear":
            return [Linear(layer, role, name) for role in tower.linears(layer)]
        if kind == "channel":
            views = [(role, self._view(tower, layer, role)) for role in tower.linears(layer)]
            counts = [
                (role, side, view.in_features if side == "in" else view.out_features) for role, view in views for side in ("in", "out")
            ]
            return [Channel(layer, role, side, index, name) for role, side, count in counts for index in range(count)]
        return [{"block": Block, "attention": Attention, "mlp": Mlp}[kind](layer, name)]

    def _view(self, tower: Tower, layer: int, role: str) -> LinearView:
        rows = None
        own = role if tower.has(layer, role) else _FUSED[role]
        module = tower.module(layer, own)
        if own != role:
            rows = _fused_rows(tower, layer, own, role)
        base: Any = base_layer(module)
        bias = base.bias
        return LinearView(
            name=self.name_of(base.weight),
            bias_name=None if bias is None else self.name_of(bias),
            path=tower.path(layer, own),
            module=module,
            parameter=base.weight,
            bias=bias,
            rows=rows,
            transposed=tower._transposed[layer, own],
        )

    def _inside(self, item: Component, tower: Tower) -> Iterator[tuple[str, nn.Parameter]]:
        """The base parameters of a block, its attention or its MLP, each once."""
        layer = item.layer
        if isinstance(item, Block):
            modules, without = [tower.blocks[layer]], []
        elif isinstance(item, Attention):
            modules, without = [tower.module(layer, "attn")], ["attn_norm"]
        elif tower.has(layer, "mlp"):
            modules, without = [tower.module(layer, "mlp")], ["mlp_norm"]
        else:
            modules, without = [tower.module(layer, role) for role in ("up", "gate", "gate_up", "down") if tower.has(layer, role)], []
        seen = {id(p) for role in without if tower.has(layer, role) for p in tower.module(layer, role).parameters()}
        for parameter in (p for module in modules for p in base_parameters(module)):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield self.name_of(parameter), parameter

    def _in_range(self, item: Any, count: int) -> None:
        if item.index >= count:
            raise ComponentError(f"{item} does not exist.", f"The index runs from 0 to {count - 1} in this block.")

    def _refuse_sharing(self) -> None:
        owners: dict[int, str] = {}
        for tower in self.towers.values():
            for layer in range(tower.n_layers):
                paths = dict.fromkeys(tower.path(layer, role) for role in tower.roles(layer) if (layer, role) in tower._transposed)
                owned: list[Any] = [(path, base_layer(get(self.model, path)).weight) for path in paths]  # type: ignore[arg-type]
                if tower.has(layer, EXPERTS):
                    owned += [(tower.path(layer, EXPERTS), weight) for weight in tower.module(layer, EXPERTS).parameters()]
                for path, weight in owned:
                    other = owners.setdefault(id(weight), path)
                    if other != path:
                        raise UnsupportedModelError(
                            f"{path} shares its weight with {other}, so neither can be changed alone.",
                            "Attention and MLP weights must belong to one block; only embeddings and heads may be tied.",
                        )

    def __repr__(self) -> str:
        return f"Anatomy({type(self.model).__name__}, family {self.family.name}, {list(self.towers.values())})"


def _fused_rows(tower: Tower, layer: int, fused: str, role: str) -> range | tuple[int, ...]:
    """The rows of q, k or v in qkv, of gate or up in gate_up."""
    layout = tower.row.layouts[fused]
    order = layout.removeprefix("head:").split(",")
    size = tower.head_size(layer)
    if layout.startswith("head:"):
        start, step = order.index(role) * size, len(order) * size
        return tuple(row for head in range(tower.heads(layer)) for row in range(head * step + start, head * step + start + size))
    total = tower._shape(layer, fused)[0]
    if fused == "qkv":
        counts = {"q": tower.heads(layer) * size, "k": tower.kv_heads(layer) * size, "v": tower.kv_heads(layer) * size}
    else:
        counts = dict.fromkeys(order, total // len(order))
    start = sum(counts[name] for name in order[: order.index(role)])
    return range(start, start + counts[role])
