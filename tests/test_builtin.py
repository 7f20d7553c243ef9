"""The built-in model as a user meets it: a small, genuine FluxPipeline that searches can improve on."""

import pytest
import torch
from diffusers import FluxPipeline

from rollflow import methods, models
from rollflow.bench import contenders, prompt_sets
from rollflow.engine import Engine
from rollflow.request import Request

pytestmark = pytest.mark.usefixtures("one_thread")

ODE = {"method": "bon", "interpolant": "linear", "diffusion": 0.0, "grid": "uniform", "steps": 10}


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained("shapes")


def accuracy(engine, prompts, **options):
    results = engine.generate([Request(prompt, seed=i, **options) for i, prompt in enumerate(prompts)])
    return sum(result.reward == 0 for result in results) / len(prompts)


@pytest.mark.parametrize("name", ["shapes", "shapes-base"])
def test_the_folder_is_small_and_loads_without_us(name):
    path = models.folder(name)
    assert sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) <= 12 * 2**20
    pipeline = FluxPipeline.from_pretrained(path)
    assert {p.dtype for p in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2)} == {torch.float32}
    image = pipeline("two red circles", num_inference_steps=4, height=64, width=64, max_sequence_length=16).images[0]
    assert image.size == (64, 64)


def test_it_is_a_few_step_model_and_sets_differ_in_difficulty(engine):
    sets = {name: prompt_sets.load(name)[:50] for name in prompt_sets.SETS}
    ten = {name: accuracy(engine, prompts, nfe=10, **ODE) for name, prompts in sets.items()}
    assert 0.6 <= ten["easy"] <= 0.9 and 0.2 <= ten["medium"] <= 0.5 and 0.01 <= ten["hard"] <= 0.12, ten
    one = {name: accuracy(engine, prompts, nfe=1, **{**ODE, "steps": 1}) for name, prompts in sets.items()}
    assert one["easy"] >= ten["easy"] / 2 and sum(one.values()) >= sum(ten.values()) / 2, (one, ten)


def test_a_search_mends_what_the_base_model_gets_wrong(engine):
    prompts = prompt_sets.load("medium")[:12]
    base, found = accuracy(engine, prompts, nfe=10, **ODE), accuracy(engine, prompts)
    assert found >= base + 0.2, (base, found)


def test_every_method_runs_on_every_path_that_makes_sense_for_it(engine):
    """In one call, so that they share forwards; each spends its budget, and none harms another."""
    requests = []
    for i, name in enumerate(methods.names()):
        for path, options in contenders.PATHS.items():
            if not (path == contenders.ODE and methods.branches(name)):
                options = {**options, "nfe": 20, "steps": 4, "seed": i, "method": name}
                requests.append(
                    Request("two red circles", reward="soft_count" if name == "dps" else "count", **options)
                )
    for name in ("svdd", "rbf"):
        requests.append(Request("one blue square", reward="soft_count", method=name, nfe=21, options={"gradient": 0.1}))
    results = engine.generate(requests)
    assert len(results) == 3 * len(methods.names()) - 10 + 2  # ten of them branch
    assert all(r.committed_nfe == r.request.nfe and r.reward <= 0 and r.held_out is not None for r in results)
    alone = engine.generate(requests[0])
    assert abs(alone.reward - results[0].reward) < 1e-3
