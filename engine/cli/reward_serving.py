"""`rollflow reward-server`: rewards for the reward `http` of engines elsewhere."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from rollflow.cli.options import by_default
from rollflow.errors import RequestError, shown

if TYPE_CHECKING:
    from rollflow.serve.reward_server import RewardServer

Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="REWARD ...", help_behavior_hint="(required)")]
Device = Annotated[str | None, by_default("cuda where there is one, else cpu", metavar="NAME")]
KeyFile = Annotated[Path | None, by_default("no key is asked for, and --host is this machine", metavar="FILE")]
_ALIAS = re.compile(r"([A-Za-z][\w-]*)=(.+)", re.DOTALL)


@dataclass(frozen=True)
class RewardServing:
    """Serve rewards to engines on other machines, which use them as --reward http:url=http://HOST:9000/score/NAME.

    A reward is given as in --reward of other commands, and NAME=REWARD gives it another name in the address. Images of
    calls that wait at the same time are judged together. SIGTERM ends it when what was sent is answered.
    """

    rewards: tyro.conf.Positional[Names]
    """The rewards; /score is the first one's."""
    host: str = "127.0.0.1"
    """Address to listen at; another than this machine's own takes --api-key-file."""
    port: int = 9000
    """Port to listen at; 0 takes a free one."""
    device: Device = None
    """Where images are judged: cpu, cuda, cuda:1, ..."""
    batch: int = 64
    """The most images of one call of a reward."""
    wait: float = 0.005
    """Seconds that a call waits for others to be judged with it, where its reward is idle."""
    max_queued: int = 256
    """Calls that may be there at a time; more are told to come again."""
    max_memory: int = 4096
    """MiB of calls that may be there at a time; more are told to come again."""
    max_body: int = 64
    """The most MiB of a call."""
    max_rows: int = 256
    """The most images, or clips, of a call."""
    max_frames: int = 1 << 14
    """The most images of a call, those of its clips included."""
    max_prompt: int = 10_000
    """The most characters of a prompt."""
    max_pixels: int = 1 << 26
    """The most pixels of a call, all its images together."""
    api_key_file: KeyFile = None
    """A file with a key a line, as KEY or NAME KEY, one of which callers must send."""
    grace: float = 30.0
    """Seconds after SIGTERM in which what was sent is answered."""

    def __call__(self) -> None:
        """Serves until SIGTERM or Ctrl-C."""
        named = self._named()
        whole = ("batch", "max_queued", "max_memory", "max_body", "max_rows", "max_frames", "max_prompt", "max_pixels")
        for name in whole:
            if getattr(self, name) < 1:
                raise RequestError(f"--{name.replace('_', '-')} {getattr(self, name)}: it must be at least 1")
        for name in ("wait", "grace"):
            if not 0 <= getattr(self, name) < 1e9:
                raise RequestError(f"--{name} {getattr(self, name):g}: it must be seconds, at least 0")
        from rollflow.serve.keys import Keys, check_host

        keys = Keys(self.api_key_file)
        check_host(self.host, bool(keys))
        from rollflow.cli.serving import left, listening
        from rollflow.serve import reward_server
        from rollflow.serve.reward_bodies import Limits

        made = self._made(named)
        limits = Limits(self.max_body << 20, self.max_rows, self.max_prompt, self.max_pixels, self.max_frames)
        settings = reward_server.RewardSettings(
            keys, limits, self.max_queued, self.max_memory << 20, self.batch, self.wait, device=self._device(),
        )  # fmt: skip
        with listening(self.host, self.port) as at:
            server = reward_server.RewardServer(made, settings)
            asyncio.run(_serve(server, at, self.grace))
        if server.hangs:  # Python would wait for its thread
            left(0)

    def _named(self) -> dict[str, str]:
        """The rewards as they were given, by the names that callers use."""
        if not self.rewards:
            raise RequestError("name at least one reward: rollflow reward-server hps --port 9000")
        named: dict[str, str] = {}
        for given in self.rewards:
            alias = _ALIAS.fullmatch(given)
            name, spec = alias.groups() if alias else (given, given)
            if not alias and ".py:" in given:
                name = given.rpartition(":")[2]
            if name in named:
                raise RequestError(f"two rewards are called {shown(name)}: rename one, as in other={shown(spec)}")
            named[name] = spec
        return named

    def _device(self) -> Any:
        from rollflow.settings import on_device

        return on_device(self.device)

    def _made(self, named: Mapping[str, str]) -> dict[str, Any]:
        """The rewards, whose packages and weights are here; networks are loaded and called once."""
        import torch

        from rollflow import rewards
        from rollflow.cli.judging import check_weights
        from rollflow.request import Request
        from rollflow.rewards.own import reward_of

        made = {name: rewards.make(reward_of(spec)) for name, spec in named.items()}
        check_weights([Request("a photo", reward=one) for one in made.values()])
        for name, one in made.items():
            if getattr(one, "normalised", ()):
                raise RequestError(f"{shown(name)}: z(...) normalises by a search's own particles: serve its terms")
            if any(hasattr(term, "wanted") for term in rewards.terms_of(one)):
                height, width = rewards.size(one) or (64, 64)
                with torch.no_grad():
                    one(torch.zeros(1, 3, height, width, device=self._device()), ["a photo"])
        return made


async def _serve(server: RewardServer, at: socket.socket, grace: float) -> None:
    """Serves until a signal, then drains; a second signal ends it at once."""
    from rollflow.cli.serving import address, quiet
    from rollflow.serve.reward_server import create_app

    http, signals, loop = quiet(create_app(server)), asyncio.Queue[int](), asyncio.get_running_loop()
    for one in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(one, signals.put_nowait, one)
    server.start()
    serving = loop.create_task(http.serve([at]))
    for name in server.scorers:  # the socket listens already
        print(f"serving {name} at {address(at)}/score/{name}", flush=True)
    await signals.get()
    ends = [loop.create_task(server.drain(grace)), loop.create_task(signals.get())]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    await server.close()
    http.should_exit = True
    await serving
