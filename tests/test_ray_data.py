"""Searches in Ray Data: the class alone, and in a pipeline of Ray's."""

import asyncio
import io
import math
import os
import shutil
import subprocess
import sys
import threading
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image
from tiny import PATIENCE, brightness, engine

from rollflow.errors import EngineClosed, RequestError
from rollflow.serve.ray_data import FOUND, SearchBatches

pytestmark = pytest.mark.usefixtures("one_thread")
ALONE = ["unshare", "-rn"]  # Ray takes another address of the machine for 127.0.0.1 where there is one


def able():
    """Whether a process can have a network of its own here."""
    found = shutil.which("unshare") and shutil.which("ip")
    return bool(found) and not subprocess.run([*ALONE, "ip", "link", "set", "lo", "up"], capture_output=True).returncode


def batches(own, **defaults):
    return SearchBatches(engine=own, **{"reward": brightness, "method": "rbf", "steps": 4, "nfe": 12, **defaults})


async def of(search, batch):
    return [found async for found in search(batch)]


def column(*values):
    found = np.empty(len(values), dtype=object)
    found[:] = values
    return found


def test_a_batch_and_what_was_found_beside_it():
    batch = {
        "prompt": column("a", "b", "c", "d"), "seed": np.array([0, 1, 0, 0]), "nfe": np.array([12, math.nan, 14, -1]),
        "my own": column(*"wxyz"),
    }  # fmt: skip
    with engine() as own:
        (found,) = asyncio.run(of(batches(own), batch))
        alone = own.generate("b", reward=brightness, method="rbf", steps=4, nfe=12, seed=1)
    assert {*found} == {*batch, "image", *FOUND, "error"}
    assert found["my own"].tolist() == [*"wxyz"] and found["nfe"].tolist()[:3] == [12, 12, 14]
    assert found["reward"][1] == alone.reward and np.isnan(found["reward"][3]) and found["reward"].dtype == np.float64
    assert Image.open(io.BytesIO(found["image"][1])).tobytes() == alone.image.tobytes() and found["image"][3] == b""
    assert found["error"].tolist()[:3] == [""] * 3 and found["error"][3].startswith("RequestError: nfe=-1")
    assert found["stopped"].tolist() == ["budget"] * 3 + [""]


def test_a_batch_does_not_wait_for_another():
    go = threading.Event()

    def slow(images, prompts):
        assert go.wait(PATIENCE)
        return images.mean((1, 2, 3))

    async def both(search):
        first = asyncio.ensure_future(of(search, {"prompt": column("a"), "reward": column(slow)}))
        await asyncio.sleep(0)
        (second,) = await of(search, {"prompt": column("b")})
        assert not first.done()
        go.set()
        (found,) = await first
        return second, found

    with engine() as own:
        second, first = asyncio.run(asyncio.wait_for(both(batches(own)), PATIENCE))
    assert second["error"].tolist() == first["error"].tolist() == [""]


def test_what_cannot_be():
    with engine() as own:
        with pytest.raises(RequestError, match="one must be called prompt"):
            asyncio.run(of(batches(own), {"text": column("a")}))
        with pytest.raises(RequestError, match="there is no reward 'cuont'"):
            SearchBatches(engine=own, reward="cuont")
        with pytest.raises(RequestError, match="nfee: a request has no such field"):
            SearchBatches(engine=own, nfee=3)
        search = batches(own)
    with pytest.raises(EngineClosed):  # no fault of a row's: Ray is to see it
        asyncio.run(of(search, {"prompt": column("a")}))


PIPELINE = """
import ray
from rollflow.serve.ray_data import SearchBatches
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, configure_logging=False)
ray.data.DataContext.get_current().enable_progress_bars = False
rows = [{"prompt": "a poem" if i == 5 else f"{n} red circles", "key": i} for i, n in enumerate(["two", "three"] * 6)]
options = {"model": "shapes", "engine": {"reproducible": True, "lanes": 1, "threads": 1}, "method": "bon", "steps": 2}
found = ray.data.from_items(rows, override_num_blocks=2).map_batches(
    SearchBatches, fn_constructor_kwargs={**options, "nfe": 4}, batch_size=2, concurrency=1, num_cpus=1
).take_all()
assert sorted(row["key"] for row in found) == list(range(12)), found
failed = [row for row in found if row["error"]]
assert [row["key"] for row in failed] == [5] and "poem" in failed[0]["error"], failed
fine = [row for row in found if not row["error"]]
assert len({(row["prompt"], row["reward"], row["image"]) for row in fine}) == 2 and fine[0]["image"][:4] == b"\\x89PNG"
print(len(found), "rows")
"""


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed (pip install 'rollflow[ray]')")
@pytest.mark.skipif(not able(), reason="there is no unshare, or no right to a network of one's own")
def test_a_pipeline_of_ray(tmp_path):
    """It takes about 20 seconds, most of them Ray's start and the import of torch in the actor."""
    (tmp_path / "pipeline.py").write_text(PIPELINE)
    command = f"ip link set lo up && exec {sys.executable} {tmp_path / 'pipeline.py'}"
    with (tmp_path / "told").open("w+") as told:  # a pipe would stay open with what Ray has started, and bound nothing
        found = subprocess.run(
            [*ALONE, "sh", "-c", command],
            env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "TRITON_INTERPRET": "0"},
            stdout=told,
            stderr=told,
            timeout=180,
        )
        told.seek(0)
        text = told.read()
    assert found.returncode == 0 and "12 rows" in text, text[-4000:]
