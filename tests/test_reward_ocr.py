"""The reward `ocr`, with its true networks: text that is drawn, and read back."""

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from rollflow import RequestError, rewards
from rollflow.rewards import network, ocr, weights

pytest.importorskip("rapidocr", reason="rapidocr is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")

FAST = "ocr:side=128"  # these letters are large


def picture(*lines, size=(256, 128), letters=36, blur=0.0):
    image = Image.new("RGB", size, (250, 245, 230))
    draw = ImageDraw.Draw(image)
    for i, text in enumerate(lines):
        draw.text((8, 8 + i * int(1.5 * letters)), text, (160, 20, 40), ImageFont.load_default(letters))
    return image.filter(ImageFilter.GaussianBlur(blur))


def tensor(*pictures):
    return torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) / 255 for one in pictures])


def test_text_that_is_right_wrong_blurred_and_missing():
    right, wrong, other = picture("HELLO"), picture("HELO"), picture("AGAIN")
    smeared, missing = picture("HELLO", blur=15), picture()
    scores = rewards.make(FAST)(tensor(right, wrong, other, smeared, missing), ['a sign, "Hello"'] * 5)
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx([1, 0.8, 0, 0, 0])


def test_a_batch_of_mixed_prompts_is_as_one_by_one():
    images = tensor(picture("OPEN 24h"), picture("DON'T", "STOP"), picture("EXIT"))
    prompts = ["a door that says “Open 24h”", "the king's 'Don't stop' banner", 'an "OPEN" sign']
    together = rewards.make(FAST)(images, prompts)
    alone = [rewards.make(FAST)(images[i : i + 1], prompts[i : i + 1]).item() for i in range(3)]
    assert together.tolist() == alone
    assert together[:2].tolist() == [1, 1] and 0 <= together[2] < 0.5


def test_it_reads_what_rapidocr_reads():
    from rapidocr import RapidOCR

    threads = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
    usual = RapidOCR(params={"Global.log_level": "error", "Global.use_cls": False, **threads})
    reader = rewards.make("ocr").reader()
    image = picture("Sing", "LOUD", size=(113, 101), letters=30)
    expected = usual(image).txts
    assert expected and reader.read(np.array(image)[None]) == [expected]


def test_several_quoted_texts():
    image = tensor(picture("TOP", "BOTOM"))
    assert rewards.make(FAST)(image, ['"top" above "bottom"']).item() == pytest.approx(1 - 1 / 9)
    assert rewards.make(FAST)(image, ['"bottom" below "top"']).item() == pytest.approx(1 - 1 / 9)
    assert rewards.make(FAST)(image, ['"top" and "nothing"']).item() < 0.6


def test_clips_by_their_frames():
    clip = tensor(picture("EXIT"), picture())[None]
    scores = [rewards.make(f"ocr:side=128,frames={way}")(clip, ["'EXIT'"]).item() for way in ("mean", "min", "first")]
    assert scores == [0.5, 0, 1]


@pytest.mark.parametrize(
    ("lines", "wanted", "score"),
    [
        (["HELLO"], ["hello"], 1),
        (["say HELLO world"], ["hello"], 1),  # what is around it does not matter once it is there
        (["hallo"], ["hello"], 0.8),
        (["hellooo"], ["hello"], 1),
        ([], ["hello"], 0),
        (["x" * 50], ["hello"], 0),  # and never less
        (["Hel", "lo"], ["hello"], 1),
        (["ab", "cd", "xyz"], ["xyz", "abcd"], 1),
        (["ab", "noise", "cx"], ["ab", "cd"], 0.75),  # each against its own line
    ],
)
def test_agreement(lines, wanted, score):
    assert ocr.agreement(lines, wanted) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ('a sign "OPEN"', ["open"]),
        ("a sign “OPEN”, and „ZU“, «oui», 「はい」", ["open", "zu", "oui", "はい"]),
        ("the dog's 'Don't stop' sign", ["don'tstop"]),
        ("\u2018Don\u2019t stop\u2019, and the dogs\u2019 bowl", ["don'tstop"]),
        ("the dogs' bowl says 'HI'", ["hi"]),
        ('"A", \'B\' and "c d"', ["a", "b", "cd"]),
        ('a 12" disc that says "LP"', ["lp"]),
        ("rock 'n' roll, 'YES'", ["yes"]),
        ('"" and "\ufb01ne \u2013 x"', ["fine-x"]),
        ('"it\u2019s “here”"', ['it\'s"here"']),
    ],
)
def test_what_a_prompt_quotes(prompt, found):
    assert [*ocr.quoted(prompt)] == found


@pytest.mark.parametrize("prompt", ["a red circle", "the dog's bowls and the cats' beds", '""', 'a 12" disc', "' '"])
def test_a_prompt_that_quotes_nothing_is_refused(prompt):
    with pytest.raises(RequestError, match="quotes none: put it in quotes") as caught:
        rewards.make("ocr").check(prompt)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["ocr:threads=0", "ocr:side=8", "ocr:confidence=2"])
def test_options_that_cannot_be(spec):
    with pytest.raises(RequestError, match=spec.partition(":")[2]):
        rewards.make(spec)


def test_small_wide_and_odd_images_are_read():
    for height, width in [(64, 64), (17, 300), (200, 9), (1, 1)]:
        assert rewards.make(FAST)(torch.ones(1, 3, height, width), ['"a"']).item() == 0


def test_threads_take_turns():
    image, prompts = tensor(picture("HELLO")), ['"hello"']
    with ThreadPoolExecutor(3) as threads:
        scores = [*threads.map(lambda _: rewards.make(FAST)(image, prompts).item(), range(3))]
    assert scores == [1, 1, 1]
    assert not rewards.concurrent(rewards.make("ocr"))


def test_threads_are_limited(monkeypatch):
    import cv2

    reader = rewards.make(FAST).reader()
    options = reader._reads.text_det.session.session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)
    before, seen = cv2.getNumThreads(), []
    monkeypatch.setattr(reader, "_reads", lambda picture: seen.append(cv2.getNumThreads()) or _Nothing)
    reader.read(np.zeros((1, 8, 8, 3), np.uint8))
    assert (seen, cv2.getNumThreads()) == ([1], before)


class _Nothing:
    txts = None


def test_nothing_is_fetched(monkeypatch, tmp_path):
    def refuse(*_):
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    reader = ocr.Reader(1, 0.5, 128)
    assert reader.read(np.array(picture("HELLO"))[None]) == [("HELLO",)]

    part, folder = reader._reads.cfg.Det, Path(reader._reads.cfg.Det.model_path).parent
    assert ocr._network(part, folder).parent == folder
    with pytest.raises(RequestError, match="install it again") as caught:
        ocr._network(part, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(network, "find_spec", lambda name: None if name == "rapidocr" else name)
    with pytest.raises(RequestError, match=r"takes rapidocr: pip install 'rollflow\[rewards\]'"):
        rewards.make("ocr").check('"a"')


def test_the_networks_are_loaded_once():
    assert rewards.make(FAST).reader() is rewards.make("ocr:side=128,frames=min").reader()
    weights.forget()
    assert rewards.make(FAST)(tensor(picture("HELLO")), ['"HELLO"']).item() == 1
