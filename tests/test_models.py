"""What a model declares, and what is taken for one."""

import inspect

import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline, FluxPipeline

from rollflow.device import calibrate
from rollflow.errors import ModelError
from rollflow.models import Capabilities, FlowModel, Geometry, adapt, folder
from rollflow.models.flux import FluxModel
from rollflow.models.layout import Layout

LAYOUT = Layout((1, 2, 2), (1.0,) * 3, (0.0,) * 3)


class Least(FlowModel):
    """No more than a model needs; it counts its forwards."""

    device, dtype, layout = torch.device("cpu"), torch.float32, LAYOUT
    forwards = 0

    def geometry(self, height=None, width=None):
        return Geometry(8, 8, 8, 8, 16, 12)

    def check_prompt(self, prompt):
        pass

    def encode(self, prompts):
        return [None for _ in prompts]

    def velocity(self, x, tau, conditioning, guidance, geometry):
        self.forwards += 1
        return x

    def decode(self, latents):
        return latents


class Stranger:
    """A model that does not inherit from `FlowModel`."""

    device, dtype, layout, capabilities = torch.device("cpu"), torch.float32, LAYOUT, Capabilities()
    geometry, check_prompt, encode, velocity, decode = (
        Least.geometry, Least.check_prompt, Least.encode, Least.velocity, Least.decode
    )  # fmt: skip


@pytest.fixture(scope="module")
def pipeline():
    return FluxPipeline.from_pretrained(folder("shapes"), dtype=torch.float32)


def test_a_model_stays_as_it_is():
    for model in (Least(), Stranger()):
        assert adapt(model) is model and model.capabilities == Capabilities()


def test_a_pipeline_is_adapted_and_declares_what_its_adapter_can(pipeline):
    model = adapt(pipeline)
    assert isinstance(model, FluxModel) and adapt(model) is model
    declared = model.capabilities
    assert (declared.preview, declared.graphable, declared.recordable, declared.releases_text) == (False, *(True,) * 3)
    assert declared.signature == adapt(pipeline).capabilities.signature
    light = AutoencoderTiny(latent_channels=8, encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
                            num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4)  # fmt: skip
    other = FluxModel(pipeline, light).capabilities
    assert other.preview and other.signature != declared.signature
    assert FluxModel(pipeline, attention="math").capabilities.signature != declared.signature
    assert model.layout == Layout((1, 2, 2), (pipeline.vae.config.scaling_factor,) * 8,
                                  (pipeline.vae.config.shift_factor,) * 8)  # fmt: skip


def test_what_is_no_model_is_told_all_that_it_lacks(pipeline):
    everything = "device, dtype, layout, capabilities, geometry, check_prompt, encode, velocity, decode"
    with pytest.raises(ModelError, match=f"a NoneType is no model: it lacks {everything}; pass a flow pipeline of"):
        adapt(None)

    class Half(Stranger):
        layout = property()
        decode = property()  # raises AttributeError

    with pytest.raises(ModelError, match="a Half is no model: it lacks layout, decode; "):
        adapt(Half())

    class Unfinished(FlowModel):
        """Inherits what the protocol writes down, which is nothing to run."""

        device, dtype, layout = torch.device("cpu"), torch.float32, LAYOUT
        geometry, check_prompt, velocity = Least.geometry, Least.check_prompt, Least.velocity

    with pytest.raises(ModelError, match="a Unfinished is no model: it lacks encode, decode; "):
        adapt(Unfinished())


def test_pipelines_that_cannot_be_adapted(pipeline):
    class Other(DiffusionPipeline):
        pass

    adapter = inspect.unwrap(FluxModel.__init__)  # the test run's annotation checks know the pipelines already
    with pytest.raises(ModelError, match="a Other is no pipeline that rollflow knows: pass a FluxPipeline"):
        adapter(object.__new__(FluxModel), Other())
    parts = {**pipeline.components, "vae": None}
    with pytest.raises(ModelError, match="the pipeline lacks vae: load it whole"):
        adapt(FluxPipeline(**parts))


def test_declarations_that_are_not_kept():
    model = Least()
    for capability, lacks in (
        ("preview", "preview"),
        ("graphable", "collate, forward"),
        ("recordable", "record"),
        ("releases_text", "release_text_encoders"),
    ):
        model.capabilities = Capabilities(**{capability: True})
        with pytest.raises(ModelError, match=f"a Least declares the capability {capability} and lacks {lacks}$"):
            adapt(model)
    model.capabilities = {"preview": True}
    with pytest.raises(ModelError, match=r"has a dict as its capabilities: .* a rollflow.models.Capabilities"):
        adapt(model)
    model.capabilities, model.layout = Capabilities(), (1, 2, 2)
    with pytest.raises(ModelError, match=r"has a tuple as its layout: .* a rollflow.models.layout.Layout"):
        adapt(model)


def test_measurements_are_kept_by_signature_and_never_without_one():
    geometry = Least().geometry()

    def forwards(signature):
        model = Least()
        model.capabilities = Capabilities(signature=signature)
        timing, seconds = calibrate.measured(model, geometry, None, (1, 2), 1, False, True), None
        while True:  # as the loop does, on a lane
            try:
                work = timing.send(seconds)
            except StopIteration as stop:
                assert [*stop.value] == [1, 2]
                break
            seconds = work()
        calibrate.best_lanes(model, geometry, None, False)
        return model.forwards

    assert forwards(None) and forwards(None)
    assert forwards("test_models: one") and not forwards("test_models: one")
    assert forwards("test_models: two")
