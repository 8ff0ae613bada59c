"""The table of contents of a build: its stages, in order.

Each has a file that says what the stage is a function of (`read`), what it does (`run`) and whether what it left is
still there (`is_intact`). A stage leaves a receipt when it is done, and is current while the receipt's key is the
digest of what it reads now: its slice of the manifest, and facts from earlier receipts. Facts are what must repeat;
circumstances are times, hosts and the like, and decide nothing.
"""

from __future__ import annotations

from builder.stages import assemble, calibrate, card, fetch, lock, perplexity, plan, quantize, verify
from builder.stages.stage import Outcome, Stage, hold, is_current, make_key, run_stage
from builder.stages.workspace import NotYetError, Workspace

__all__ = ["STAGES", "NotYetError", "Outcome", "Stage", "Workspace", "hold", "is_current", "make_key", "run_stage"]

STAGES = (
    plan.STAGE,
    fetch.STAGE,
    calibrate.STAGE,
    quantize.STAGE,
    assemble.STAGE,
    verify.STAGE,
    perplexity.STAGE,
    lock.STAGE,
    card.STAGE,
)
