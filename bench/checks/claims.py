"""What a check finds: claims that held or were broken, where, and how large the error is beside the smallest that would be seen."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """One claim, tested.

    Attributes:
        name: what kind of claim, in one or two words.
        holds: None if it could not be tested.
        where: the world and K.
        says: what was found, in a sentence.
        off: the error, relative to what `says` names; nan where there is no size.
        detectable: the smallest error that would have been seen, likewise.
        group: of parameters, if it is of one.
    """

    name: str
    holds: bool | None
    where: str
    says: str
    off: float = math.nan
    detectable: float = math.nan
    group: str = ""

    @property
    def place(self) -> str:
        """Group, world and K."""
        return f"{self.group}, {self.where}" if self.group else self.where


class Broken(Exception):
    """A claim that does not hold, or an estimator that cannot be run; the message is a sentence."""
