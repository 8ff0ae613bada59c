"""The files around a payload as they will be, from manifest and plan alone; no stage, and on request alone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from builder.base import find_legal_files, locate_base
from builder.manifest import Manifest
from builder.stages.assemble import write_licenses
from builder.stages.card import write_files
from builder.stages.leavings import PREVIEW
from builder.stages.plan import gather_obligations, lay_out
from builder.stages.workspace import Workspace


def preview(workspace: Workspace) -> Path:
    """Render card, snippets, licence texts and notice, whatever of the release is built already.

    Returns the folder, which is no part of the artifact. Raises BuildError or Problems for what `plan` refuses, and for
    a licence text that has to be carried and is nowhere.
    """
    from builder.render import render_card

    manifest, folder = workspace.manifest, workspace.folder / PREVIEW
    outcome = lay_out(workspace, with_data=False)
    receipt = {"facts": outcome.facts, "circumstances": outcome.circumstances}
    with find_license_files(manifest) as base:
        files = render_card(manifest, {"plan": receipt}, gather_obligations(workspace, find_legal_files(base)))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if manifest.release.compatibility.license_texts:
            write_licenses(workspace, folder, base)
    write_files(folder, files)
    return folder


@contextmanager
def find_license_files(manifest: Manifest) -> Iterator[Path]:
    """A folder with the base's licence files: the base where it lies here, else stand-ins for what it must bring."""
    from builder.licenses import LICENSES

    base = manifest.release.base
    if folder := locate_base(manifest):
        yield folder
        return
    with TemporaryDirectory() as name:
        for id in base.licenses:
            if LICENSES[id].requires_text and not LICENSES[id].shipped and id not in base.license_files:
                text = f"In the release, this is {base.model}'s own file: the text of {LICENSES[id].title}.\n"
                (Path(name) / f"LICENSE.{id}").write_text(text, "utf-8")
        yield Path(name)
