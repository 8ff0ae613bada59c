"""Jobs one after the other, in this process: the simplest executor, and the one to debug with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from builder.executors import Job, Record, Work, perform, plan_calls, record_of


class InProcess:
    def run(self, work: Work, jobs: Sequence[Job]) -> Iterator[tuple[int, Record]]:
        calls = plan_calls(work, jobs)
        return ((index, record_of(perform(call))) for index, call in enumerate(calls))
