"""The files of a run.

recipe.yaml        the resolved recipe: every default, absolute paths, the columns that were found
task.json          what the task found in the data: its classes, or its scale
data.json          how many examples each split has, which rows were drawn, what was changed or left out
adapter/           what was trained
model/             the whole model, where the backbone was trained
metrics.json       scores, trainable share, steps, seconds
history.jsonl      one line per logged step or evaluation
gates.parquet      gate values on some examples
gates.json         their means: one row per block
contributions.json gate value × gradient norm by block and method, where training.contribution_window asks for it
search.json        how a search searches, where the run is one; architecture.* and derived/ are what it found
changes.json       what passes did to the adapter after training, with the scores before and after
pictures.png       test images and what the run makes of them, where `pelton pictures` was asked
environment.json   versions
checkpoints/       what `resume` starts from
logs/              what TensorBoard shows
features/          encoded training rows, where `task.memory_map` asks for a file
state.json         the phase: training, interrupted, stopped, failed, trained, finished

In a distributed run only the main process makes and writes them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pelton.errors import TrainingError

if TYPE_CHECKING:
    from accelerate import PartialState

SEARCH = "search.json"
"""What a run that is a search has, which goes on by itself and not as a plain training."""

Phase = Literal["training", "interrupted", "stopped", "failed", "trained", "finished"]


def is_main_process() -> bool:
    """Tells whether this process is the one that writes: the only one, unless the run is distributed."""
    return bool(_processes().is_main_process)


def wait_for_main_process() -> None:
    """Waits until every process is here, so that what the main one has written can be read."""
    _processes().wait_for_everyone()


def count_processes() -> int:
    """Returns how many processes share a run."""
    return int(_processes().num_processes)


def _processes() -> PartialState:
    """Returns what accelerate knows of the processes; without an accelerator it must be told that they meet on CPUs."""
    import torch  # here, since who only reads a run's files needs neither
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


@dataclass(frozen=True)
class RunFolder:
    """A run's place on disk."""

    path: Path

    @classmethod
    def create(cls, output: Path, name: str) -> RunFolder:
        """Makes a new folder `output/name-time`, of which all processes learn; a counter is added where that exists."""
        from accelerate.utils import broadcast_object_list

        made = [str(cls._make(output, name)) if is_main_process() else ""]
        return cls(Path(broadcast_object_list(made)[0]))

    @staticmethod
    def _make(output: Path, name: str) -> Path:
        stem = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
        output.mkdir(parents=True, exist_ok=True)
        for suffix in ("", *(f"-{n}" for n in range(2, 1000))):
            path = output / f"{stem}{suffix}"
            try:
                path.mkdir()
            except FileExistsError:
                continue
            return path
        raise TrainingError(f"{output} holds a thousand runs named {stem}. Choose another output folder.")

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Opens a run's folder; anything else is an error."""
        if not (path / "recipe.yaml").is_file():
            raise TrainingError(
                f"{path} is not a run: it has no recipe.yaml. Expected a folder that `pelton fit` made."
            )
        return cls(path)

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def adapter(self) -> Path:
        """The trained adapter and head."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The whole trained model, where nothing was frozen."""
        return self.path / "model"

    @property
    def history(self) -> Path:
        """The log of training."""
        return self.path / "history.jsonl"

    @property
    def gate_values(self) -> Path:
        """Gate values by block, method and example."""
        return self.path / "gates.parquet"

    @property
    def checkpoints(self) -> Path:
        """The trainer's own folders."""
        return self.path / "checkpoints"

    @property
    def features(self) -> Path:
        """Encoded training rows that are not held in memory."""
        return self.path / "features"

    @property
    def logs(self) -> Path:
        """Where TensorBoard writes."""
        return self.path / "logs"

    @property
    def phase(self) -> Phase:
        """How far the run came."""
        state = self.read("state")
        if not isinstance(state, dict) or state.get("phase") not in get_args(Phase):
            raise self.broken("state.json", f"expected a phase ({', '.join(get_args(Phase))}), but got {state!r}")
        return state["phase"]  # type: ignore[no-any-return]

    def broken(self, name: str, reason: object) -> TrainingError:
        """Returns what is raised where a file or folder of the run cannot be used: which, why, and what to do."""
        why = " ".join(str(reason).split()) or type(reason).__name__
        return TrainingError(f"{self.path / name} is missing or broken ({why}). Copy the run's folder again, whole.")

    def set_phase(self, phase: Phase) -> None:
        """Notes how far the run came."""
        self.write("state", {"phase": phase})

    def last_checkpoint(self) -> Path | None:
        """Returns the newest checkpoint that was written to its end (the trainer's state is written last)."""
        whole = [path.parent for path in self.checkpoints.glob("checkpoint-*/trainer_state.json") if _is_json(path)]
        return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)

    def write_recipe(self, text: str) -> None:
        """Writes the recipe, which makes the folder a run."""
        if is_main_process():
            self.recipe.write_text(text, encoding="utf-8")

    def write(self, name: str, values: Any) -> None:
        """Writes `name`.json, whole or not at all."""
        if not is_main_process():
            return
        path = self.path / f"{name}.json"
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        draft.replace(path)

    def read(self, name: str) -> Any:
        """Reads `name`.json."""
        path = self.path / f"{name}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TrainingError(f"{path} cannot be read ({error}). Was the run finished?") from error


def _is_json(path: Path) -> bool:
    """Tells whether a file was written to its end."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
