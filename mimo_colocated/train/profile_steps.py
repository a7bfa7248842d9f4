# SPDX-License-Identifier: Apache-2.0
"""Which steps ``mimo train --profile`` records, and on which ranks."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mimo_colocated.launch.errors import JobError

ALL = "all"
"""Every rank."""


@dataclass(frozen=True)
class Profile:
    """Steps to record.

    Attributes:
        first, last: steps, from 1, both recorded.
        ranks: that record; None for every one.
    """

    first: int
    last: int
    ranks: tuple[int, ...] | None

    @classmethod
    def parse(cls, steps: str, ranks: str) -> Profile:
        """Return what was typed.

        >>> Profile.parse("10-12", "0,3")
        Profile(first=10, last=12, ranks=(0, 3))
        >>> Profile.parse("7", "all")
        Profile(first=7, last=7, ranks=None)

        Args:
            steps: as ``--profile`` has them.
            ranks: as ``--profile-ranks`` has them.

        Raises:
            JobError: what is no range of steps, or no rank.
        """
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", steps)
        first, last = (0, 0) if found is None else (int(found[1]), int(found[2] or found[1]))
        if not 1 <= first <= last:
            raise JobError(
                f"--profile {steps}: give a step or a range of steps, counted from 1, such as "
                "10 or 10-12"
            )
        if ranks != ALL and not re.fullmatch(r"\d+(,\d+)*", ranks):
            raise JobError(f"--profile-ranks {ranks}: give ranks, such as 0,3, or {ALL}")
        chosen = None if ranks == ALL else tuple(sorted({int(each) for each in ranks.split(",")}))
        return cls(first, last, chosen)

    @property
    def typed(self) -> str:
        """The options, to be typed again."""
        ranks = ALL if self.ranks is None else ",".join(map(str, self.ranks))
        return f"--profile {self.first}-{self.last} --profile-ranks {ranks}"

    def check(self, steps: int, world: int) -> None:
        """Refuse steps and ranks that the run does not have.

        Args:
            steps: of the run.
            world: its ranks.

        Raises:
            JobError: the run ends before, or has fewer ranks.
        """
        if self.last > steps:
            raise JobError(
                f"--profile {self.first}-{self.last}: the run has training.steps={steps}; give "
                "steps up to that"
            )
        if self.ranks is not None and self.ranks[-1] >= world:
            raise JobError(
                f"--profile-ranks names rank {self.ranks[-1]}, and the run has {world}: "
                f"0 to {world - 1}"
            )

    def check_ahead(self, done: int) -> None:
        """Refuse steps that a run that goes on has made already.

        Raises:
            JobError: steps that are done.
        """
        if self.first <= done:
            raise JobError(
                f"--profile {self.first}-{self.last}: the run goes on after step {done}; give "
                f"steps from {done + 1} on, or --fresh to start anew"
            )

    @property
    def steps(self) -> range:
        """That are recorded."""
        return range(self.first, self.last + 1)

    def includes(self, rank: int) -> bool:
        """Return whether a rank records."""
        return self.ranks is None or rank in self.ranks
