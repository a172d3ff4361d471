"""ONNX: one file that ONNX Runtime and others run, with free sizes of batch and text.

It holds whatever the model is: dynamic gates are part of the graph, frozen gates are constants in it, and a folded
model is its plain backbone. Freezing and folding first makes the file smaller and faster.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from pelton.errors import AdapterError, TrainingError
from pelton.tuner.atomic import as_before
from pelton.tuner.controls import evaluating
from pelton.tuner.store import draft_beside, exchange

LIMIT = 1e-4
"""How far ONNX Runtime may be from the model, relative to its largest value where that is above 1."""

DECODER = "decoder_input_ids"

Inputs = Mapping[str, Tensor]


def to_onnx(model: nn.Module, path: Path | str, example: Inputs, *, tolerance: float = LIMIT) -> Path:
    """Writes a model as an ONNX file, after ONNX Runtime has agreed with it on the example and on twice its rows.

    What a model says at padding, where the example's mask is 0, means nothing and is not compared. Inputs have the
    example's names; outputs those of the model, such as `logits`. The first size of each input is free; of inputs
    [B, T] the second is too.

    Args:
        model: Any model, with or without adapters; it is left as it is.
        path: Of the file. Weights above what one file may hold lie beside it, in a file that ends in `.data`.
        example: All inputs that a forward needs, of two rows or more, without labels.
        tolerance: How far outputs may differ, relative to their largest value where that is above 1.

    Returns:
        The path.

    Raises:
        AdapterError: onnx is not installed, the example has one row or lacks an input, or what came out differs or
            does not run; nothing is written.
    """
    _require_installed()
    inputs = {name: value.detach() for name, value in example.items()}
    if not inputs or any(value.ndim == 0 or value.shape[0] < 2 for value in inputs.values()):
        shapes = {name: tuple(value.shape) for name, value in inputs.items()}
        raise AdapterError(f"Expected an example of two rows or more, so that the batch stays free, but got {shapes}.")
    place = Path(path)
    before = as_before(model)
    try:
        with draft_beside(place) as draft, evaluating(model), torch.no_grad():
            flat = _Flat(model, inputs)
            _export(flat, inputs).save(draft / place.name)
            twice = {name: torch.cat([value, value]) for name, value in inputs.items()}
            _check(flat, draft / place.name, [inputs, twice], tolerance)
            exchange(draft, place.absolute().parent)
    finally:
        before.put_back()  # tracing exchanges the modules' lists and dicts by copies
    return place


def run_to_onnx(path: Path, output: Path) -> Path:
    """Writes a run's model as `model.onnx` into a folder, with its tokenizer or image processor.

    Args:
        path: The run's folder.
        output: A new folder.

    Raises:
        TrainingError: the folder is no finished run, or the output exists.
        AdapterError: as `to_onnx` does; nothing is written.
    """
    from pelton.training.run import Run

    _require_installed()
    if output.exists():
        raise TrainingError(f"{output} exists. Name a new folder with --output.")
    run = Run.load(path)
    inputs = run.examples().inputs[:2]
    features = run.task.encode([*inputs, *inputs][:2], run.processor)
    batch = run.task.collator(run.processor)([features[0], features[1]])
    example = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    if run.task.peft_type == "SEQ_2_SEQ_LM":
        example[DECODER] = _begun(run.model, example["input_ids"])
    with draft_beside(output) as draft:
        to_onnx(run.model.cpu(), draft / "model.onnx", example)
        run.processor.save_pretrained(draft)
        draft.rename(output)
    return output / "model.onnx"


def _begun(model: Any, sources: Tensor) -> Tensor:
    """Returns what a decoder is given, its first token and more, [B, D]: never as many tokens as sources have."""
    configs = (getattr(model, "generation_config", None), model.config)
    starts = [getattr(config, "decoder_start_token_id", None) for config in configs]
    start = next((token for token in starts if token is not None), None)
    if start is None:
        raise AdapterError("The model's config has no decoder_start_token_id, with which its decoder begins. Set it.")
    width = 2 if sources.shape[1] != 3 else 3
    more = sources[:, :1].expand(-1, width)
    return torch.cat([torch.full_like(sources[:, :1], start), more], dim=1)


class _Flat(nn.Module):
    """A model that takes tensors in order and returns its tensors in order."""

    def __init__(self, model: nn.Module, example: Inputs) -> None:
        """Looks up which outputs are tensors."""
        super().__init__()
        self.model, self.inputs = model, list(example)
        cached = getattr(getattr(model, "config", None), "use_cache", None)
        self.more = {"use_cache": False} if cached else {}
        try:
            found = model(**example, **self.more)
        except (TypeError, ValueError) as error:
            lacks = getattr(getattr(model, "config", None), "is_encoder_decoder", False) and DECODER not in example
            hint = f". An encoder-decoder that writes needs {DECODER}, too." if lacks else ""
            given = ", ".join(self.inputs)
            raise AdapterError(f"The model does not run on the example ({given}): {error}{hint}") from error
        if not isinstance(found, Mapping):
            raise AdapterError(f"Expected a model that returns named outputs, but got {type(found).__name__}.")
        self.outputs = [str(name) for name, value in found.items() if isinstance(value, Tensor)]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Runs the model on its inputs, in the example's order."""
        found = self.model(**dict(zip(self.inputs, tensors, strict=True)), **self.more)
        return tuple(found[name] for name in self.outputs)


def _require_installed() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise AdapterError(f"ONNX needs {', '.join(missing)}. Install them with: pip install 'pelton[onnx]'")


def _export(flat: _Flat, inputs: Inputs) -> Any:
    """Returns torch's ONNX program of a model."""
    free = torch.export.Dim.DYNAMIC
    tokens = [value.ndim == 2 and not value.is_floating_point() for value in inputs.values()]
    sizes = tuple({0: free, 1: free} if several else {0: free} for several in tokens)
    with _quiet():
        return torch.onnx.export(
            flat,
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=flat.outputs,
            dynamic_shapes={"tensors": sizes},
            dynamo=True,
            verbose=False,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what the exporter says of itself."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _check(flat: _Flat, file: Path, batches: list[dict[str, Tensor]], tolerance: float) -> None:
    """Raises AdapterError unless ONNX Runtime gives the model's outputs."""
    for batch in batches:
        for name, wanted, found in zip(flat.outputs, flat(*batch.values()), _run(flat, file, batch), strict=True):
            real = _real(name, wanted, batch)
            wanted, found = wanted.float().cpu()[real], found.float()[real]
            away = float((wanted - found).abs().max() / wanted.abs().max().clamp_min(1))
            if not away <= tolerance:
                raise AdapterError(
                    f"ONNX Runtime differs from the model by {away:.2g} in {name!r}, above tolerance={tolerance:.2g}; "
                    "nothing is written. Give a larger tolerance for a backbone in half precision."
                )


def _run(flat: _Flat, file: Path, batch: Inputs) -> list[Tensor]:
    """Returns what ONNX Runtime makes of a batch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        taken = {one.name for one in session.get_inputs()}
        fed = {name: value.cpu().numpy() for name, value in batch.items() if name in taken}
        return [torch.from_numpy(value) for value in cast(list[Any], session.run(flat.outputs, fed))]
    except Exception as error:  # onnxruntime has no exception of its own that is public
        half = sorted({str(value.dtype) for value in flat.parameters()} & {"torch.bfloat16", "torch.float16"})
        hint = f" Export the model in float32 (model.float()) instead of {half[0]}." if half else ""
        raise AdapterError(
            f"ONNX Runtime cannot run the exported model ({error}); nothing is written.{hint}"
        ) from error


def _real(name: str, output: Tensor, batch: Inputs) -> Tensor:
    """Returns where an output is no padding: [B, T] of what has values for each token, else [B]."""
    decoder = DECODER in batch and not name.startswith("encoder_")
    mask = batch.get("decoder_attention_mask" if decoder else "attention_mask")
    if mask is None or output.ndim != 3 or output.shape[:2] != mask.shape or not mask.any():
        return torch.ones(output.shape[:1], dtype=torch.bool)
    return mask.cpu().bool()
