"""The held-out judge: what it counts on fresh scenes, that it is independent of the parser, and its training data."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from rollflow import rewards
from rollflow.bench import train_classifier
from rollflow.errors import RequestError
from rollflow.models import world
from rollflow.rewards.classifier import WEIGHTS, CountClassifier


@pytest.fixture(scope="module")
def judge() -> CountClassifier:
    return CountClassifier()


@pytest.fixture(scope="module")
def fresh() -> tuple[Tensor, Tensor]:
    """Scenes of a seed that no training used, and their true counts [scene, 13]."""
    rng = np.random.default_rng(987_654)
    scenes = [train_classifier.random_scene(rng) for _ in range(250)]
    return world.render_batch(scenes), torch.tensor(np.array([[*scene.counts(), 0] for scene in scenes]))


def test_fresh_scenes(judge: CountClassifier, fresh: tuple[Tensor, Tensor]):
    images, counts = fresh
    assert (judge.counts(images) == counts).all(1).float().mean() >= 0.97


def test_perturbed_scenes(judge: CountClassifier, fresh: tuple[Tensor, Tensor]):
    images, counts = fresh
    perturbed = train_classifier.perturb(images, torch.Generator().manual_seed(5))
    assert (judge.counts(perturbed) == counts).all(1).float().mean() >= 0.95


def test_fakes_do_not_pass_as_objects(judge: CountClassifier):
    rng = np.random.default_rng(3)
    y, x = np.mgrid[: world.SIZE, : world.SIZE].astype(np.float32) + 0.5
    images = []
    for distractor in train_classifier.DISTRACTORS:
        for _ in range(15):
            ink, color = distractor(rng, x - rng.uniform(16, 48), y - rng.uniform(16, 48), rng.uniform(5.5, 9))
            images.append((1 - ink[..., None]) * np.float32(world.CANVAS) + ink[..., None] * color)
    counts = judge.counts(torch.from_numpy(np.stack(images)).float().permute(0, 3, 1, 2))
    assert (counts[:, :-1].sum(1) == 0).float().mean() >= 0.9
    assert (counts[:, -1] >= 1).float().mean() >= 0.9


def test_the_score_is_on_the_scale_of_the_count_reward(judge: CountClassifier):
    assert isinstance(judge, rewards.Reward) and rewards.held_out(rewards.make("count")).name == judge.name
    scene = world.random_scene(np.random.default_rng(0), [(2, "red", "circle"), (1, "blue", "square")])
    images = world.render_batch([scene]).expand(3, -1, -1, -1)
    prompts = ["two red circles and one blue square", "three red circles", "one yellow triangle"]
    assert judge(images, prompts).tolist() == [0, -2, -6]
    assert judge.exact(images, prompts).tolist() == [True, False, False]


def test_what_it_cannot_judge_is_refused(judge: CountClassifier):
    with pytest.raises(RequestError, match="64 x 64"):
        judge(torch.zeros(1, 3, 128, 128), ["a red circle"])
    with pytest.raises(RequestError, match="two red circles"):
        judge.check("a cat")


def test_its_weights_are_small_and_its_code_knows_nothing_of_the_parser():
    assert WEIGHTS.stat().st_size <= 300_000
    code = "import sys, rollflow.rewards.classifier; sys.exit('rollflow.rewards.count' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_heat_map_sums_to_the_counts():
    kind, x, y = np.array([0, 0, 11, 12]), np.array([0.0, 64, 31.3, 12]), np.array([0.0, 64, 17.9, 60])
    heat = train_classifier.heat_map(kind, x, y)
    np.testing.assert_allclose(heat.sum((1, 2)), np.bincount(kind, minlength=13), rtol=1e-5)
    row, column = np.unravel_index(heat[11].argmax(), heat[11].shape)
    assert (row, column) == (4, 7)


def test_the_recipe_trains_a_little_and_repeats_itself(tmp_path):
    recipe = train_classifier.Recipe(out=tmp_path / "weights.safetensors", steps=2, batch=2, device="cpu")
    first, second = (train_classifier.train(recipe).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
