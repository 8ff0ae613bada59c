"""What a user is told when something cannot go on: what is wrong, where, and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class BuildError(Exception):
    """A problem its reader can act on; printed as it is, without a traceback.

    what: one line, with the offending value.
    where: file:line and key, or file and tensor; empty if there is no place to point at.
    fix: what to do next, as a command or a valid value.
    """

    def __init__(self, what: str, where: str = "", fix: str = "") -> None:
        super().__init__(what, where, fix)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  in {self.where}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


class ManifestError(BuildError):
    """Something in releases/NAME.yaml, or between it and the base model, does not hold."""


class BaseError(BuildError):
    """The base model is missing, damaged, changed, or not what the manifest says."""


class LayoutError(BuildError):
    """A tensor cannot be laid out as the scheme or the file format needs it."""


class CalibrationError(BuildError):
    """Calibration rows or the statistics they gave are not usable."""


class ExecutorError(BuildError):
    """A worker, or the cluster it ran on, failed."""


class VerifyError(BuildError):
    """The finished artifact is not what it must be."""


class ArithmeticRefusal(BuildError):
    """Something whose bits would depend on the machine, or on nothing at all, where arithmetic has to be exact."""


class Problems(BuildError):
    """Several problems found together, reported together."""

    def __init__(self, problems: Iterable[BuildError]) -> None:
        self.problems = tuple(problems)
        super().__init__(f"{len(self.problems)} problems")

    def __reduce__(self) -> tuple[type[Problems], tuple[tuple[BuildError, ...]]]:
        return (Problems, (self.problems,))

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


def raise_all(problems: Sequence[BuildError]) -> None:
    """Raise what was found: nothing for none, the problem itself for one, Problems for several."""
    if problems:
        raise problems[0] if len(problems) == 1 else Problems(problems)


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of a `fix` sentence: the nearest valid name if there is one, then all of them."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    listed = ", ".join(names)
    return f"did you mean {close[0]}? Valid: {listed}" if close else f"use one of {listed}"
