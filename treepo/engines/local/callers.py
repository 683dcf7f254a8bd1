"""Which callers the decoding waits for before its next step, so that their next requests share that step.

An answer wakes its caller only some turns of the event loop later. If decoding went on at once, the caller's next
requests would come a few steps too late, and rows of the batch would be empty in between. So the decoding waits for
every *expected* session: one that is open and has no unanswered request. Its caller will ask again or close.

A caller may also be busy with something else, such as another tree or an environment. So the wait is bounded, by turns
of the event loop and not by a clock. A session that uses up the wait is not expected until it has asked again.
"""

from __future__ import annotations

import asyncio

from treepo.engines.local.request_queue import Session


class ExpectedCallers:
    """The sessions of which the next request, or the end, is expected within a few turns of the event loop."""

    patience = 100  # turns of a wait: far more than a caller needs that has nothing else to wait for

    def __init__(self) -> None:
        self._sessions: set[Session] = set()

    def __contains__(self, session: Session) -> bool:
        return session in self._sessions

    def expect(self, session: Session) -> None:
        """The caller of `session` has been answered, or has just opened it."""
        if session.asks_again and not session.closed:
            self._sessions.add(session)

    def heard_from(self, session: Session) -> None:
        """The caller of `session` has asked or closed."""
        self._sessions.discard(session)

    async def wait(self) -> None:
        """Let the event loop turn, once at least, until no session is expected.

        After `patience` turns the sessions that are left are not expected any more.
        """
        for _ in range(self.patience):
            await asyncio.sleep(0)
            if not self._sessions:
                return
        self._sessions.clear()
