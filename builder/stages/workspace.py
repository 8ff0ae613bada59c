"""A release, the folder it is built in, and the receipts there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.files import read_receipt, sha256_file
from builder.manifest import Manifest


class NotYetError(Exception):
    """A receipt that a stage reads is not there: an earlier stage has to run first."""


@dataclass(frozen=True)
class Workspace:
    """A release and the folder it is built in.

    renews: whether its lock is written again from this build, whatever it says now.
    """

    manifest: Manifest
    folder: Path
    renews: bool = False

    @property
    def receipts(self) -> Path:
        return self.folder / "receipts"

    @property
    def calibration(self) -> Path:
        return self.folder / "calibration"

    @property
    def parts(self) -> Path:
        return self.folder / "parts"

    @property
    def artifact(self) -> Path:
        return self.folder / "artifact"

    @property
    def lock_path(self) -> Path:
        return self.manifest.path.with_suffix(".lock.json")

    def receipt_path(self, stage: str) -> Path:
        return self.receipts / f"{stage}.json"

    def receipt(self, stage: str) -> dict[str, Any] | None:
        """A stage's receipt; None if it is missing, torn or altered."""
        found = read_receipt(self.receipt_path(stage))
        return found if found and found["stage"] == stage else None

    def facts(self, stage: str) -> dict[str, Any]:
        """What an earlier stage established. Raises NotYetError if it has not run."""
        receipt = self.receipt(stage)
        if receipt is None or not receipt["key"]:
            raise NotYetError(stage)
        facts: dict[str, Any] = receipt["facts"]
        return facts

    def circumstances(self, stage: str) -> dict[str, Any]:
        """What a stage noted that decides nothing; empty if it has not run."""
        receipt = self.receipt(stage)
        return receipt["circumstances"] if receipt else {}

    def base_folder(self) -> Path:
        """Where the fetched base is. Raises NotYetError before it is fetched."""
        self.facts("fetch")
        return Path(self.circumstances("fetch")["folder"])

    def digest_file(self, path: str) -> str | None:
        """sha256 of a file that the manifest names; None if it is not there, which the stage itself reports."""
        resolved = self.manifest.resolve(path)
        return sha256_file(resolved) if resolved.is_file() else None
