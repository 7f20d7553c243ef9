"""One side of a comparison of two versions: measures what it is asked for, line by line of JSON; see `versus`.

It runs in the other version's environment, so that it uses nothing but what every version has.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from typing import Any

from rollflow import Engine, Request
from rollflow.bench import prompt_sets
from rollflow.bench.overhead import Free, first_pixel

BUCKETS = (1, 2, 4, 8, 16, 32)  # of both sides: which of the usual ones pay is measured, and differs from run to run
LEAST_ROWS = 3000  # of a measurement of the host's work: a single request is over before its threads are warm


class Side:
    """The engines of this version, made when they are first needed."""

    def __init__(self) -> None:
        self._engines: dict[Any, Engine] = {}
        self._medium = prompt_sets.load("medium", 100)

    def throughput(self, asked: dict[str, Any]) -> float:
        """Milliseconds of an evaluation, everything included."""
        key = asked["model"], asked["preview"]
        if key not in self._engines:
            options = {"preview": asked["preview"], "lanes": asked["lanes"], "buckets": BUCKETS}
            self._engines[key] = Engine.from_pretrained(asked["model"], **options)
            self._engines[key].warm_up()
        prompts = [self._medium[i % len(self._medium)] for i in range(asked["prompts"])]
        fields = {"method": asked["method"], "nfe": asked["nfe"], "steps": 10}
        requests = [Request(prompt, seed=i, **fields) for i, prompt in enumerate(prompts)]
        start = time.perf_counter()
        results = self._engines[key].generate(requests)
        seconds = time.perf_counter() - start
        return 1e3 * seconds / sum(result.committed_nfe for result in results)

    def overhead(self, asked: dict[str, Any]) -> float:
        """Microseconds of the processor, of all threads, for a row of a model that costs next to nothing."""
        live, nfe = asked["prompts"], asked["nfe"]
        key = "free", live
        if key not in self._engines:
            slots = live * nfe + 1
            self._engines[key] = Engine(Free(), buckets=range(1, 33), lanes=1, threads=1, slots=slots)
        engine = self._engines[key]
        requests = [Request("free", first_pixel, asked["method"], nfe, seed=i) for i in range(live)]
        before, rows, start = sum(engine.ledger.executed.values()), 0, time.process_time()
        while rows < LEAST_ROWS:
            engine.generate(requests)
            rows = sum(engine.ledger.executed.values()) - before
        return 1e6 * (time.process_time() - start) / rows


if __name__ == "__main__":
    side = Side()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        gc.collect()
        print(json.dumps(getattr(side, asked["command"])(asked)), flush=True)
