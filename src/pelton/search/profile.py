"""Measures what methods cost: each in all blocks of a backbone, next to the plain backbone, in the same rounds."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from pelton.anatomy import Anatomy, find_anatomy
from pelton.errors import AnatomyError, SpecError
from pelton.insight.latency import Ratio, Stopwatch, Timer
from pelton.methods import IA3, LINEAR_SITES, BitFit, Bottleneck, DilatedAttention, LoRA, MethodSpec, Prefix
from pelton.registry import require_size
from pelton.search.flops import parameters_of
from pelton.search.latency_table import Entry, LatencyTable, load_table, plain_spec, table_path
from pelton.tuner.config import PeltonConfig
from pelton.tuner.twin import twin

SHAPES = ((1, 32), (8, 64))
"""Examples and tokens of the inputs that are timed by default."""
ROUNDS = 11

Tell = Callable[[str], None]


def default_probes() -> list[MethodSpec]:
    """Returns methods that tell the terms of the time model apart: every method, site by site, at two sizes."""
    loras = [LoRA(rank=8, sites=(site,)) for site in LINEAR_SITES]
    loras += [LoRA(rank=32, sites=("attn.q",)), LoRA(rank=32, sites=("ffn.in",)), LoRA(rank=8, sites=LINEAR_SITES)]
    bottlenecks = [Bottleneck(16), Bottleneck(64), Bottleneck(16, sites=("attn.out",))]
    small = [IA3(sites=("attn.k",)), IA3(sites=("ffn.out",)), IA3(), BitFit(sites=("attn.q",)), BitFit()]
    return [*loras, *bottlenecks, Prefix(4), Prefix(16), *small, DilatedAttention(segment=16, dilation=2)]


def machine_of(model: nn.Module) -> dict[str, Any]:
    """Returns what times belong to: the backbone's sizes, the device and the versions, as JSON."""
    anatomy = find_anatomy(model)
    parameter = next(model.parameters())
    shapes = [
        (
            b.hidden_size,
            b.heads,
            b.head_dim,
            b.kv_heads,
            {s: [(p.in_features, p.out_features) for p in ps] for s, ps in b.sites.items()},
        )
        for b in anatomy.blocks
    ]
    config = getattr(model, "config", None)
    return {
        "model_type": anatomy.model_type,
        "blocks": len(anatomy.blocks),
        "backbone": hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16],
        "attention": str(getattr(config, "_attn_implementation", None)),
        "dtype": str(parameter.dtype),
        "device": _device(parameter.device),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft")},
    }


def profile(
    model: nn.Module,
    probes: Sequence[MethodSpec] | None = None,
    *,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    rounds: int = ROUNDS,
    again: bool = False,
    path: Path | None = None,
    timer: Callable[[Sequence[dict[str, Tensor]], int], Timer] | None = None,
    tell: Tell = lambda line: None,
) -> LatencyTable:
    """Measures what is not in the cache yet, and returns the table with it.

    Args:
        model: A plain backbone of text, on the device that is to be timed; it is not changed.
        probes: Methods; `default_probes` that the backbone can take when not given. `layers` does not matter: they are
            measured in all blocks.
        shapes: Examples and tokens of the inputs.
        rounds: How often each is run; two at least.
        again: Measures also what is in the cache.
        path: The table; in the cache when not given.
        timer: Makes what times models on batches; the `Stopwatch` when not given.
        tell: Gets a line before each set of measurements.

    Raises:
        AnatomyError: a probe has no place in the backbone.
        AdapterError: the table of `path` belongs to another backbone, device or version.
    """
    for rows, tokens in shapes:
        require_size(rows=rows, tokens=tokens)
    anatomy, machine = find_anatomy(model), machine_of(model)
    place = table_path(machine) if path is None else path
    table = load_table(place, machine, anatomy) if place.is_file() else LatencyTable(machine, anatomy.blocks)
    with _frozen(model):
        if probes is None:
            probes = [spec for spec in default_probes() if _fits(spec, model)]
        for rows, tokens in shapes:
            missing = [spec for spec in probes if again or table.measured(spec, rows, tokens) is None]
            if missing:
                tell(f"{len(missing)} measurements at {rows} × {tokens} tokens")
                table = table.added(_measure(model, anatomy, missing, (rows, tokens), rounds, timer or _stopwatch))
                table.save(place)
    return table


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Lets no weight of the backbone learn for a while: what is attached to copies over them freezes them anyway."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad = requires_grad


def _measure(
    model: nn.Module,
    anatomy: Anatomy,
    probes: Sequence[MethodSpec],
    shape: tuple[int, int],
    rounds: int,
    timer: Callable[[Sequence[dict[str, Tensor]], int], Timer],
) -> list[Entry]:
    batch = _inputs(model, shape)
    adapted = [attached(model, spec) for spec in probes]
    ratios = timer([batch], rounds)(adapted, model)
    plain = kept_bytes(model, batch)
    return [
        _entry(spec, anatomy, shape, ratio, kept_bytes(one, batch) - plain)
        for spec, ratio, one in zip(probes, ratios, adapted, strict=True)
    ]


def _entry(spec: MethodSpec, anatomy: Anatomy, shape: tuple[int, int], ratio: Ratio, kept: int) -> Entry:
    size = sum(parameters_of(spec, block) for block in anatomy.blocks)
    times = (round(ratio.ratio, 6), round(ratio.spread, 6), ratio.reference)
    return Entry(plain_spec(spec), *shape, *times, len(anatomy.blocks), size, kept)


def _stopwatch(batches: Sequence[dict[str, Tensor]], rounds: int) -> Timer:
    """Makes the timer; one thread on a CPU is timed by its own clock, which other programs do not advance."""
    alone = batches[0]["input_ids"].device.type == "cpu" and torch.get_num_threads() == 1
    return Stopwatch(batches, rounds=rounds, clock=time.process_time if alone else time.perf_counter)


def attached(model: nn.Module, spec: MethodSpec) -> nn.Module:
    """Returns a copy over the same weights that has a method, ungated, in all blocks."""
    adapted: nn.Module = get_peft_model(twin(model), PeltonConfig.single({**spec.to_dict(), "layers": None}))
    return adapted


def kept_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Returns how many bytes a training step keeps for its backward pass, weights left out.

    Gradients flow through the whole backbone, as they do below the lowest method; storages count once.
    """
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with _learning(model), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept_alive = model(**batch)
    del kept_alive
    return sum(seen.values())


@contextmanager
def _learning(model: nn.Module) -> Iterator[None]:
    """Lets gradients flow from the first embedding on, for a while."""
    embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    handle = embeddings.register_forward_hook(lambda module, args, output: output.detach().requires_grad_())
    try:
        yield
    finally:
        handle.remove()


def _inputs(model: nn.Module, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Makes one batch of random tokens without padding."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "vocab_size", None) is None or getattr(config, "is_encoder_decoder", False):
        kind = getattr(config, "model_type", type(model).__name__)
        raise AnatomyError(f"Profiling runs encoders and decoders of text, and {kind!r} is neither.")
    room = getattr(config, "max_position_embeddings", None)
    if room is not None and shape[1] > room:
        raise SpecError(f"`tokens <= {room}` must hold for this backbone, but got tokens={shape[1]}.")
    ids = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    ids = ids.to(next(model.parameters()).device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _fits(spec: MethodSpec, model: nn.Module) -> bool:
    try:
        attached(model, spec)
    except (AnatomyError, SpecError):
        return False
    return True


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    """Returns the processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
