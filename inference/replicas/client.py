"""A client's socket at the front: its messages go into its session as they are."""

from __future__ import annotations

from starlette.websockets import WebSocket

from inference.replicas.session import FrontSession
from inference.serve.limits import Limits
from inference.serve.session_socket import NORMAL, SessionSocket


class ClientSocket(SessionSocket):
    """Holds a session of the front."""

    def __init__(
        self, session: FrontSession, socket: WebSocket, last_seq: int, limits: Limits
    ) -> None:
        super().__init__(session, socket, last_seq, limits)
        self._session = session

    async def _take(self, text: str | None, data: bytes | None) -> bool:
        await self._session.put(text, data, self._over)
        return True

    def _left(self) -> None:
        session = self._session
        if session.untouched and session.socket is None:  # no other one has taken it
            session.finish(NORMAL, "its client left before any input")
        if session.over and (session.untouched or self._done):
            session.front.forget(session)
