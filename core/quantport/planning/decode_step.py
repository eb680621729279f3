"""What a decode step reads: every weight once, but of an embedding only the row of one token."""

from __future__ import annotations

from dataclasses import dataclass

from quantport.model.roles import Role
from quantport.planning.plan import Plan
from quantport.planning.steps import Step


@dataclass(frozen=True)
class HeadShare:
    """What the output head of a model is of a decode step.

    Attributes:
        layer: Name of the layer that holds its weight: that of the embedding where they are tied.
        bytes: Bytes of its weight.
        step_bytes: Bytes of all weights that a decode step may read.
        at_least: True where experts are among them, of which a token reads only a few.
    """

    layer: str
    bytes: int
    step_bytes: int
    at_least: bool

    @property
    def share(self) -> float:
        """Share of the bytes that a decode step reads; where ``at_least``, the least that it can be."""
        return self.bytes / self.step_bytes

    def __str__(self) -> str:
        least = "at least " if self.at_least else ""
        return f"{self.layer}: {least}{self.share:.0%} of the bytes that a decode step reads"


def head_share(plan: Plan) -> HeadShare | None:
    """The share of the output head; None of a model without one."""
    read = [step for step in plan.steps if step.layer.loaded and _is_multiplied(step)]
    head = next((step for step in read if _is_head(step)), None)
    if head is None or not head.after:
        return None
    experts = any(step.layer.experts for step in read)
    return HeadShare(head.layer.name, head.after, sum(step.after for step in read), experts)


def _is_multiplied(step: Step) -> bool:
    return step.layer.role is not Role.EMBEDDING or bool(step.layer.tied)


def _is_head(step: Step) -> bool:
    return step.layer.role in (Role.HEAD, Role.EMBEDDING)
