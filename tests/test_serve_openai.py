"""The official client of OpenAI's API against our server: sync, async, streams, and errors as it raises them."""

import asyncio
import base64
import io

import pytest
import serving
import workers
from PIL import Image
from serving import Served
from tiny import PATIENCE

from rollflow.serve.limits import ServeSettings
from rollflow.serve.local import LocalChannel

openai = pytest.importorskip("openai")
KEY = "a-key-of-this-test-alone"
OWN = {"reward": "bright", "method": "rbf", "steps": 4, "nfe": 12}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"# of the test\n\nsomebody {KEY}\n")
    engine = workers.engine()
    settings = ServeSettings(model="tiny", rewards=("bright", "slow", "gated"), keys=str(keys))
    with Served([LocalChannel(engine)], settings, max_queued=2, window=1) as found:
        yield found
    engine.close()


@pytest.fixture
def client(served):
    with openai.OpenAI(api_key=KEY, base_url=f"{served.url}/v1", timeout=PATIENCE, max_retries=0) as found:
        yield found


def picture(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_images(client):
    answer = client.images.generate(prompt="a", model="tiny", n=2, size="8x8", user="me", extra_body=OWN)
    assert len(answer.data) == 2 and answer.size == "8x8" and answer.output_format == "png" and answer.model == "tiny"
    for i, one in enumerate(answer.data):
        assert picture(one.b64_json).size == (8, 8) and one.nfe == 12 and one.seed == i and 0 < one.reward < 1


def test_an_address_that_opens_without_a_key(client):
    url = client.images.generate(prompt="a", response_format="url", extra_body=OWN).data[0].url
    http = pytest.importorskip("httpx")
    assert Image.open(io.BytesIO(http.get(url).content)).size == (8, 8)
    assert http.get(url[:-1] + ("0" if url[-1] != "0" else "1")).status_code == 401
    assert http.get(url.partition("?")[0]).status_code == 401


def test_a_stream(client):
    stream = client.images.generate(
        prompt="a", stream=True, partial_images=2, extra_body={**OWN, "reward": "slow", "nfe": 48}
    )
    *partial, last = stream
    assert last.type == "image_generation.completed" and last.nfe == 48 and last.usage.total_tokens == 0
    assert partial and all(one.type == "image_generation.partial_image" for one in partial)
    assert [one.partial_image_index for one in partial] == [*range(len(partial))]
    assert all(picture(one.b64_json).size == (8, 8) for one in (*partial, last))
    assert all(one.reward <= last.reward + 0.1 and one.nfe <= 48 for one in partial)


def test_async_and_streams_side_by_side(served):
    async def main():
        async with openai.AsyncOpenAI(api_key=KEY, base_url=f"{served.url}/v1", timeout=PATIENCE) as client:
            answer = client.images.generate(prompt="a", extra_body={**OWN, "seed": 5})
            stream = await client.images.generate(prompt="a", stream=True, extra_body={**OWN, "seed": 5})
            return (await answer).data[0], [event async for event in stream]

    whole, (last,) = asyncio.run(main())
    assert last.type == "image_generation.completed" and last.b64_json == whole.b64_json and last.reward == whole.reward


def test_errors_are_raised_as_they_are(client, served):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="a", extra_body={"nff": 3})
    assert caught.value.param == "nff" and "'nfe'" in caught.value.message and caught.value.code == "unknown_field"
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt="a", model="dall-e-3")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="another").images.generate(prompt="a")
    with pytest.raises(openai.InternalServerError) as caught:
        client.with_options(max_retries=2).images.generate(prompt="broken", extra_body=OWN)  # which is tried once
    assert caught.value.code == "reward_failed" and caught.value.request.headers["x-stainless-retry-count"] == "0"


def test_a_stream_that_fails_on_its_way_raises(client):
    stream = client.images.generate(prompt="broken", stream=True, extra_body=OWN)
    with pytest.raises(openai.APIError, match="the judge is ill"):
        list(stream)


def test_a_full_queue_is_come_back_to(client, served):
    with serving.opened(workers.GATE) as gate:
        streams = [
            client.images.generate(prompt="a", stream=True, extra_body={**OWN, "reward": "gated"}) for _ in range(1)
        ]
        full = 0
        while not full:  # one is let in by the engine, one waits
            try:
                streams.append(client.images.generate(prompt="a", stream=True, extra_body={**OWN, "reward": "gated"}))
            except openai.RateLimitError as error:
                full, after = error.status_code, error.response.headers["retry-after"]
        assert full == 429 and int(after) >= 1
        gate.set()
        again = client.with_options(max_retries=5).images.generate(prompt="a", extra_body=OWN)
        assert again.data[0].nfe == 12
        assert all([*stream][-1].type == "image_generation.completed" for stream in streams)


def test_the_clients_timeout_is_a_deadline(client):
    timeout = {"x-stainless-read-timeout": "1"}  # as the client sends its own, which is longer here: a test may be slow
    ask = {**OWN, "reward": "slow", "nfe": 9000}
    (found,) = client.images.generate(prompt="a", extra_body=ask, extra_headers=timeout).data
    assert found.stopped == "deadline" and found.nfe < 9000


def test_models(client):
    assert [one.id for one in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
