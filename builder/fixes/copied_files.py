"""Files that must be the base's own: what three of the fixes have in common."""

from __future__ import annotations

from dataclasses import dataclass

from builder.artifact import Draft
from builder.fixes.fix import list_briefly


@dataclass(frozen=True)
class CopiedFiles:
    """patterns: names as `Path.glob` takes them; Python code is never meant."""

    patterns: tuple[str, ...]

    def find_different(self, draft: Draft) -> list[str]:
        """The files that the draft or the base has alone, or with other bytes."""
        names = {
            path.relative_to(folder).as_posix()
            for folder in (draft.base, draft.folder)
            for pattern in self.patterns
            for path in folder.glob(pattern)
            if path.is_file() and path.suffix != ".py"
        }
        return sorted(name for name in names if not draft.has_base_file(name))

    def detect(self, draft: Draft) -> str | None:
        told = []
        for name in self.find_different(draft):
            if not (draft.folder / name).is_file():
                told.append(f"{name} is missing")
            elif (draft.base / name).is_file():
                told.append(f"{name} differs from the base's")
            else:
                told.append(f"{name} is none of the base's files")
        return f"{list_briefly(told)}." if told else None

    def apply(self, draft: Draft) -> None:
        for name in self.find_different(draft):
            if (draft.base / name).is_file():
                draft.copy_from_base(name)
            else:
                draft.remove(name)
