"""What only a CUDA device can show of graphs: a replay is the eager step, an engine decides alike, nothing waits."""

import math
import subprocess
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rollflow
from rollflow import kernels
from rollflow.copies import Download
from rollflow.device.batch import Tables
from rollflow.device.cuda_graphs import Graphs
from rollflow.device.storage import Storage
from rollflow.device.workers import Lanes
from rollflow.engine import Engine
from rollflow.models.flux import FluxModel
from rollflow.models.loading import load
from rollflow.profile import records
from rollflow.request import Request
from rollflow.rewards import FunctionReward
from rollflow.row import NONE

pytestmark = pytest.mark.gpu

SLOTS = 32
BUCKETS = (1, 2, 4, 8)
PACKAGE = str(Path(rollflow.__file__).parent)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def model(request: pytest.FixtureRequest) -> FluxModel:
    return FluxModel(load("shapes", torch.device("cuda"), request.param))


@pytest.fixture(scope="module")
def lane() -> Iterator[Lanes]:
    """The thread that captures and replays is not the main one, as in an engine."""
    lanes = Lanes(torch.device("cuda"), 1, 1)
    yield lanes
    lanes.close()


def particles(model: FluxModel) -> Storage:
    geometry = model.geometry()
    pool = Storage(SLOTS, geometry.token, geometry.channel, model.device, model.dtype)
    generator = torch.Generator().manual_seed(1)
    for state in (pool.x, pool.u):
        state.copy_(torch.randn(state.shape, generator=generator))
    return pool


def step_of(model: FluxModel, pool: Storage) -> Callable[..., Tensor]:
    geometry = model.geometry()
    size = (geometry.latent_height, geometry.latent_width, *model.layout.patch[1:])
    affine = model.layout.affine(model.device)

    def step(integers: Tensor, floats: Tensor, *collated: Tensor) -> Tensor:
        tables = Tables(integers, floats)
        parent, child, seed, key = tables.integers.unbind(0)
        x = kernels.propose(pool.x, pool.u, parent, child, tables.coefficients, seed, key, model.dtype)
        u = model.forward(x, tables.tau, collated, tables.guidance, geometry)
        return kernels.finish(u, pool.x, pool.u, child, tables.posterior, *size, *affine, model.dtype)

    return step


def batch(model: FluxModel, bucket: int, live: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Inputs of `live` rows and padding: children go to other slots than parents, every third row is of the prior."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(SLOTS, generator=generator)
    integers = torch.full((4, bucket), NONE)
    integers[0, :live], integers[1, :live] = slots[:live], slots[live : 2 * live]
    integers[0, :live:3] = NONE
    integers[2:, :live] = torch.randint(2**62, (2, live), generator=generator)
    floats = torch.rand(8 * bucket, generator=generator) + 0.01
    like = model.collate([conditioning(model)] * bucket)
    random = (torch.randn(value.shape, generator=generator).to(value) for value in like)
    return integers.cuda(), floats.cuda(), *random


def conditioning(model: FluxModel) -> Any:
    return model.encode(["two red circles"])[0]


def recorded(model: FluxModel, pool: Storage, lane: Lanes, buckets: tuple[int, ...] = BUCKETS) -> Graphs:
    graphs = Graphs(step_of(model, pool))
    lane.run(graphs.record, buckets, lambda bucket: batch(model, bucket, 0)).result()
    return graphs


def same(actual: Tensor, expected: Tensor) -> None:
    """Bit for bit: a replay runs the very kernels of the eager step on the same shapes, so nothing rounds otherwise."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bucket", BUCKETS)
def test_a_replay_is_the_eager_step(model: FluxModel, lane: Lanes, bucket: int) -> None:
    """Latents and pools, with new inputs each time; slots that no row reads hold NaN, and hold it still afterwards."""
    ours, theirs = particles(model), particles(model)
    fresh = ours.x.clone(), ours.u.clone()
    graphs, eager = recorded(model, ours, lane), step_of(model, theirs)
    same(ours.x, fresh[0])  # captures and the runs before them write no slot
    same(ours.u, fresh[1])
    found = []
    for seed, live in enumerate((bucket, max(1, bucket - 1), bucket)):
        inputs = batch(model, bucket, live, seed)
        parents, children = inputs[0][0, :live], inputs[0][1, :live]
        named = torch.zeros(SLOTS, dtype=torch.bool, device="cuda")
        named[children] = True
        read = torch.zeros_like(named)
        read[parents[parents >= 0]] = True
        for pool in (ours, theirs):
            pool.x.copy_(fresh[0]).masked_fill_(~read[:, None, None], math.nan)
            pool.u.copy_(fresh[1]).masked_fill_(~read[:, None, None], math.nan)
        before = ours.x.clone(), ours.u.clone()
        with torch.no_grad():
            expected = eager(*inputs)
        graphs._graphs[bucket][1].output.fill_(math.nan)  # or a result that was left there would pass
        actual = lane.run(graphs.run, *inputs).result()
        same(actual, expected)
        assert actual[:live].isfinite().all() and not actual[live:].any()
        same(ours.x, theirs.x)
        same(ours.u, theirs.u)
        same(ours.x[~named], before[0][~named])
        same(ours.u[~named], before[1][~named])
        assert ours.x[named].isfinite().all() and ours.u[named].isfinite().all()
        found.append(actual)
    assert not torch.equal(found[0], found[2])


def test_graphs_that_share_memory_keep_apart(model: FluxModel, lane: Lanes) -> None:
    """Buckets in turn: a result is the caller's, whatever is replayed later, and no graph spoils another's."""
    ours, theirs = particles(model), particles(model)
    graphs, eager = recorded(model, ours, lane), step_of(model, theirs)
    results = []
    for seed, bucket in enumerate((8, 1, 4, 8, 2, 8, 1)):
        inputs = batch(model, bucket, bucket, seed)
        with torch.no_grad():
            expected = eager(*inputs)
        results.append((lane.run(graphs.run, *inputs).result(), expected))
    for actual, expected in results:
        same(actual, expected)
    same(ours.x, theirs.x)
    outputs = {captured.output.data_ptr() for _, captured in graphs._graphs.values()}
    assert len(outputs) == len(BUCKETS) and not outputs & {actual.data_ptr() for actual, _ in results}


def test_memory_is_reported(model: FluxModel, lane: Lanes) -> None:
    graphs = recorded(model, particles(model), lane)
    alone = recorded(model, particles(model), lane, (1,))
    assert list(graphs.memory) == [8, 4, 2, 1] and all(size > 0 for size in graphs.memory.values())
    assert graphs.memory[8] > graphs._graphs[8][1].output.nbytes
    assert graphs.memory[1] <= alone.memory[1]  # it shares the memory of the largest
    print(f"bytes by bucket, {model.dtype}: {graphs.memory}; of bucket 1 alone: {alone.memory[1]}")


def test_a_bucket_without_a_graph_runs_eagerly_and_says_so_once(model: FluxModel, lane: Lanes) -> None:
    ours, theirs = particles(model), particles(model)
    graphs, eager = recorded(model, ours, lane), step_of(model, theirs)
    inputs = batch(model, 3, 3)
    with pytest.warns(RuntimeWarning, match=r"bucket: \[1, 2, 4, 8\] were captured, 3 was given"):
        actual = lane.run(graphs.run, *inputs).result()
    with torch.no_grad():
        same(actual, eager(*inputs))
    same(ours.x, theirs.x)
    same(ours.u, theirs.u)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lane.run(graphs.run, *inputs).result()


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    """Of one pixel: stays on the device, and has the same bits at every place of a batch, which a mean need not."""
    return images[:, 0, 32, 32]


lighter = FunctionReward(brightness)
lighter.differentiable = True


def ask(method: str, seed: int) -> Request:
    options = {"interpolant": "vp", "grid": "paper", "diffusion": 3.0}
    return Request("two red circles", method=method, nfe=40, steps=5, seed=seed, reward=brightness, **options)


@pytest.mark.parametrize("method", ["bon", "rbf", "smc"])
def test_an_engine_decides_alike_with_graphs_and_without(model: FluxModel, method: str) -> None:
    """In one bucket: every draw, reward and pixel."""
    results = []
    for graphs in (True, False):
        engine = Engine(model, buckets=(8,), lanes=1, graphs=graphs)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # a batch that no graph fits
            results.append(engine.generate([ask(method, seed) for seed in range(3)]))
        assert bool(engine._host.runner.graphs) == graphs
    for ours, theirs in zip(*results, strict=True):
        assert ours.history == theirs.history
        assert ours.reward == theirs.reward and ours.committed_nfe == theirs.committed_nfe
        same(ours.pixels, theirs.pixels)


@contextmanager
def synchronisations() -> Iterator[list[str]]:
    """Collects where the host waited for the device: the package's calls from the outermost on, and the innermost call.

    torch warns of it in the thread and in the call that waits, so the stack at the warning is the culprit's.
    """
    found: list[str] = []

    def show(message: Warning | str, *rest: object, **options: object) -> None:
        if "synchronizing CUDA operation" in str(message):
            stack = [f for f in traceback.extract_stack() if f.filename not in (__file__, warnings.__file__)]
            shown = [frame for frame in stack[:-1] if frame.filename.startswith(PACKAGE)] + stack[-1:]
            found.append(" > ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}: {f.line}" for f in shown))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show  # put back by catch_warnings
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_synchronisations_are_seen() -> None:
    with synchronisations() as found:
        torch.ones(1, device="cuda").item()
    assert len(found) == 1


@contextmanager
def downloads() -> Iterator[Counter[str]]:
    """Counts the waits for what was copied to the host, which leave the core to others, by the file that waits."""
    found, wait = Counter[str](), Download.wait

    def counted(self: Download) -> tuple[Tensor, ...]:
        found[Path(traceback.extract_stack(limit=2)[0].filename).stem] += 1
        return wait(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Download, "wait", counted)
        yield found


def kept(engine: Engine) -> dict[str, np.ndarray]:
    """The ledger's tables since it was cleared."""
    return engine.ledger.snapshot(dict.fromkeys(records.TABLES, 0)).tables


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("method", ["bon", "rbf"])
def test_a_batch_waits_for_the_device_once(model: FluxModel, method: str, graphs: bool) -> None:
    """For its rewards, on a judge's thread: batches of rows once, and batches of final images once more for pixels."""
    engine = Engine(model, buckets=(8,), graphs=graphs)
    engine.generate([ask(method, seed) for seed in range(4)])  # compiles and loads
    engine.ledger.clear()
    with synchronisations() as found, downloads() as waits:
        engine.generate([ask(method, seed) for seed in range(4, 8)])
    listing = "\n".join(f"{count:4d} x {where}" for where, count in Counter(found).most_common())
    assert not found, f"{len(found)} waits that keep a core busy:\n{listing}"
    calls, images = len(kept(engine)["calls"]), waits["finals"]
    assert 0 < images < calls <= engine.ledger.ticks + images
    assert waits == {"judge": calls, "finals": images}


def test_a_guided_batch_waits_for_the_device_once(model: FluxModel) -> None:
    """For its scores and gradients together, on the lane; a final image for its reward and its pixels."""
    engine = Engine(model, buckets=(8,))
    options = {"method": "dps", "nfe": 20, "steps": 5, "reward": lighter, "interpolant": "linear"}
    engine.generate("two red circles", seed=0, **options)
    engine.ledger.clear()
    with synchronisations() as found, downloads() as waits:
        engine.generate("two red circles", seed=1, **options)
    assert not found, Counter(found).most_common(3)
    tables = kept(engine)
    guided = int((tables["batches"]["work"] == records.WORK.index("guided")).sum())
    assert guided > 0 and waits == {"guided": guided, "judge": len(tables["calls"]) - guided, "finals": 1}


REFUSED = """
import torch
from rollflow.errors import ModelError
from rollflow.device.cuda_graphs import Graphs
from rollflow.device.workers import Lanes

def step(integers, floats):
    return floats * floats.sum().item()

def inputs(bucket):
    return torch.full((4, bucket), -1, device="cuda"), torch.ones(8 * bucket, device="cuda")

def total():
    return torch.cuda.current_stream() == torch.cuda.default_stream(), torch.ones(3, device="cuda").sum().item()

lane = Lanes(torch.device("cuda"), 1, 1)
try:
    lane.run(Graphs(step).record, [2], inputs).result()
except ModelError as error:
    print("refused:", error)
print("afterwards:", *lane.run(total).result())
lane.close()
"""


def test_a_step_that_synchronises_is_refused_and_the_thread_keeps_its_stream() -> None:
    """In a process of its own: torch's allocator remembers a capture that failed."""
    run = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    refused, afterwards = run.stdout.splitlines()
    assert refused.startswith("refused: the step of 2 rows cannot be captured") and "graphs=False" in refused
    assert afterwards == "afterwards: True 3.0"
