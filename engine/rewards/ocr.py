"""The `ocr` reward: whether the text that a prompt quotes stands in the image."""

from __future__ import annotations

import os
import re
import threading
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from rollflow.errors import RequestError, shown
from rollflow.rewards import pixels, weights
from rollflow.rewards.network import FrameReward

_QUOTED = re.compile(
    r"“([^“”\"]*)[”\"]"
    r"|„([^„“”\"]*)[“”\"]"
    r"|«([^«»]*)»|»([^«»]*)«|「([^「」]*)」|『([^『』]*)』"
    r"|(?<!\d)\"([^\"]*)\""  # after a digit it is inches
    r"|(?<!\w)‘(?!n’)(?=\S)(.+?)(?<=\S)’(?!\w)"  # noqa: RUF001  # ends at one that is no apostrophe
    r"|(?<!\w)'(?!n')(?=\S)(.+?)(?<=\S)'(?!\w)"
)
_ALIKE = str.maketrans("‘’´`“”„–—", "''''\"\"\"--")  # noqa: RUF001


def normal(text: str) -> str:
    """Text as it is compared: compatible forms of Unicode made one, lower case, plain quotes and dashes, no spaces."""
    return "".join(unicodedata.normalize("NFKC", text.translate(_ALIKE)).lower().split())


@lru_cache(maxsize=4096)
def quoted(prompt: str) -> tuple[str, ...]:
    """The texts that a prompt quotes, in order, as they are compared.

    Quotes are “ ”, „ “, « », 「 」, 『 』, " ", ‘ ’ and ' '. A single quote within a word, at the end of one outside of
    quotations, or around n is an apostrophe, and a straight double one after a digit is inches.

    Raises:
        RequestError: it quotes none.
    """
    found = [normal(next(group for group in match.groups() if group is not None)) for match in _QUOTED.finditer(prompt)]
    if not any(found):
        raise RequestError(
            f"the reward ocr reads the text that a prompt quotes, and {shown(prompt)} quotes none: put it in quotes, "
            'as in: a shop sign that says "OPEN"'
        )
    return tuple(text for text in found if text)


def agreement(lines: Sequence[str], wanted: Sequence[str]) -> float:
    """How well lines of text agree with what was wanted; see `OcrReward`."""
    from rapidfuzz.distance import Levenshtein

    whole = normal("".join(lines))
    runs = {whole}
    if len(wanted) > 1:
        runs |= {normal("".join(lines[i:j])) for i in range(len(lines)) for j in range(i + 1, len(lines) + 1)}
    wrong = 0
    for text in wanted:
        if text not in whole:
            wrong += min(len(text), *(Levenshtein.distance(run, text) for run in runs))
    return 1 - wrong / sum(map(len, wanted))


@dataclass(frozen=True)
class OcrReward(FrameReward):
    """The text in the image against the text that the prompt quotes, in [0, 1].

        score = 1 - min(d, n) / n

    with the n characters of the quoted text and its Levenshtein distance d from all text that is recognised in the
    image, lines joined from the top; d = 0 where the quoted text is part of that. It is the reward of Flow-GRPO (Liu et
    al. 2025, arXiv 2505.05470; `OcrScorer` of their code), which also leaves out spaces and case. Three things are
    added. Typographic quotes and dashes equal plain ones, and Unicode is normalised (NFKC). Any quotes count, not only
    straight ones. Of a prompt that quotes several texts, where their code reads the first, each has the least distance
    from the whole and from any run of consecutive lines, and the score is 1 - sum of min(d, n) / sum of n.

    RapidOCR recognises: the networks of PaddleOCR, which Flow-GRPO uses, under ONNX Runtime and with their weights in
    its wheel (Apache-2.0). PaddleOCR itself takes another framework and fetches weights when it is first used; so does
    EasyOCR; Tesseract is made for scans. Nothing is ever fetched here. Distances are RapidFuzz's (MIT). It runs on the
    CPU, one image after the other and one thread at a time, about half a second an image: images are copied to the
    host. It has no gradient. Text that is turned upside down is not recognised.

    Attributes:
        threads: cores that it may use, at most those that there are.
        confidence: of a line, below which it does not count; PaddleOCR's default.
        side: pixels that the shorter side is enlarged to before text is looked for; less is faster and reads less.
    """

    kind: ClassVar[str] = "ocr"
    packages: ClassVar[tuple[str, ...]] = ("rapidocr", "onnxruntime", "rapidfuzz")

    threads: int = 1
    confidence: float = 0.5
    side: int = 736

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threads < 1 or self.side < 32:
            raise RequestError(f"ocr: threads={self.threads}, side={self.side}: at least 1 thread and 32 pixels")
        if not 0 <= self.confidence <= 1:
            raise RequestError(f"ocr: confidence={self.confidence:g}: it must be from 0 to 1")

    def check(self, prompt: str) -> None:
        """Looks for its packages; raises `RequestError` if the prompt quotes no text."""
        super().check(prompt)
        quoted(prompt)

    def score(self, images: Float[Tensor, "row 3 height width"], prompts: list[str]) -> Float[Tensor, " row"]:
        """See `FrameReward`; on the CPU."""
        wanted = [quoted(prompt) for prompt in prompts]
        read = self.reader().read(pixels.eight_bit(images))
        scores = [agreement(lines, texts) for lines, texts in zip(read, wanted, strict=True)]
        return torch.tensor(scores, dtype=torch.float32)

    def reader(self) -> Reader:
        """What reads for it, made once a process."""
        key = ("ocr", self.threads, self.confidence, self.side)
        return weights.once(key, lambda: Reader(self.threads, self.confidence, self.side))


class Reader:
    """RapidOCR, for one thread at a time; arguments as of `OcrReward`.

    Raises:
        RequestError: its weights are not in the package.
    """

    def __init__(self, threads: int, confidence: float, side: int):
        from rapidocr import RapidOCR

        self._threads = min(threads, os.cpu_count() or 1)  # RapidOCR takes more for as many as there are
        engine = "EngineConfig.onnxruntime"
        self._reads: Any = RapidOCR(
            params={
                "Global.log_level": "error",  # it warns of each image without text
                "Global.text_score": confidence,
                "Global.use_cls": False,  # whether a line is upside down
                "Det.limit_side_len": side,
                f"{engine}.intra_op_num_threads": self._threads,
                f"{engine}.inter_op_num_threads": 1,
            }
        )
        self._lock = threading.Lock()
        for part in (self._reads.cfg.Det, self._reads.cfg.Rec):
            part.model_path = str(_network(part, Path(self._reads.cfg.Global.model_root_dir)))

    def read(self, pictures: UInt8[np.ndarray, "row height width 3"]) -> list[tuple[str, ...]]:
        """The lines of text of each picture, from the top."""
        import cv2

        with self._lock:
            before = cv2.getNumThreads()
            cv2.setNumThreads(self._threads)
            try:
                return [(*(self._reads(picture[..., ::-1].copy()).txts or ()),) for picture in pictures]  # as BGR
            finally:
                cv2.setNumThreads(before)


def _network(part: Any, folder: Path) -> Path:
    """The file of a network that came with RapidOCR, which else would fetch it."""
    from rapidocr.inference_engine.base import FileInfo, InferSession

    info = FileInfo(part.engine_type, part.ocr_version, part.task_type, part.lang_type, part.model_type)
    file = folder / Path(InferSession.get_model_url(info)["model_dir"]).name
    if not file.is_file():
        raise RequestError(
            f"the reward ocr: the package rapidocr lacks {file.name} in {shown(str(folder))}: install it again, with "
            "pip install --force-reinstall rapidocr"
        )
    return file
