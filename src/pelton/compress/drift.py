"""The drift of a run's gates: new examples against those that the run's gates were recorded on.

A run whose gates were frozen is revived in memory: the gates that it had before are compared, on both sides, and the
folder stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pelton.compress.rows import reads_targets
from pelton.compress.steps import adapter_of, revive
from pelton.errors import DataError, TrainingError
from pelton.insight.drift import GateDrift, gate_drift
from pelton.insight.monitor import names_of, revivable
from pelton.tasks.files import read_table
from pelton.tasks.load import load_task
from pelton.training.folder import RunFolder
from pelton.training.gate_values import gate_frame, spread
from pelton.training.run import Run


def drift_run(
    path: Path, data: Path | None = None, *, texts: Sequence[str] = (), pairs: Sequence[str] | None = None
) -> GateDrift:
    """Compares a run's gates on new examples with those that it recorded when it was trained, or changed last.

    Args:
        path: The run's folder; it stays as it is.
        data: A file with the task's columns; labels are not needed, except where the model reads its targets.
        texts: Instead of a file.
        pairs: The second of each pair of texts.

    Raises:
        TrainingError: the folder is no finished run, or its recorded gates cannot be read.
        DataError: the examples are not those of the task.
        AdapterError: the run has no adapter, or its gates were always constant.
    """
    run = Run.load(path)
    tuner, adapter = adapter_of(run.model, None)
    features = _features(run, data, texts, pairs)
    pruned = revivable(tuner.peft_config[adapter])
    if tuner.peft_config[adapter].gate_spec.static and tuner.peft_config[adapter].steps:
        revive(run.model)
        known = spread(load_task(run.recipe.task, run.recipe.training.seed).some())
        reference = gate_frame(run, run.task.judged(known, run.processor))
    else:
        reference = _recorded(run.folder)
    return gate_drift(reference, gate_frame(run, features), pruned=names_of(tuner, pruned))


def _recorded(folder: RunFolder) -> pd.DataFrame:
    """Reads the gate values that a run recorded."""
    try:
        return pd.read_parquet(folder.gate_values)
    except (OSError, ValueError) as error:  # pyarrow's own are of these
        raise TrainingError(
            f"{folder.gate_values} holds the gates that new ones are compared with, but cannot be read "
            f"({type(error).__name__}). Copy it from where the run was trained, or write it anew by a pass over the "
            "run, such as pelton shrink."
        ) from error


def _features(run: Run, data: Path | None, texts: Sequence[str], pairs: Sequence[str] | None) -> Any:
    """Encodes new examples as the reference was encoded: with targets where the task's judging reads them."""
    task = run.task
    if not reads_targets(task):
        inputs = task.from_texts(texts, pairs) if data is None else task.check_inputs(read_table(data))
        return task.encode(inputs, run.processor)
    if data is None:
        raise DataError(
            f"{task.settings.kind} reads its targets, and so do the gates. Give a file with texts and targets: --data."
        )
    return task.judged(task.check(read_table(data)), run.processor)
