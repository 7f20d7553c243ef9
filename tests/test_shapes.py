"""The procedural world: prompts and their targets, scenes, the committed prompt sets."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollflow.bench import prompt_sets
from rollflow.bench import shapes_networks as networks
from rollflow.errors import RequestError
from rollflow.models import world


@given(st.integers(1, 9), st.integers(1, 3), st.integers(0, len(world.WORDINGS) - 1), st.integers(0, 2**32))
def test_a_prompt_asks_for_the_scene_it_was_made_of(total, groups, wording, seed):
    rng = np.random.default_rng(seed)
    made = world.random_groups(rng, total, min(groups, total))
    text = world.prompt(made, wording)
    assert world.parse_prompt(text) == made
    target = world.target_counts(text)
    assert target.sum() == total and (world.random_scene(rng, made).counts() == target).all()
    ids = networks.token_ids([text])[0]
    assert 2 not in ids and ids[-1] in (0, 1)  # no unknown word, and the end mark fits


@given(st.integers(0, 2**32))
def test_objects_keep_apart_and_inside(seed):
    rng = np.random.default_rng(seed)
    scene = world.random_scene(rng, world.random_groups(rng, int(rng.integers(1, 10)), 1))
    reach = scene.radius * np.array([world.EXTENT[world.CLASSES[k][1]] for k in scene.kind])
    assert (np.minimum(scene.x, scene.y) >= reach).all()
    assert (np.maximum(scene.x, scene.y) <= world.SIZE - reach).all()
    distance = np.hypot(scene.x[:, None] - scene.x, scene.y[:, None] - scene.y)
    apart = distance - reach[:, None] - reach
    np.fill_diagonal(apart, np.inf)
    assert (apart > 2).all()


@pytest.mark.parametrize("shape", world.SHAPES)
def test_coverage_has_the_area_of_the_shape(shape):
    grid = np.arange(64) + 0.5
    ink = world.coverage(shape, grid[None] - 32.3, grid[:, None] - 31.6, 9.0).sum()
    side = 0.886 * 9 * 2 if shape == "square" else 1.35 * 9 * 3**0.5
    area = {"circle": np.pi * 81, "square": side**2, "triangle": side**2 * 3**0.5 / 4}[shape]
    assert ink == pytest.approx(area, rel=0.02)


@pytest.mark.parametrize(
    "text",
    ["", "hello", "red circles", "two pink circles", "two red circles and blue squares", "two red and blue circles"],
)
def test_unclear_prompts_are_refused(text):
    with pytest.raises(RequestError, match="cannot be read as groups of shapes"):
        world.parse_prompt(text)


def test_too_many_objects_are_refused():
    with pytest.raises(RequestError, match="asks for 18 objects: a scene has at most 9"):
        world.parse_prompt("nine red circles and nine blue squares")
    assert world.target_counts("a red circle and two red circles")[0] == 3


@pytest.mark.parametrize("name", prompt_sets.SETS)
def test_prompt_sets_are_100_distinct_prompts_of_their_range(name):
    prompts = prompt_sets.load(name)
    least, most = prompt_sets.SETS[name]
    totals = [world.target_counts(prompt).sum() for prompt in prompts]
    assert len(set(prompts)) == 100 and min(totals) >= least and max(totals) <= most
