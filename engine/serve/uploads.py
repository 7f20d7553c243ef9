"""Reads what a caller uploads, and notices when he hangs up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from starlette.requests import Request

from rollflow.serve.reward_bodies import Refused


class Upload:
    """The body of a call, whose length is bounded whatever its head says.

    Args:
        request: the call.
        most: bytes.
        patience: seconds without a byte.
        whole: seconds of all of it.
    """

    def __init__(self, request: Request, most: int, patience: float, whole: float):
        self.request, self.most, self.patience, self.whole = request, most, patience, whole
        self.over = False

    async def _part(self) -> bytes:
        message = await self.request.receive()
        if message["type"] == "http.disconnect":
            self.over = True
            raise Refused(499, "the caller is gone")
        self.over = not message.get("more_body", False)
        return message.get("body", b"")

    async def read(self, hold: Callable[[int], None]) -> bytes:
        """All of it.

        Args:
            hold: is told the size of each part, and may raise.

        Raises:
            Refused: it is too long, or does not come.
        """
        too_long = Refused(413, f"the body has more than {self.most} bytes: send fewer images in a call")
        declared = self.request.headers.get("Content-Length", "0")
        if declared.isdecimal() and int(declared[:20]) > self.most:
            raise too_long
        parts, length, clock = list[bytes](), 0, asyncio.get_running_loop().time
        end = clock() + self.whole
        while not self.over:
            left = end - clock()
            try:
                parts.append(await asyncio.wait_for(self._part(), min(left, self.patience)))
            except asyncio.TimeoutError as error:
                what = f"no byte of the body came for {self.patience:g} s"
                if left <= self.patience:
                    what = f"the body did not come within {self.whole:g} s: send fewer images in a call"
                raise Refused(408, what) from error
            length += len(parts[-1])
            hold(len(parts[-1]))
            if length > self.most:
                raise too_long
        return b"".join(parts)

    async def discard(self, most: int, seconds: float) -> None:
        """Reads on for a while: a client that still sends would not see an answer otherwise, but a broken pipe."""
        left = most

        async def rest() -> None:
            nonlocal left
            while not self.over and left > 0:
                left -= len(await self._part())

        with suppress(asyncio.TimeoutError, Refused):
            await asyncio.wait_for(rest(), seconds)


async def gone(request: Request) -> None:
    """Returns when the caller has hung up; its body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
