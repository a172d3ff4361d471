"""What the cost of a supernet adds to its loss.

The loss gets α · (latency − 1) + β · parameters / all, of what is expected (`costs.py`), and for a budget the augmented
Lagrangian of g = expected / budget − 1 ≤ 0 (Nocedal and Wright 2006, section 17.4):

    ( max(0, λ + ρ g)² − λ² ) / 2ρ,      λ ← max(0, λ + η g) after every step

so that the price of what is too much rises until the budget holds, and no weight has to be found by hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pelton.registry import require
from pelton.search.costs import Choices

RHO = 2.0
ETA = 0.05
"""How fast a multiplier grows, a step."""


@dataclass
class Budget:
    """One constraint, with its multiplier.

    Attributes:
        limit: What the expected cost may be at most.
        multiplier: λ.
    """

    limit: float
    multiplier: float = 0.0

    def term(self, expected: Tensor) -> Tensor:
        """Returns what the constraint adds to the loss."""
        push = (self.multiplier + RHO * (expected / self.limit - 1)).clamp_min(0.0)
        return (push.square() - self.multiplier**2) / (2 * RHO)

    def update(self, expected: float) -> None:
        """Moves the multiplier after a step."""
        self.multiplier = max(0.0, self.multiplier + ETA * (expected / self.limit - 1))


class Price:
    """What the cost of a supernet adds to its loss."""

    def __init__(
        self,
        choices: Choices,
        *,
        alpha: float = 0.0,
        beta: float = 0.0,
        parameters: float | None = None,
        latency: float | None = None,
    ) -> None:
        """Checks the weights and budgets.

        Args:
            choices: Says the costs.
            alpha: Weight of the expected time that is added, as a share of the backbone's.
            beta: Weight of the expected parameters, as a share of all.
            parameters: The most parameters that there may be.
            latency: The longest time, as a ratio to the backbone's.

        Raises:
            SpecError: a weight is negative, a budget cannot be met or always holds, or times have no table.
        """
        for name, weight in {"alpha": alpha, "beta": beta}.items():
            require(0 <= weight < math.inf, f"0 <= {name} < inf", **{name: weight})
        timed = alpha > 0 or latency is not None
        require(choices.timed or not timed, "alpha and budget_latency have a latency table", table=None)
        limits = {"parameters": parameters, "latency": latency}
        for name, value in limits.items():
            if value is not None:
                low, high = choices.range[name]
                shown = f"{math.ceil(low):,} <= budget_{name} <= {math.floor(high):,}"
                if name == "latency":
                    shown = f"{low:.4f} <= budget_{name} <= {high:.4f}"
                require(
                    low <= value <= high, f"{shown} (the cheapest part alone … everything)", **{f"budget_{name}": value}
                )
        self.choices, self.alpha, self.beta = choices, alpha, beta
        self.full = choices.range["parameters"][1]
        self.budgets = {name: Budget(float(limit)) for name, limit in limits.items() if limit is not None}

    @property
    def limits(self) -> dict[str, float]:
        """The budgets, by "parameters" and "latency"."""
        return {name: budget.limit for name, budget in self.budgets.items()}

    @property
    def scarce(self) -> list[str]:
        """The budgets whose constraint has a price: there would be more of these costs without it."""
        return [name for name, budget in self.budgets.items() if budget.multiplier > 0]

    def expected(self, probabilities: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """Returns the expected costs, by "parameters" and "latency"."""
        return {"parameters": self.choices.parameters(probabilities), "latency": self.choices.latency(probabilities)}

    def term(self, expected: Mapping[str, Tensor]) -> Tensor:
        """Returns what is added to the loss, a scalar."""
        free = self.beta * expected["parameters"] / self.full + self.alpha * (expected["latency"] - 1)
        return torch.stack([free, *(budget.term(expected[name]) for name, budget in self.budgets.items())]).sum()

    def update(self, expected: Mapping[str, Tensor]) -> None:
        """Moves the multipliers after a step."""
        for name, budget in self.budgets.items():
            budget.update(float(expected[name].detach()))
