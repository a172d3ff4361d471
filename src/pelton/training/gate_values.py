"""Gate values of a run's model: on which examples, as a table, and in the run's folder."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd

from pelton.gates.recording import record_gates
from pelton.tasks import sampling
from pelton.tasks.base import Examples
from pelton.training.run import Run
from pelton.tuner.summary import gate_summary

GATE_EXAMPLES = 512


def record_run_gates(run: Run, examples: Examples) -> None:
    """Writes gate values on some of the examples, and their means by block."""
    frame = gate_frame(run, run.task.judged(spread(examples), run.processor))
    frame.to_parquet(run.folder.gate_values, index=False)
    run.folder.write("gates", json.loads(gate_summary(run.model, frame).to_json(orient="records")))


def spread(examples: Examples, most: int = GATE_EXAMPLES) -> Examples:
    """Returns some of the examples, of all classes."""
    return examples.take(sampling.spread(len(examples), most))


def gate_frame(run: Run, features: Any) -> pd.DataFrame:
    """Returns the gate values of a run's model on features, by block, method and example; see `GateLog.to_frame`."""
    with record_gates(run.model) as log:
        run.forward(features)
    frame = log.to_frame()
    if "example" in features.column_names:  # the log counts features
        of, seen = np.asarray(features["example"]), frame["example"] >= 0
        frame.loc[seen, "example"] = of[frame.loc[seen, "example"]]
    return frame
