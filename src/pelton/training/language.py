"""What transformers' trainer takes for granted of language models' losses, and what is so for every model."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor
from transformers.trainer_pt_utils import LabelSmoother


@dataclass
class Smoother(LabelSmoother):  # type: ignore[misc]
    """transformers' label smoothing, told by the task whether labels are shifted.

    transformers asks a list of class names, on which models of one's own are not.

    Attributes:
        shifts: Whether logits are compared with the next label, as a decoder's are.
    """

    shifts: bool = False

    def __call__(self, model_output: Any, labels: Tensor, shift_labels: bool = False, **options: Any) -> Tensor:
        """Returns the smoothed loss."""
        return cast(Tensor, super().__call__(model_output, labels, self.shifts, **options))


def divides_by_tokens(model: Any) -> bool:
    """Tells whether a language model divides its loss by the number of tokens that it is told.

    Most do, by transformers' `loss_function`; some take the mean of their own batch whatever they are told.
    """
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    try:
        source = inspect.getsource(type(plain).forward)
    except (OSError, TypeError):  # compiled, or typed into a console
        return True
    return "loss_function" in source or "num_items_in_batch" in source
