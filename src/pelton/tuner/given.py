"""What is given to a PeltonConfig: made into specs, or refused with what to write instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from peft import PeftConfig, TaskType

from pelton.arguments import ADVICE, ALIASES, did_you_mean, parameters, unknown_argument
from pelton.errors import ArgumentError, SpecError, UnknownArgument, nearest, unknown
from pelton.gates import GATES, FixedGate, GateSpec, GumbelGate, MLPGate
from pelton.methods import METHODS, Bottleneck, DilatedAttention, LoRA, MethodSpec, Prefix
from pelton.methods.base import allowed_sites
from pelton.registry import Spec

_INSTEAD = {
    "LORA": "LoRA(rank={r}, alpha={lora_alpha}, dropout={lora_dropout})",
    "IA3": "IA3()",
    "PREFIX_TUNING": "Prefix(prefix_length={num_virtual_tokens})",
}
"""What stands for a config of PEFT, by its name there; other methods are wrapped in `Peft`."""


def parse_methods(value: object) -> tuple[MethodSpec, ...]:
    """Makes specs of a list of methods.

    Raises:
        SpecError: it is no list, it is empty, it names a kind twice, or something in it is no method.
    """
    if isinstance(value, str | Mapping | Spec | PeftConfig) or not isinstance(value, Iterable):
        raise SpecError(f"methods is a list, but got {_shown(value)}. {_bracketed(value)}")
    specs = tuple(parse_method(one) for one in value)
    kinds = [spec.kind for spec in specs]
    if not kinds:
        raise SpecError("`len(methods) >= 1` must hold, but got methods=[]. Leave it out for the default.")
    twice = sorted({kind for kind in kinds if kinds.count(kind) > 1})
    if twice:
        raise SpecError(
            f"`every kind of method is named once` must hold, but got {', '.join(twice)} twice in {kinds}. "
            "Give one spec all its sites instead."
        )
    return specs


def parse_method(value: object) -> MethodSpec:
    """Makes a spec of one method; of a config of PEFT it is said which spec that is."""
    if isinstance(value, PeftConfig):
        raise SpecError(
            f"A method is a spec, a name or a mapping with a 'kind', but got {_shown(value)}. "
            f"Write {_ours(value)} and say by `sites` where it goes."
        )
    return METHODS.parse(cast(Any, value))


def parse_gate(value: object) -> GateSpec:
    """Makes a spec of a gate; constants alone are refused with the gate that holds them."""
    constant = isinstance(value, int | float) or (isinstance(value, Mapping) and value and set(value) <= set(METHODS))
    if value is None or constant:
        advice = "Leave it out for the default." if value is None else f"Write gate=FixedGate({value!r})."
        raise SpecError(f"A gate is a spec, a name or a mapping with a 'kind', but got {value!r}. {advice}")
    return GATES.parse(cast(Any, value))


def parse_names(value: Any) -> list[str] | None:
    """Makes a list of `modules_to_save`; one text is no list of names, and PEFT would go through its letters."""
    if value is None:
        return None
    names = list(value) if isinstance(value, Iterable) and not isinstance(value, str | Mapping) else [None]
    if not all(isinstance(name, str) for name in names):
        one = value if isinstance(value, str) else "classifier"
        raise ArgumentError(
            f"modules_to_save is a list of names, but got {value!r}. Write a list such as modules_to_save=[{one!r}]."
        )
    return cast(list[str], names)


def check_task(value: object) -> None:
    """Refuses a kind of task that PEFT does not know, and methods in its place, which is the first."""
    known = [str(task.value) for task in TaskType]
    if value is None or value in known:
        return
    guess = nearest(value, [name.lower() for name in known])
    hint = f"Did you mean {guess.upper()!r}?" if guess else ""
    if not isinstance(value, str):
        hint = "It is the first argument: name the others, PeltonConfig(methods=[…], gate=…)."
    raise unknown("task_type", value, known, hint)


def settled(methods: Sequence[Any], gate: GateSpec, common: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a config whose methods and gate are settled, with what all configs take.

    Raises:
        ArgumentError: other methods or another gate are among them.
    """
    whole = {"methods": list(methods), "gate": gate}
    other = {name: common[name] for name in whole if name in common}
    if other:
        said, better = (", ".join(f"{k}={v!r}" for k, v in given.items()) for given in (other, whole | other))
        raise ArgumentError(f"Methods and gate are settled here, but got {said}. Write PeltonConfig({better}).")
    return {**whole, **common}


def refused_arguments(cls: type, names: Sequence[str]) -> UnknownArgument:
    """Builds the error for arguments that PeltonConfig does not have.

    PEFT leaves out, with a warning, what it has been told of as an "unexpected keyword argument": so files load that a
    later PEFT wrote. That is said of names alone that are like none of Pelton's, so misspelt keys are not left out.
    """
    known = parameters(cls)
    for name in names:
        hint = " ".join(s for s in (_place(name, names), ADVICE.get(name)) if s)
        if hint or nearest(name, known, likeness=0.8):
            return unknown_argument(cls, name, hint or did_you_mean(name, known))
    hint = did_you_mean(names[0], known)
    said = f" {hint}" if hint else ""
    return UnknownArgument(
        f"{cls.__name__} got an unexpected keyword argument {names[0]!r}.{said} Known: {', '.join(sorted(known))}."
    )


_OWNERS: tuple[tuple[str, tuple[type[Spec], ...]], ...] = (
    ("methods=[{}]", (LoRA, Bottleneck, Prefix, DilatedAttention)),
    ("gate={}", (MLPGate, FixedGate, GumbelGate)),
)


def _place(name: str, names: Sequence[str]) -> str | None:
    """Says to which method or gate an argument belongs, together with the others that do; None where it is unknown."""
    ours = list(dict.fromkeys(ALIASES.get(one, one) for one in names))
    for form, specs in _OWNERS:
        for spec in specs:
            if ALIASES.get(name, name) in parameters(spec):
                given = ", ".join(f"{one}=…" for one in ours if one in parameters(spec))
                where = f" {allowed_sites(spec)}" if issubclass(spec, MethodSpec) and "sites=" in given else ""
                return f"Write {form.format(f'{spec.__name__}({given})')}.{where}"
    return None


def _shown(value: object) -> str:
    """Shows what was given; of PEFT's configs, which fill a page, the class."""
    return f"a {type(value).__name__} of PEFT" if isinstance(value, PeftConfig) else repr(value)


def _ours(config: PeftConfig) -> str:
    """Writes the spec that stands for a config of PEFT."""
    name = "DORA" if getattr(config, "use_dora", False) else str(getattr(config.peft_type, "value", config.peft_type))
    wrapped = f"Peft(config={type(config).__name__}(…))"
    return _INSTEAD[name].format_map(vars(config)) if name in _INSTEAD else wrapped


def _bracketed(value: object) -> str:
    """Says how what was given instead of a list is written in one."""
    if isinstance(value, PeftConfig):
        return f"Write methods=[{_ours(value)}]."
    if isinstance(value, type) and issubclass(value, MethodSpec):
        return f"Write methods=[{value.__name__}()]."
    if isinstance(value, Mapping) and value and set(value) <= set(METHODS):
        rows = [{"kind": kind, **row} if isinstance(row, Mapping) else {"kind": kind} for kind, row in value.items()]
        return f"Write methods={rows!r}."
    if isinstance(value, str | Mapping | MethodSpec):
        return f"Put it in brackets: methods=[{value!r}]."
    return "Name kinds or specs in it: methods=['lora', Bottleneck()]."
