"""The magnitudes that a lock records, beside those that calibration measures again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path

from builder.errors import CalibrationError
from builder.lock import RESTORE, Change, name_release, point_at

Table = Mapping[str, Mapping[str, str]]  # {module: {kind: hex float}}; a kind is weight, input, key or value

RECALIBRATED = 0.05  # the most by which native arithmetic may differ elsewhere; 0.016 is the most that was measured
MEASURING = ("the builder's number", "tokenizers", "torch", "transformers")  # the tools that magnitudes come from
EXACT_INSTEAD = "calibration.arithmetic: exact gives the same magnitudes on every machine"


@dataclass(frozen=True)
class Deviation:
    """One magnitude that is another than the lock's; None where only one of the two tables has it."""

    module: str
    kind: str
    locked: float | None
    found: float | None

    @property
    def relative(self) -> float:
        """Relative to the lock's; infinite for what cannot be compared, and for a weight, the same on any machine."""
        if self.kind == "weight" or not self.locked or not self.found:
            return inf
        ratio = abs(self.found - self.locked) / self.locked
        return ratio if isfinite(ratio) and min(self.locked, self.found) > 0 else inf

    def __str__(self) -> str:
        if self.locked is None:
            return f"the largest {self.kind} of {self.module} is {self.found} here, and the lock has none"
        if self.found is None:
            return f"the lock has a largest {self.kind} of {self.module}, {self.locked}, and none is measured here"
        return f"the largest {self.kind} of {self.module} is {self.found} here, and {self.locked} in the lock"


def list_deviations(locked: Table, found: Table) -> list[Deviation]:
    """What differs between two tables, the worst first."""
    deviations = []
    for module in sorted(locked.keys() | found.keys()):
        ours, theirs = found.get(module, {}), locked.get(module, {})
        for kind in sorted(ours.keys() | theirs.keys()):
            was, now = (float.fromhex(table[kind]) if kind in table else None for table in (theirs, ours))
            if was != now:
                deviations.append(Deviation(module, kind, was, now))
    return sorted(deviations, key=lambda deviation: -deviation.relative)


def count_inputs(table: Table) -> int:
    """How many magnitudes of a table are of activations."""
    return sum(kind != "weight" for kinds in table.values() for kind in kinds)


def describe_deviations(locked: Table, deviations: Sequence[Deviation]) -> str:
    """What calibrating here came to beside a lock's table, in one line."""
    num_inputs = count_inputs(locked)
    if not deviations:
        return f"calibrated here, all {num_inputs} input magnitudes are the lock's"
    worst = deviations[0]
    return (
        f"calibrated here, {len(deviations)} of {num_inputs} input magnitudes differ from the lock's, by "
        f"{100 * worst.relative:.2f} % at most at {worst.module} ({worst.found} here, {worst.locked} in the lock); "
        "the lock's make the bytes"
    )


@dataclass(frozen=True)
class Circumstances:
    """What may have made magnitudes differ.

    changes: the tools that are others than the lock's. locked, here: classes of machines; empty for exact arithmetic,
    which is the same on all of them. publishes: whether a lock may be written again from what is measured here.
    """

    arithmetic: str
    changes: Sequence[Change]
    locked: Sequence[str]
    here: Sequence[str]
    publishes: bool


def require_agreement(
    path: Path, deviations: Sequence[Deviation], circumstances: Circumstances, tolerance: float
) -> None:
    """Refuse magnitudes that are further from a lock's than a tolerance, relative to the lock's.

    path: the lock's. Raises CalibrationError naming the worst of them, both values and the likely cause.
    """
    if not deviations or deviations[0].relative <= tolerance:
        return
    worst, others = deviations[0], len(deviations) - 1
    what = str(worst) + (f"; {others} more differ" if others else "")
    where = point_at(path, "amax", worst.module, worst.kind)
    raise CalibrationError(what, where, explain_deviation(name_release(path), worst, circumstances))


def explain_deviation(name: str, worst: Deviation, circumstances: Circumstances) -> str:
    """The likely cause of a deviation, and what to do about it. The base and the rows are the lock's: they match."""
    changes = [change for change in circumstances.changes if change.tool in MEASURING]
    renew = f", or release what is measured here as a new one: doit relock:{name}" if circumstances.publishes else ""
    if changes:
        told = "; ".join(map(str, changes))
        return f"likely cause: {told}. Install the locked versions (`doit pin:{name}` says how){renew}"
    if worst.locked is None or worst.found is None:
        return f"likely cause: the builder's code measures something else than it did. Use the one of the lock{renew}"
    if worst.kind == "weight":
        return f"likely cause: the lock was changed, for the base is the locked one. {RESTORE.capitalize()}{renew}"
    if circumstances.arithmetic == "exact":
        return (
            "likely cause: a processor or memory that computes wrongly, a lock that was changed, or a change in the "
            "builder's code: base, rows and versions are the lock's. Calibrate again, here and on another machine"
        )
    locked, here = (", ".join(classes) for classes in (circumstances.locked, circumstances.here))
    if locked != here:
        return f"likely cause: native arithmetic on {here} instead of {locked}. {EXACT_INSTEAD}{renew}"
    return f"likely cause: native arithmetic on another machine of the same class, {here}. {EXACT_INSTEAD}{renew}"
