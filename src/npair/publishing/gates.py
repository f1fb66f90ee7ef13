"""Decide whether one network may take the place of another, by what both find in val."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from npair.publishing import PublishError
from npair.scoring.intervals import difference
from npair.serving.manifest import Accepted, Comparison

# Whether each val photo's nearest neighbour has its label, by kind of label.
Hits = Mapping[str, Sequence[bool]]

RECALL_DROP = 0.01  # of Recall@1 on val, below the pinned version's, for fine or coarse labels
UNPROVEN = "warning: {}; so few photos cannot tell such a drop from chance"
COST_RISE = 1.5  # times the pinned version's milliseconds per photo, or bytes


@dataclass(frozen=True)
class RecallDrop:
    """A drop of Recall@1 on val that matters; ``proven`` if chance alone does not explain it."""

    text: str
    proven: bool


def changes(before: Hits, after: Hits, name: str) -> dict[str, str]:
    """Say how Recall@1 changed, by kind of label. name: what found ``before``, in words."""
    return {
        kind: f"Recall@1 on val, of {kind} labels, is {np.mean(after[kind]):.3f}; {name} has"
        f" {np.mean(old):.3f}: {difference(old, after[kind])} on {len(old):,} photos"
        for kind, old in before.items()
    }


def recall_drops(before: Hits, after: Hits, name: str, allowed: float) -> list[RecallDrop]:
    """List the kinds of labels in which recall dropped by more than ``allowed``."""
    found = {kind: difference(old, after[kind]) for kind, old in before.items()}
    texts = changes(before, after, name)
    return [
        RecallDrop(texts[kind], proven=change.high < 0)
        for kind, change in found.items()
        if -change.value > allowed
    ]


@dataclass(frozen=True)
class Gate:
    """Compares a new version with the pinned one, and refuses it without a reason.

    pinned: the number of that version.
    accept_recall_drop, accept_cost: why the new version may be worse.
    """

    pinned: int
    accept_recall_drop: str
    accept_cost: str

    def check_recall(self, before: Hits, after: Hits) -> Accepted | None:
        """Return the drop that was accepted, if there is one.

        Raises: PublishError for a drop beyond chance that was not accepted.
        """
        found = recall_drops(before, after, f"version {self.pinned}", RECALL_DROP)
        problem = "; ".join(drop.text for drop in found if drop.proven)
        return _accepted(problem, "--accept-recall-drop", self.accept_recall_drop)

    def tell_recall(self, before: Hits, after: Hits) -> list[str]:
        """Say how recall changed, with a warning for each drop that may be chance."""
        name = f"version {self.pinned}"
        doubtful = [
            UNPROVEN.format(drop.text)
            for drop in recall_drops(before, after, name, RECALL_DROP)
            if not drop.proven
        ]
        return doubtful or [*changes(before, after, name).values()]

    def check_cost(self, compared: Comparison) -> Accepted | None:
        """Return the rise that was accepted, if there is one.

        Raises: PublishError for a rise that was not accepted.
        """
        costs = ("ms a photo", compared.milliseconds), ("bytes", compared.bytes)
        problem = "; ".join(
            f"it takes {after:,} {unit}; version {self.pinned} takes {before:,}"
            for unit, (before, after) in costs
            if after > COST_RISE * before
        )
        return _accepted(problem, "--accept-cost", self.accept_cost)


def _accepted(problem: str, flag: str, reason: str) -> Accepted | None:
    if problem and not reason:
        raise PublishError(f"{problem}; nothing was published; to publish it anyway: {flag} REASON")
    return Accepted(problem, reason) if problem else None
