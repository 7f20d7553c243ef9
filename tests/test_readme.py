"""The README's programs do what it says."""

import re
import urllib.request
from pathlib import Path

import torch
import workers
from PIL import Image
from serving import Served
from tiny_image import IMAGE
from tiny_video import VIDEO

from rollflow import Engine
from rollflow.models.tested import markdown
from rollflow.serve.limits import ServeSettings
from rollflow.serve.local import LocalChannel

README = Path(__file__).parent.parent / "README.md"


def program(marker):
    """The Python block that follows a marker."""
    return README.read_text().split(f"<!-- {marker} -->")[1].split("```python\n")[1].split("```")[0]


def test_an_asyncio_program_embeds_the_engine(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "program"}
    exec(compile(program("embed"), "README.md", "exec"), names)
    whole, preview, timed = names["results"]
    assert whole.stopped == "budget" and whole.committed_nfe == 200
    assert preview.stopped == "cancelled" and 40 <= preview.committed_nfe < 500 and Path("preview.png").stat().st_size
    assert timed.stopped in ("seconds", "budget")
    said = capsys.readouterr().out
    assert "whole: 200 NFE" in said and "done, " in said  # the last update, and the callback's job


def brightness(images, prompts):
    return images.flatten(1).mean(1)


def test_a_program_runs_a_pipeline_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    VIDEO["LTXPipeline"].build().save_pretrained("my-model")
    names = {"__name__": "program"}
    exec(compile(program("model"), "README.md", "exec"), names)
    guided, plain = names["results"]
    assert guided.network_rows == 2 * guided.executed_nfe and plain.network_rows == plain.executed_nfe
    assert Image.open("cat.gif").n_frames == 9 and Image.open("dog.png").size == (96, 64)
    assert guided.pixels.shape == (9, 3, 64, 96) and "cat.gif" in capsys.readouterr().out


def test_the_official_client_asks_a_server(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    engine = Engine.from_pretrained("shapes", lanes=1, threads=1, buckets=(8,))
    with engine, Served([LocalChannel(engine)], ServeSettings(model="shapes")) as served:
        exec(compile(program("serve").replace("http://127.0.0.1:8000", served.url), "README.md", "exec"), {})
    reward, *events = capsys.readouterr().out.splitlines()
    assert Image.open("circles.png").size == (64, 64) and float(reward.split()[0]) <= 0 and len(events) >= 1
    assert events[-1].startswith("image_generation.completed") and events[-1].endswith(" 200")


def test_the_metrics_of_the_text_are_there():
    named = {*re.findall(r"\brollflow_[a-z_]+", README.read_text())}
    engine = workers.engine()
    with engine, Served([LocalChannel(engine)], ServeSettings(model="tiny")) as served:
        text = urllib.request.urlopen(f"{served.url}/metrics", timeout=60).read().decode()
    there = {*re.findall(r"^(rollflow_\w+)", text, re.M)}
    assert {"rollflow_workers_alive", "rollflow_requests_total", "rollflow_outstanding_nfe"} <= named <= there


def test_a_model_by_hand_makes_what_its_pipeline_makes():
    pipeline = IMAGE["StableDiffusion3Pipeline"].build()
    names = {"__name__": "program", "pipeline": pipeline}
    exec(compile(program("family"), "README.md", "exec"), names)
    model = names["engine"].model
    noise = torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(0))
    asked = {"reward": brightness, "method": "bon", "nfe": 4, "steps": 4, "interpolant": "linear", "diffusion": 0}
    asked |= {"height": 32, "width": 48}
    states = model.layout.pack(noise[None])
    with names["engine"] as by_hand, Engine(pipeline) as learned:
        for guidance, negative in ((5.0, "blue"), (1.0, None)):
            asked |= {"guidance": guidance, "negative": negative}
            found = by_hand.generate("a red cat", latents=states, **asked)
            expected = learned.generate("a red cat", latents=noise, **asked)
            torch.testing.assert_close(found.pixels, expected.pixels, atol=1e-4, rtol=0)
            assert found.network_rows == expected.network_rows == (8 if guidance > 1 else 4)


def test_the_families_are_those_of_the_list():
    table = README.read_text().split("<!-- families table -->\n")[1].split("\n<!-- end of families table -->")[0]
    assert table == markdown()
