"""Scales and negative prompts that would mean nothing are refused when a request is handed in, not passed over."""

import pytest
from tiny import Tiny, assert_sound, bon, engine
from tiny_image import IMAGE

from rollflow import Engine, ModelError, Request, RequestError
from rollflow.errors import LONGEST
from rollflow.models import Capabilities
from rollflow.models.cfg import ClassifierFree
from rollflow.models.pipeline import PipelineModel
from rollflow.models.pipeline.families import Family
from rollflow.models.rule import Rule


class Chooses(Tiny):
    """Has classifier-free guidance of its own, by a member that a test may break."""

    capabilities = Capabilities(companies=True, negative=True, guides=True)
    broken, above = None, 1.0

    def guides(self, guidance, geometry):
        if self.broken == "guides":
            raise KeyError("the scale")
        return guidance > self.above

    def for_request(self, conditioning, guidance):
        if self.broken == "for_request":
            raise KeyError("the scale")
        return conditioning

    def company(self, conditioning):
        return None

    def network_rows(self, conditioning):
        return 2


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def refused(engine, message, **options):
    with pytest.raises(RequestError, match=message) as caught:
        engine.submit(bon(**options))
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= LONGEST


@pytest.mark.parametrize("make", [Tiny, Chooses, lambda: ClassifierFree(Tiny())])
def test_a_scale_below_zero_is_refused(make):
    with engine(make()) as made:
        refused(made, "guidance=-1: this model does not guide below 0; give a scale of at least 0", guidance=-1)
        assert made.generate(bon(guidance=0)).committed_nfe == 4
        assert_sound(made)


def test_a_model_that_guides_below_zero_is_asked_to():
    model = Chooses()
    model.above = -5
    with engine(model) as made:
        assert made.generate(bon(guidance=-1, negative="b")).committed_nfe == 4
        refused(made, "guidance=-6: ", guidance=-6)


@pytest.mark.parametrize(
    ("make", "off", "on"),
    [
        (Chooses, (1, 0.5), 2),
        (lambda: ClassifierFree(Tiny()), (1, 0.5), 1.5),
        (lambda: ClassifierFree(Tiny(), Rule("with", above=0.0)), (0,), 0.5),
    ],
)
def test_a_negative_prompt_without_guidance_is_refused(make, off, on):
    with engine(make()) as made:
        for scale in off:
            refused(made, f"negative='b': at guidance={scale} this model does not guide", guidance=scale, negative="b")
            assert made.generate(bon(guidance=scale, negative="")).committed_nfe == 4  # asks for nothing
        assert made.generate(bon(guidance=on, negative="b")).committed_nfe == 4
        assert made.generate(bon(negative="b")).committed_nfe == 4  # at the model's own scale
    with engine(Tiny()) as made:
        refused(made, "negative='b': this model has no classifier-free guidance", guidance=2, negative="b")


def test_a_learned_pipeline_knows_at_which_scales_it_guides():
    one = IMAGE["ZImagePipeline"]  # v = c + s (c - u)
    model = PipelineModel(one.build(), Family(fixed=one.call))
    asked = {"nfe": 1, "steps": 1, "method": "bon", "height": one.height, "width": one.width, "negative": "blurred"}
    with Engine(model, buckets=[1], lanes=1, threads=1) as made:
        for scale, message in ((0, "negative='blurred': at guidance=0 "), (-2, "guidance=-2: ")):
            with pytest.raises(RequestError, match=message):
                made.submit(Request("a cat", brightness, guidance=scale, **asked))
        assert made.generate(Request("a cat", brightness, guidance=0.5, **asked)).network_rows == 2


def test_errors_of_the_models_own_members_are_the_models():
    model = Chooses()
    with engine(model) as made:
        model.broken = "guides"
        with pytest.raises(ModelError, match=r"the model raised KeyError .*the scale"):
            made.submit(bon())
        model.broken = "for_request"
        with pytest.raises(ModelError, match="the model raised KeyError for a batch of this request: 'the scale'"):
            made.generate(bon())
        model.broken = None
        assert_sound(made)


def test_a_capability_without_its_member_is_refused():
    class Lacks(Tiny):
        capabilities = Capabilities(guides=True)

    with pytest.raises(ModelError, match="declares the capability guides and lacks guides"):
        engine(Lacks())
