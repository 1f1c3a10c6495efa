"""PEFT's adapters as things that can be switched: off for everybody, or row by row of a batch. Floor 2.

Off means that the module is what it was before it was adapted: its base layer runs, and nothing of the adapter is evaluated (no A, no B, no
dropout, no DoRA magnitude), so it costs nothing and gets no gradient. Peft's own ways do something else: `disable_adapter_layers` turns
`requires_grad` off, and a scale of 0 evaluates everything and gives zero instead of no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from trocar.anatomy import Anatomy, module_groups
from trocar.anatomy.grouping import By
from trocar.anatomy.paths import unwrap
from trocar.core.errors import InterventionError, UnknownFamilyError, UnsupportedModelError
from trocar.trace.calls import override

RESIDUAL = ("pissa", "olora", "corda", "loftq")  # initialisations that take the adapter's first value out of the base's weights
Layers = dict[str, Any]


def adapter_layers(model: torch.nn.Module, adapter: str = "default") -> Layers:
    """The modules that the adapter changes, by their names in the base model, in the model's order; of nested ones the outermost.

    Raises UnsupportedModelError if there are none, if one has the adapter merged into its weights, switched off, or not alone active.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: Layers = {}
    for name, module in unwrap(model).named_modules():
        if not isinstance(module, BaseTunerLayer) or any(name.startswith(f"{outer}.") for outer in found):
            continue
        if any(adapter in getattr(module, part, ()) for part in module.adapter_layer_names):
            found[name] = module
    if not found:
        known = ", ".join(getattr(model, "peft_config", {})) or "none"
        raise UnsupportedModelError(
            f"{type(model).__name__} has no modules with an adapter '{adapter}' (adapters: {known}).",
            "Wrap it first: peft.get_peft_model(model, peft.LoraConfig(...)).",
        )
    for name, module in found.items():
        if module.merged:
            raise UnsupportedModelError(f"The adapter of {name} is merged into its weights.", "Call model.unmerge_adapter() first.")
        if module.disable_adapters:
            raise UnsupportedModelError(f"The adapter of {name} is disabled.", "Call model.enable_adapter_layers() first.")
        if list(module.active_adapters) != [adapter]:
            active = ", ".join(module.active_adapters) or "none"
            raise UnsupportedModelError(f"Of {name} not '{adapter}' alone is active, but {active}.", f"Call set_adapter('{adapter}').")
    return found


def adapter_groups(model: torch.nn.Module, by: By = "block", adapter: str = "default") -> dict[str, Layers]:
    """The adapter's modules in groups that are switched together; see `trocar.anatomy.module_groups` for `by` and the groups' names."""
    layers = adapter_layers(model, adapter)
    try:
        anatomy = Anatomy.of(model)
    except (UnknownFamilyError, UnsupportedModelError):  # quantised bases, experts, own models: by their modules' names
        anatomy = None
    return {group: {name: layers[name] for name in names} for group, names in module_groups(layers, by, anatomy).items()}


def initial_factors(model: torch.nn.Module, adapter: str = "default") -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Copies of A and B of a fresh adapter whose initialisation took s B A out of the base's weights (PiSSA, OLoRA); {} for all others.

    Without them the base layer alone is not the pretrained one any more. Take them before the first step of training.
    """
    config = getattr(model, "peft_config", {}).get(adapter)
    start = getattr(config, "init_lora_weights", None)
    if not isinstance(start, str) or not start.lower().startswith(RESIDUAL):
        return {}
    layers = adapter_layers(model, adapter)
    pairs = {name: (module.lora_A[adapter].weight, module.lora_B[adapter].weight) for name, module in layers.items()}
    return {name: (a.detach().clone(), b.detach().clone()) for name, (a, b) in pairs.items()}


class AdapterSwitches:
    """A context in which groups of adapters can be switched. Outside of it, and while nothing is set, the model is as it was.

    groups: from `adapter_groups`. initial: from `initial_factors`. only_training: `set` has effect in training mode only, so that an
    evaluation in the midst of training sees the whole network. tensor: switch by multiplying with a tensor, which `torch.compile` traces
    once for all masks; the adapters are then evaluated all the same, and get zero gradients instead of none (plain LoRA only).
    """

    def __init__(
        self,
        groups: Mapping[str, Mapping[str, Any]],
        adapter: str = "default",
        initial: Mapping[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
        only_training: bool = False,
        tensor: bool = False,
    ) -> None:
        self.groups, self.adapter, self.only_training, self.tensor = groups, adapter, only_training, tensor
        self.initial = dict(initial or {})
        self.names = tuple(groups)
        self.levels: tuple[float, ...] | None = None
        self.rows: torch.Tensor | None = None
        self._restores: list[Callable[[], Any]] = []
        self._tensor: torch.Tensor | None = None
        if tensor:
            odd = [name for members in groups.values() for name, module in members.items() if not self._plain(name, module)]
            if odd:
                raise UnsupportedModelError(f"The adapter of {odd[0]} is not plain LoRA.", "Leave out the tensor mode.")

    def set(self, levels: Sequence[bool | float] | None) -> None:
        """Switch for all rows: one flag a group, in the order of `names`, or a number that scales its contribution; None: all on."""
        if levels is not None and len(levels) != len(self.names):
            known = ", ".join(self.names)
            raise InterventionError(f"{len(levels)} flags cannot switch {len(self.names)} groups.", f"The groups are {known}.")
        self.levels, self.rows = None if levels is None else tuple(float(level) for level in levels), None
        if self._tensor is not None:
            self._tensor.copy_(torch.tensor([1.0] * len(self.names) if self.levels is None else self.levels))

    def set_rows(self, factors: torch.Tensor | None) -> None:
        """Switch row by row: (batch, groups), bool or float (a float scales the adapter's contribution); None: all on.

        Row r of everything that flows through the adapted modules belongs to row r of the batch. 0 and 1 give the values of the base and of
        the adapted module bit for bit.
        """
        if self.tensor:
            raise InterventionError("Rows cannot be switched in tensor mode.", "Make the switches without tensor=True.")
        if factors is not None and (factors.ndim != 2 or factors.shape[1] != len(self.names)):
            shape = tuple(factors.shape)
            raise InterventionError(f"Factors of shape {shape} cannot switch {len(self.names)} groups.", "Give (batch, groups).")
        self.rows, self.levels = factors, None

    def __enter__(self) -> AdapterSwitches:
        try:
            for number, members in enumerate(self.groups.values()):
                for name, module in members.items():
                    if self._plain(name, module):
                        hook = self._level(number) if self.tensor else self._scaled(number)
                        self._restores.append(module.lora_B[self.adapter].register_forward_hook(hook).remove)
                    if not self.tensor:
                        self._restores.append(override(module, "forward", self._switched(number, name, module)))
            if self.tensor:
                device = next(module for members in self.groups.values() for module in members.values()).lora_B[self.adapter].weight.device
                self._tensor = torch.ones(len(self.names), device=device)
                self.set(self.levels)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        while self._restores:
            self._restores.pop()()
        self._tensor = self.levels = self.rows = None

    def _plain(self, name: str, module: Any) -> bool:
        """Whether the module's output is its base's plus what lora_B gives."""
        return (
            name not in self.initial
            and self.adapter in getattr(module, "lora_B", {})
            and self.adapter not in getattr(module, "lora_variant", {})
            and not hasattr(module, "parameter_name")  # peft's ParamWrapper and MultiheadAttention add to weights instead
            and not isinstance(module.get_base_layer(), torch.nn.MultiheadAttention)
        )

    def _switched(self, number: int, name: str, module: Any) -> Any:
        """What stands in for the forward pass of a module of group `number`."""
        on, base, plain = module.forward, module.get_base_layer(), self._plain(name, module)
        odd = _peft_arguments()

        def off(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            given = {key: value for key, value in kwargs.items() if key not in odd}
            result = base(x, *args, **given)
            if name in self.initial:
                a, b = (factor.to(x.device) for factor in self.initial[name])
                update = torch.nn.functional.linear(torch.nn.functional.linear(x.to(a.dtype), a), b) * module.scaling[self.adapter]
                result = (result + update).to(result.dtype)
            return result

        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.rows is not None:
                return by_row(self.rows[:, number], x, *args, **kwargs)
            level = 1.0 if self.levels is None or (self.only_training and not module.training) else self.levels[number]
            if level == 0:
                return off(x, *args, **kwargs)
            if plain or level == 1:
                return on(x, *args, **kwargs)  # of plain LoRA, what lora_B gives is scaled by a hook of its own
            return blend(torch.full((1,), level, device=x.device), x, *args, **kwargs)

        def by_row(factors: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if bool((factors == 0).all()):
                return off(x, *args, **kwargs)
            if plain or bool((factors == 1).all()):
                return on(x, *args, **kwargs)
            return blend(factors, x, *args, **kwargs)

        def blend(factors: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            adapted, bare = on(x, *args, **kwargs), off(x, *args, **kwargs)
            if not torch.is_tensor(adapted):
                raise InterventionError(f"{name} gives several outputs, which cannot be switched row by row.", "Switch it for all rows.")
            return torch.lerp(bare, adapted, _along(factors, adapted).expand_as(adapted))

        return forward

    def _scaled(self, number: int) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
            if self.rows is not None:
                return output * _along(self.rows[:, number], output)
            if self.levels is None or self.levels[number] == 1 or (self.only_training and not module.training):
                return None
            return output * self.levels[number]

        return hook

    def _level(self, number: int) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            assert self._tensor is not None
            if self.only_training and not module.training:
                return output
            return output * self._tensor[number].to(output.dtype)

        return hook


def _along(factors: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """(batch,) factors for an output of (batch, ...) or, from modules that flatten, (batch * length, ...)."""
    if output.shape[0] % len(factors):
        raise InterventionError(f"{len(factors)} rows of factors do not fit a batch of {output.shape[0]}.", "Give one row for each.")
    each = factors.to(output.device, output.dtype).repeat_interleave(output.shape[0] // len(factors))
    return each.view(-1, *(1,) * (output.ndim - 1))


def _peft_arguments() -> set[str]:
    """Arguments of a forward pass that are peft's own and not the base layer's."""
    from peft.tuners.lora import layer

    return {"adapter_names", *getattr(layer, "VARIANT_KWARG_KEYS", ())}
