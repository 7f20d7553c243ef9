"""The `judge` reward: a vision-language model behind a chat-completions endpoint grades an image by a rubric."""

from __future__ import annotations

import base64
import json
import math
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rollflow.errors import FunctionError, RequestError, RollflowError, line, said, shown
from rollflow.rewards import pixels
from rollflow.rewards.http import check_url, check_variable, file, hidden, secret
from rollflow.rewards.network import FrameReward

OPENAI = "https://api.openai.com/v1"
OPENAI_KEY = "OPENAI_API_KEY"
FILES = ("png", "jpeg")
REMEMBERED = 4096  # images whose score is kept
RUBRIC = (
    "You judge images that were generated from a prompt. Check each object, number, colour, position, text and style "
    "that the prompt asks for, and look for flaws: distorted anatomy, melted or merged things, unreadable text, noise. "
    "10: all of it is there and the image has no flaw. 7: a detail is wrong. 4: an important part is missing or wrong. "
    "0: the image has nothing to do with the prompt. Use the whole scale, with decimals."
)
ANSWER = 'Answer with JSON alone, as in {"score": 6.5}, with a score from 0 to 10.'
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"score": {"type": "number", "minimum": 0, "maximum": 10}},
    "required": ["score"],
    "additionalProperties": False,
}


class Cost(NamedTuple):
    """What the answers of an endpoint cost so far.

    Attributes:
        calls: answers that were given, with those that could not be read.
        prompt_tokens, completion_tokens: of them, as the endpoint counts.
        dollars: for them, None where no prices were given.
    """

    calls: int
    prompt_tokens: int
    completion_tokens: int
    dollars: float | None


def parse(answer: str) -> float | None:
    """The score in [0, 1] of an answer that has the form of `SCHEMA`; None of any other."""
    try:
        found = json.loads(answer)
    except ValueError:
        return None
    if not isinstance(found, dict) or {*found} != {"score"} or type(found["score"]) not in (int, float):
        return None
    return found["score"] / 10 if 0 <= found["score"] <= 10 else None


@dataclass(frozen=True)
class JudgeReward(FrameReward):
    """The grade that a vision-language model gives an image for its prompt, in [0, 1].

        score = grade / 10

    The model is asked by OpenAI's chat-completions API, which vLLM, SGLang, Ollama and most services speak too: the
    rubric is the system's message, the prompt and the image as a data URL are the user's. The answer is bound by a JSON
    schema ("structured outputs") and read strictly, as {"score": number from 0 to 10} and nothing else; any other
    answer is asked for again. The official `openai` client does the calls, in threads of this reward's own, and the
    retries after timeouts, lost connections, 408, 409, 429 and 5xx, with exponential back-off or as Retry-After says.
    When they are spent the requests fail. An engine does not call again then, for it would pay for the whole batch
    once more; for the same reason the last 4096 scores are remembered.

    The key is read from an environment variable and stands in no spec, log or message. That of OpenAI goes to no other
    address unless `key` names it. Images are copied to the host. It has no gradient.

    Attributes:
        model: as the endpoint calls it.
        base_url: of the endpoint, as in http://host:8000/v1.
        key: the environment variable that holds the key; None: OPENAI_API_KEY for OpenAI itself, elsewhere no key.
        rubric: what makes a grade; which form the answer has is added.
        image: how images are sent: "png", or "jpeg" of quality 95, which is smaller.
        concurrency: calls under way at a time.
        retries: of each call; also how often an answer that cannot be read is asked for again.
        seconds: after which a call is given up, and tried again.
        temperature: 0 for the most likely grade; None: the endpoint's own, for models that take no other.
        prompt_price, completion_price: dollars for a million tokens, for `cost`.
    """

    kind: ClassVar[str] = "judge"
    concurrent: ClassVar[bool] = True
    padded: ClassVar[bool] = False  # each image is paid for
    packages: ClassVar[tuple[str, ...]] = ("openai",)

    model: str = ""
    base_url: str = OPENAI
    key: str | None = None
    rubric: str = RUBRIC
    image: str = "png"
    concurrency: int = 8
    retries: int = 5
    seconds: float = 60.0
    temperature: float | None = 0.0
    prompt_price: float | None = None
    completion_price: float | None = None
    endpoint: Endpoint = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_url("judge", "base_url", self.base_url)
        check_variable("judge", self.key)
        if self.image not in FILES:
            raise RequestError(f"judge: image={shown(self.image)}: choose one of {', '.join(FILES)}")
        if self.concurrency < 1 or self.retries < 0 or not 0 < self.seconds < math.inf:
            given = f"concurrency={self.concurrency}, retries={self.retries}, seconds={self.seconds:g}"
            raise RequestError(f"judge: {given}: they must be at least 1, at least 0, and above 0")
        if (self.prompt_price is None) != (self.completion_price is None):
            raise RequestError("judge: give both prompt_price and completion_price, dollars for a million tokens")
        object.__setattr__(self, "endpoint", Endpoint(self))

    @property
    def variable(self) -> str | None:
        """The environment variable of its key."""
        return OPENAI_KEY if self.key is None and self.base_url.rstrip("/") == OPENAI else self.key

    def check(self, prompt: str) -> None:
        """Raises `RequestError` where no model is named, or the key or the package is not here; it calls nobody."""
        super().check(prompt)
        if not self.model:
            raise RequestError(
                "the reward judge: name its model and where that is, as in judge:model=NAME,base_url=http://host:8000/v1"
            )
        secret("judge", self.variable)

    def score(self, images: Float[Tensor, "row 3 height width"], prompts: list[str]) -> Float[Tensor, " row"]:
        """See `FrameReward`; on the CPU.

        Raises:
            RequestError: the endpoint refuses what was sent.
            FunctionError: it does not answer, or not as asked, however often.
        """
        self.check("")
        files = [file(picture, self.image) for picture in pixels.eight_bit(images)]
        return torch.tensor(self.endpoint.scores([*zip(files, prompts, strict=True)]), dtype=torch.float32)

    def cost(self) -> Cost:
        """What this reward cost so far in this process."""
        calls, prompt, completion = self.endpoint.counts
        dollars = None
        if self.prompt_price is not None and self.completion_price is not None:
            dollars = (prompt * self.prompt_price + completion * self.completion_price) / 1e6
        return Cost(calls, prompt, completion, dollars)


class Endpoint:
    """A judge's calls to its model, in threads of their own: what they cost, and the scores that they gave."""

    def __init__(self, judge: JudgeReward):
        self._judge, self._lock = judge, Lock()
        self._counts = [0, 0, 0]
        self._client: Any = None
        self._scores = OrderedDict[int, float]()
        self._threads = ThreadPoolExecutor(judge.concurrency, thread_name_prefix="rollflow-judge")

    @property
    def counts(self) -> list[int]:
        """Answers, and their tokens of the prompt and of the completion."""
        with self._lock:
            return [*self._counts]

    def scores(self, pictures: Sequence[tuple[bytes, str]]) -> list[float]:
        """Of each image file for its prompt; what was judged before, or stands there twice, is asked for once."""
        keys = [hash(picture) for picture in pictures]  # 64 bits
        with self._lock:
            known = {key: self._scores[key] for key in keys if key in self._scores}
        asked = {key: one for key, one in zip(keys, pictures, strict=True) if key not in known}
        waiting = {key: self._threads.submit(self._score, key, *one) for key, one in asked.items()}
        try:
            known |= {key: future.result() for key, future in waiting.items()}
        finally:
            for future in waiting.values():
                future.cancel()  # after an error, those that have not begun
        return [known[key] for key in keys]

    def _score(self, key: int, image: bytes, prompt: str) -> float:
        answer = ""
        for _ in range(self._judge.retries + 1):
            answer = self._answer(image, prompt)
            if (score := parse(answer)) is not None:
                with self._lock:
                    self._scores[key] = score
                    while len(self._scores) > REMEMBERED:
                        self._scores.popitem(last=False)
                return score
        raise FunctionError(
            f"the reward judge: {self._name} answered {shown(answer)} in place of {{'score': ...}} from 0 to 10, "
            f"{self._judge.retries + 1} times: take a model that follows a JSON schema, or another rubric"
        )

    def _answer(self, image: bytes, prompt: str) -> str:
        """What the model says of an image."""
        url = f"data:image/{self._judge.image};base64,{base64.b64encode(image).decode()}"
        shows = [{"type": "text", "text": f"Prompt: {prompt}"}, {"type": "image_url", "image_url": {"url": url}}]
        asked: dict[str, Any] = {
            "model": self._judge.model,
            "messages": [
                {"role": "system", "content": f"{self._judge.rubric}\n\n{ANSWER}"},
                {"role": "user", "content": shows},
            ],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "grade", "strict": True, "schema": SCHEMA},
            },
        }
        if self._judge.temperature is not None:
            asked["temperature"] = self._judge.temperature
        reply = self._call(asked)
        usage = getattr(reply, "usage", None)
        tokens = [getattr(usage, name, None) or 0 for name in ("prompt_tokens", "completion_tokens")]
        with self._lock:
            self._counts = [had + more for had, more in zip(self._counts, (1, *tokens), strict=True)]
        try:
            return str(reply.choices[0].message.content)
        except (AttributeError, IndexError, TypeError):  # of an endpoint that is none
            return str(reply)

    def _call(self, asked: dict[str, Any]) -> Any:
        import openai

        with self._lock:
            if self._client is None:
                self._client = openai.OpenAI(
                    api_key=secret("judge", self._judge.variable) or "none",  # the client insists on some
                    base_url=self._judge.base_url,
                    timeout=self._judge.seconds,
                    max_retries=self._judge.retries,
                )
        try:
            return self._client.chat.completions.create(**asked)
        except openai.APIStatusError as error:
            raise self._refused(error.status_code, error.message) from None  # the error may quote the key
        except (openai.APIError, ValueError) as error:
            tries = self._judge.retries + 1
            raise FunctionError(
                f"the reward judge: {self._name} gave no answer in {tries} tries of {self._judge.seconds:g} s "
                f"({said(error)})"
            ) from error

    def _refused(self, status: int, message: str) -> RollflowError:
        if status in (401, 403):
            variable = self._judge.variable
            cause = f"the key in {variable}" if variable else "a call without a key: name its variable with key=NAME"
            return RequestError(f"the reward judge: {self._name} does not accept ({status}) {cause}")
        text = f"the reward judge: {self._name} answered {status} ({line(hidden(message, self._judge.variable), 200)})"
        return FunctionError(text) if status in (408, 409, 429) or status >= 500 else RequestError(text)

    @property
    def _name(self) -> str:
        return f"{line(self._judge.model, 60)} at {line(self._judge.base_url, 80)}"
