"""The command line and `Engine.from_pretrained` on pipelines of diffusers: what is loaded, learned, planned."""

import json

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_image import IMAGE
from tiny_image_more import MORE
from tiny_video import VIDEO
from torch import nn

from rollflow import Engine, ModelError, RequestError, rewards
from rollflow.bench import throughput
from rollflow.bench.pipelines import brightness, pipeline_bon
from rollflow.bench.throughput import Throughput
from rollflow.cli import commands as cli
from rollflow.cli import learned, measuring, options, reports, sizes
from rollflow.cli.memory import Plan
from rollflow.cli.probe import Probe
from rollflow.cli.reports import _affine, memory
from rollflow.models import BUILT_IN, loading
from rollflow.models.flux import FluxModel
from rollflow.models.pipeline import PipelineModel
from rollflow.models.tested import TESTED
from rollflow.models.text import Size
from rollflow.rewards import own
from rollflow.rewards.classifier import _trained

pytestmark = pytest.mark.usefixtures("one_thread")

CLIP = {"height": 64, "width": 96, "frames": 9}
SIZE = ("--height", 64, "--width", 96, "--frames", 9)
CPU = torch.device("cpu")


def redness(images, prompts):
    return images[..., 0, :, :].flatten(1).mean(1) - images[..., 1:, :, :].flatten(1).mean(1)


REDNESS = f"{__file__}:redness"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A pipeline of video, as `save_pretrained` writes it."""
    path = tmp_path_factory.mktemp("models") / "ltx"
    VIDEO["LTXPipeline"].build().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def flux(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "flux"
    IMAGE["FluxPipeline"].build().save_pretrained(path)
    return path


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = cli.main([*map(str, arguments)])
        return (code, *capsys.readouterr())

    return call


def one_line(outcome, *parts):
    code, printed, complaint = outcome
    assert (code, printed) == (2, "")
    assert complaint.startswith("rollflow: error: ") and complaint.count("\n") == 1 and len(complaint) < 600
    for part in parts:
        assert part in complaint


# Loading.


def test_a_folder_says_what_it_is(folder, flux):
    with Engine.from_pretrained(folder, device="cpu") as engine:
        assert isinstance(engine.model, PipelineModel)
        assert isinstance(engine.model.pipeline, diffusers.LTXPipeline)
    with Engine.from_pretrained(flux, device="cpu") as engine:
        assert isinstance(engine.model, FluxModel)
    assert (loading.class_of(folder), loading.class_of(flux)) == ("LTXPipeline", "FluxPipeline")
    assert [loading.class_of(name) for name in (*BUILT_IN[:1], "nowhere", "a.safetensors")] == ["FluxPipeline", "", ""]


def test_a_single_file_is_loaded_by_its_class(folder, tmp_path, monkeypatch):
    asked = {}

    def from_single_file(path, **options):
        asked.update(options, path=path)
        return diffusers.LTXPipeline.from_pretrained(folder)

    monkeypatch.setattr(diffusers.LTXPipeline, "from_single_file", from_single_file)
    file = tmp_path / "model.safetensors"
    file.touch()
    with Engine.from_pretrained(file, device="cpu", pipeline="LTXPipeline") as engine:
        assert isinstance(engine.model.pipeline, diffusers.LTXPipeline)
    assert asked == {"path": str(file), "torch_dtype": torch.float32}


def test_what_cannot_be_loaded_is_one_line(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "one.safetensors").touch()
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    ways = r"cannot be loaded as a pipeline \(.*\): pass a built-in model \(shapes.*save_pretrained.*hub id.*single"
    for name, pipeline, message in (
        ("empty", None, ways),
        ("strange", None, ways),
        ("nowhere", None, r"there is no model '.*nowhere': pass a built-in model \(shapes.*save_pretrained.*single"),
        ("one.safetensors", None, r"is a single file.*pipeline='FluxPipeline' \(--pipeline"),
        ("one.safetensors", "LTXPipelin", r"has no pipeline of this name: did you mean LTXPipeline"),
        ("one.safetensors", "FluxTransformer2DModel", "has no pipeline of this name"),
        ("one.safetensors", "WanPipeline", "a WanPipeline cannot be loaded from a single file"),
        ("two.safetensors", "LTXPipeline", "there is no such file"),
        ("one.safetensors", "LTXPipeline", "cannot be loaded as a pipeline"),
    ):
        with pytest.raises(ModelError, match=message):
            loading.load(tmp_path / name, CPU, torch.float32, pipeline)


def test_a_pipeline_that_takes_accelerate_says_so(folder, monkeypatch):
    def refusing(path, **options):
        raise ValueError("`low_cpu_mem_usage` cannot be False when `keep_in_fp32_modules` is True.")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", refusing)
    monkeypatch.setattr(loading, "is_accelerate_available", lambda: False)
    with pytest.raises(ModelError, match=r"\(it takes accelerate: pip install accelerate\)"):
        loading.load(folder, CPU, torch.float32)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preview": True}, "preview=True: it is for FluxPipelines, and this is a LTXPipeline"),
        ({"dtype": "auto"}, "dtype='auto': it is for FluxPipelines, and this is a LTXPipeline"),
        ({"attention": "math"}, "attention='math': it is for FluxPipelines, and this is a LTXPipeline"),
        ({"compile": "all"}, "compile='all': it is for FluxPipelines, and this is a LTXPipeline"),
        ({"text_tokens": 256}, "text_tokens=256: it is for FluxPipelines, and this is a LTXPipeline"),
        ({"compile": "max"}, "compile='max': choose regional or all"),
        ({"quantize": "fp4"}, "quantize='fp4': choose fp8"),
    ],
)
def test_options_that_a_pipeline_cannot_honour(folder, given, message):
    with pytest.raises(RequestError, match=message):
        Engine.from_pretrained(folder, device="cpu", **given)


def test_both_networks_of_a_pipeline_are_compiled(monkeypatch):
    pipeline = VIDEO["WanPipeline 2.2 A14B"].build()
    assert loading.networks(pipeline) == [pipeline.transformer, pipeline.transformer_2]
    compiled = []
    monkeypatch.setattr(type(pipeline.transformer), "compile_repeated_blocks", lambda self, **_: compiled.append(self))
    monkeypatch.setattr(loading, "load", lambda *_, **__: pipeline)
    Engine.from_pretrained("anything", device="cpu", compile="regional").close()
    assert compiled == loading.networks(pipeline)


# Generate.


def test_a_search_on_the_cpu_writes_a_clip(run, folder, tmp_path):
    code, printed, complaint = run(
        "generate", "a red cat", "a dog that runs", "--model", folder, *SIZE, "--reward", REDNESS, "--method", "bon",
        "--nfe", 9, "--steps", 3, "--grid", "model", "--guidance", 4, "--negative", "blue", "--out", tmp_path,
    )  # fmt: skip
    assert (code, complaint) == (0, "")
    record = json.loads((tmp_path / "a-red-cat-seed0.json").read_text())
    asked = {"guidance": 4.0, "negative": "blue", "reward": "redness", "frames": 9, "height": 64, "width": 96}
    assert asked.items() <= record["request"].items()
    assert record["frames"] == 9 and record["committed_nfe"] == 9
    assert record["network_rows"] == 2 * record["executed_nfe"]
    assert "a-red-cat-seed0.gif" in printed and "a-dog-that-runs-seed0.gif" in printed
    with Engine.from_pretrained(folder, device="cpu") as engine:
        given = {"grid": "model", "guidance": 4, "negative": "blue", "method": "bon", "nfe": 9, "steps": 3, **CLIP}
        result = engine.generate("a red cat", reward=redness, **given)
    assert record["request"]["times"] == pytest.approx(result.request.times)
    clip = Image.open(tmp_path / "a-red-cat-seed0.gif")
    assert (clip.n_frames, clip.size) == (len(result.frames), (96, 64)) == (9, (96, 64))
    for i, frame in enumerate(result.frames):
        clip.seek(i)
        seen, made = (np.asarray(one.convert("RGB").resize((12, 8), Image.BOX), float) for one in (clip, frame))
        assert abs(seen - made).mean() < 6  # of 255: a GIF has 256 colours


def test_of_a_clip_a_format_of_images_has_one_frame_and_guidance_1_takes_one_row(run, folder, tmp_path):
    base = ("generate", "a cat", "--model", folder, *SIZE, "--reward", REDNESS, "--method", "bon", "--nfe", 2)
    assert run(*base, "--steps", 2, "--guidance", 1, "--format", "png", "--out", tmp_path)[0] == 0
    assert Image.open(tmp_path / "a-cat-seed0.png").size == (96, 64)
    record = json.loads((tmp_path / "a-cat-seed0.json").read_text())
    assert record["network_rows"] == record["executed_nfe"] and not (tmp_path / "a-cat-seed0.gif").exists()


def test_a_search_starts_from_a_clip(run, folder, tmp_path):
    base = ("generate", "a cat", "--model", folder, *SIZE, "--reward", REDNESS, "--method", "bon", "--nfe", 2)
    assert run(*base, "--steps", 2, "--out", tmp_path)[0] == 0
    first = tmp_path / "a-cat-seed0.gif"
    unsized = [part for part in base if part not in SIZE]  # the clip says its own
    code, _, complaint = run(*unsized, "--steps", 2, "--image", first, "--strength", 0.5, "--out", tmp_path / "second")
    assert (code, complaint) == (0, "")
    request = json.loads((tmp_path / "second" / "a-cat-seed0.json").read_text())["request"]
    assert (request["strength"], request["image"]) == (0.5, str(first)) and CLIP.items() <= request.items()


def test_what_a_search_on_a_pipeline_cannot_do_is_one_line(run, folder, tmp_path, monkeypatch):
    base = ("generate", "a cat", "--model", folder, "--reward", REDNESS, "--nfe", 8, "--steps", 2, "--out", tmp_path)
    one_line(run(*base, "--height", 64, "--width", 90), "divisible by 32")
    one_line(run(*base, *SIZE, "--format", "avi"), "clip.avi", ".gif")
    one_line(run(*base, *SIZE, "--fps", 0), "--fps 0", "above 0")
    one_line(run(*base, *SIZE, "--image", tmp_path / "none.png"), "none.png", "cannot be read")
    monkeypatch.setattr("rollflow.saving.find_spec", lambda name: None)
    one_line(run(*base, *SIZE, "--format", "mp4"), "imageio-ffmpeg", ".gif")
    one_line(run(*base[:4], *SIZE, "--reward", f"{__file__}:nothing"), "nothing", "cannot be loaded")
    one_line(run(*base[:4], *SIZE, "--reward", "no.such.module:f"), "no.such.module", "cannot be loaded")
    one_line(run("generate", "two red circles", "--frames", 3, "--out", tmp_path), "frames=3", "makes images")
    one_line(run("generate", "two red circles", "--negative", "x", "--out", tmp_path), "negative='x'")


def test_a_reward_of_a_file_is_one_object():
    assert own.reward_of("count") == "count"
    assert own.reward_of(REDNESS) is own.reward_of(REDNESS)
    assert own.reward_of("math:hypot")(3, 4) == 5
    for text in ("0.7*count + 0.3*motion", "vqa(backend='http://host:80')", "scores.py:", ":count"):
        assert own.reward_of(text) == text
    made = own.reward_of(f"count - 0.1*{REDNESS}")
    assert made is own.reward_of(f"count - 0.1*{REDNESS}") and made.name == "count - 0.1*redness"
    assert made.terms[0] is rewards.make("count") and made.terms[1].function is own.reward_of(REDNESS)
    assert own.reward_of(f"count - {REDNESS}").name == "count - redness"
    with pytest.raises(RequestError, match="takes two functions called f"):
        own.reward_of("a.py:f + b.py:f")
    with pytest.raises(RequestError, match="a function called count, as a built-in reward is: rename it"):
        own.reward_of("count - 0.1*scores.py:count")
    quoted = "similarity:image='my scores.py:redness' + jpeg"
    assert own.reward_of(quoted) == quoted, "what is quoted is a value"


# Probe.


def test_probe_shows_what_was_learned(run, folder, tmp_path):
    file = tmp_path / "probe.json"
    code, printed, complaint = run("probe", "--model", folder, *SIZE, "--json", file)
    assert (code, complaint) == (0, "")
    found = json.loads(file.read_text())
    assert found["pipeline"] == "LTXPipeline" and found["refused"] is None and found["size"] == CLIP
    arguments = {one["name"]: one for one in found["arguments"]}
    assert arguments["hidden_states"]["kind"] == "state" and arguments["hidden_states"]["rows"] == 0
    assert (arguments["timestep"]["kind"], arguments["timestep"]["slope"], arguments["timestep"]["offset"]) == (
        "time", 1.0, 0.0,
    )  # fmt: skip
    text = arguments["encoder_hidden_states"]
    assert text["kind"] == "rows" and text["varies"] and text["value"] == "float32 [128, 16]"
    assert found["evaluation"] == {"calls": 1, "rows": 2, "output": "a state", "sign": 1.0}
    assert found["guidance"] == {
        "kind": "classifier-free", "default": 3.0, "formula": "v = u + s (c - u)", "two_rows_above": 1.0,
        "in": "one call",
    }  # fmt: skip
    assert found["text"]["lengths"] == "fixed"
    latents = found["latents"]
    assert (latents["state"], latents["decoded"], latents["order"]) == ([12, 8], [8, 2, 2, 3], "moved")
    assert latents["scale"] == pytest.approx(torch.linspace(0.5, 1.5, 8).tolist(), abs=1e-4)
    assert latents["offset"] == pytest.approx(torch.linspace(-0.5, 0.5, 8).tolist(), abs=1e-4)
    assert len(found["times"]) == found["steps"] == 50 and found["times"][0] == pytest.approx(1)
    assert max(found["errors"].values()) < 1e-4 and {"pixels"} < found["errors"].keys()
    for part in ("LTXPipeline", "encoder_hidden_states", "the time: t", "v = u + s (c - u)", "at scales above 1",
                 "moved to other places", "its own 50 linear times", "check: pixels"):  # fmt: skip
        assert part in printed


def test_probe_shows_the_built_in_model_as_any_pipeline(run):
    code, printed, complaint = run("probe", "--height", 64, "--width", 64)
    assert (code, complaint) == (0, "")
    for part in ("FluxPipeline", "the time: t / 1000", "pooled_projections", "64x64", "none"):
        assert part in printed


def test_probe_says_how_far_a_refused_pipeline_got(run, tmp_path, monkeypatch, capsys):
    tiny = IMAGE["StableDiffusion3Pipeline"]
    pipeline = tiny.build()
    asked = Probe(height=tiny.height, width=tiny.width)
    usual = pipeline.image_processor.postprocess
    monkeypatch.setattr(pipeline.image_processor, "postprocess", lambda image, **rest: usual(image, **rest) / 2)
    found = asked.of(pipeline)
    assert found["reached"] == "everything was learned; the check of it failed" and "pixels differ" in found["refused"]
    assert found["guidance"]["kind"] == "classifier-free" and found["latents"]["order"] == "same"
    json.dumps(found)

    changed = tiny.build()
    network = changed.transformer.forward
    changed.transformer.forward = lambda hidden_states, timestep, **rest: network(
        hidden_states=hidden_states, timestep=timestep, **rest
    )
    monkeypatch.setattr("rollflow.models.pipeline.learn.NORMS", ())  # as of guidance that is not known
    found = asked.of(changed)
    assert found["reached"] == "how it calls its network was not learned" and "arguments" not in found

    changed.scheduler = diffusers.DDIMScheduler()
    monkeypatch.setattr(loading, "load", lambda *_: changed)
    code, printed, complaint = run("probe", "--model", "my/own", "--json", tmp_path / "probe.json")
    assert (code, complaint) == (1, "")
    assert "nothing of it was run" in printed and "DDIMScheduler" in printed and "flow matching" in printed
    assert json.loads((tmp_path / "probe.json").read_text())["refused"]


def test_probe_says_what_masks_a_padding(capsys):
    tiny = IMAGE["QwenImagePipeline"]
    found = Probe(height=tiny.height, width=tiny.width).of(tiny.build())
    arguments = {one["name"]: one for one in found["arguments"]}
    mask, text = (arguments[f"encoder_hidden_states{end}"] for end in ("_mask", ""))
    assert (mask["kind"], mask["rows"], mask["varies"]) == (text["kind"], text["rows"], text["varies"])
    assert mask["masks"] == "encoder_hidden_states" and mask["value"].startswith("bool [")
    assert found["text"] == {"lengths": "padded", "arguments": ["encoder_hidden_states", "encoder_hidden_states_mask"]}
    reports.print_probe(found)
    printed = " ".join(capsys.readouterr().out.split())
    assert "padded to the longest of a batch, and masked (encoder_hidden_states, encoder_hidden_states_mask)" in printed
    assert "None in the pipeline's" in printed


def test_the_size_is_told_before_it_is_taken(run, tmp_path, capsys):
    tiny = IMAGE["StableDiffusion3Pipeline"].build()
    tiny.save_pretrained(tmp_path)
    code, printed, _ = run("probe", "--model", tmp_path)
    assert code == 0
    assert printed.startswith("64x64 is taken, the model's own size: --height and --width choose another\n")
    video = PipelineModel(VIDEO["LTXPipeline"].build())
    for model, asked, found, said in (
        (PipelineModel(tiny), Size(32), Size(32, 64), "32x64 is taken, its width the model's own: --width chooses"),
        (
            PipelineModel(MORE["Kandinsky5T2IPipeline"].build()), Size(), Size(48, 32),  # not what its signature says
            "48x32 is taken, the model's own size: --height and --width choose another",
        ),
        (
            video, Size(64), Size(64, 704, 161),
            "64x704, 161 frames is taken, its width and frames the model's own: --width and --frames choose another; "
            "on a CPU this may take minutes",
        ),
    ):  # fmt: skip
        assert sizes.taken(model, asked) == found
        sizes.tell(model, asked)
        assert capsys.readouterr().out.startswith(said) and not model.spaces
    sizes.tell(video, Size(**CLIP))
    assert capsys.readouterr().out == ""
    sizes.tell(video, Size(), Size(32, 32, 9))
    assert capsys.readouterr().out.startswith("32x32, 9 frames is taken, the model's own size: --height, --width and")


def test_a_size_that_cannot_be_told_is_said_to_be_the_models_own(capsys, monkeypatch):
    model = PipelineModel(IMAGE["SanaPipeline"].build())
    with pytest.raises(RequestError, match="Invalid sample size"):  # its bins of sizes are those of larger models
        sizes.tell(model, Size())

    def refused(*_):
        raise ModelError("it cannot be run")

    monkeypatch.setattr(model.driver, "run", refused)
    sizes.tell(model, Size())
    printed = capsys.readouterr().out
    assert printed == "the height and width of what is made: the model's own; --height and --width choose another\n"


def test_probe_leaves_a_wrong_size_or_file_to_the_user(run, folder, tmp_path):
    one_line(run("probe", "--model", folder, "--height", 64, "--width", 90), "divisible by 32")
    one_line(run("probe", "--model", folder, *SIZE, "--json", tmp_path / "no" / "file"), "cannot be written")
    one_line(run("probe", "--model", folder, *SIZE, "--dtype", "auto"), "auto", "float32 or bfloat16")


def test_numbers_are_written_as_a_reader_would():
    cases = {(1, 0): "t", (0.001, 0): "t / 1000", (-0.001, 1): "1 - t / 1000", (-1, 0): "-t", (1000, 0): "1000 t"}
    assert {pair: _affine(*map(float, pair), "t") for pair in cases} == cases
    assert [memory(size) for size in (768, 2**10, 3 * 2**20, 5 * 2**30)] == ["768 B", "1 KiB", "3 MiB", "5 GiB"]


# The list of families.


def test_the_list_of_families_is_that_of_the_tests(run):
    tinies = {**IMAGE, **MORE, **VIDEO}
    listed = {one.name: one.kind for one in TESTED}
    assert listed == {name: "image" if tiny.frames is None else "video" for name, tiny in tinies.items()}
    assert len(TESTED) == len(listed)
    code, printed, _ = run("models")
    assert code == 0 and all(name in printed for name in (*BUILT_IN, *listed))


@pytest.mark.parametrize(
    "name",
    [
        "FluxPipeline",
        "StableDiffusion3Pipeline",
        "QwenImagePipeline",
        "ZImagePipeline",
        "CogView4Pipeline",
        "LongCatImagePipeline",
    ],
)
def test_what_the_list_says_was_learned(name):
    tiny = {**IMAGE, **MORE}[name]
    model = PipelineModel(tiny.build())
    space = model.spaces[model.geometry(tiny.height, tiny.width)]
    (said,) = [one for one in TESTED if one.name == name]
    guidance = learned.guidance(space.replay.learned, model.capabilities.guidance)
    short = guidance["kind"]
    if "formula" in guidance:
        above = guidance["two_rows_above"]
        assert guidance["formula"].startswith("v = u + s (c - u)" if above == 1 else "v = c + s (c - u)")
        norm = space.replay.learned.rule.norm
        short = f"s > {above:g}" + {"none": "", "token": ", norms", "token at most": ", norms at most"}[norm]
    assert (said.guidance, said.texts) == (short, learned.text(space.replay)["lengths"])
    assert max(space.errors[key] for key in space.errors if key != "pixels") < 2e-6 and space.errors["pixels"] < 5e-6


# The plan.


def test_plan_counts_a_pipeline(run, folder, tmp_path):
    found = {}
    for scale in (1, 3):
        file = tmp_path / f"{scale}.json"
        code, printed, complaint = run(
            "plan", "--model", folder, *SIZE, "--device", "cpu", "--guidance", scale, "--json", file
        )
        assert (code, complaint) == (0, "")
        found[scale] = json.loads(file.read_text())
    pipeline = diffusers.LTXPipeline.from_pretrained(folder)
    one = found[3]
    assert one["resident"] == sum(one["parts"].values())
    assert one["parts"].keys() == {"vae", "text_encoder", "transformer"}
    assert one["parts"]["transformer"] == 4 * sum(p.numel() for p in pipeline.transformer.parameters())
    assert (one["size"], one["state"], one["slot"]) == ("64x96, 9 frames", [12, 8], 8 * 96)
    assert one["pool"] == one["slots"] * one["slot"]
    assert (found[1]["network_rows"], found[3]["network_rows"]) == (1, 2)
    assert found[3]["forward"]["flops"] == 2 * found[1]["forward"]["flops"] > 0
    assert one["fits"] and one["largest"] == 64 and one["least_seconds_an_nfe"] > 0
    assert one["least_seconds_an_nfe"] == pytest.approx(one["forward"]["flops"] / one["flops_per_second"])
    assert one["limit"] == "engine"
    for part in ("LTXPipeline on cpu in float32, 64x96, 9 frames", "64 rows", "bound by the engine", "an NFE, at least",
                 "a lower bound from FLOPs", "2 rows of the network"):  # fmt: skip
        assert part in printed and "is taken" not in printed


def test_plan_goes_by_the_free_memory(run, folder, monkeypatch):
    def batch(free):
        monkeypatch.setattr(measuring, "free_memory", lambda device: free)
        monkeypatch.setattr("torch.get_num_threads", lambda: 1)
        return Plan(**CLIP, place=options.Place(str(folder), device="cpu")).figures()

    whole = batch(2**34)
    need = whole["resident"] + whole["pool"] + whole["batches"][8]
    tight = batch(int(need / 0.9) + 16)
    assert whole["lanes"] == 1 and (tight["largest"], tight["limit"]) == (8, "memory")
    code, printed, _ = run("plan", "--model", folder, *SIZE, "--device", "cpu")
    assert code == 0 and "bound by memory" in printed and "bound by the engine" not in printed
    assert not batch(int((whole["resident"] + whole["pool"]) / 0.9) + 16)["fits"]
    monkeypatch.setattr(measuring, "free_memory", lambda device: whole["resident"])
    code, printed, _ = run("plan", "--model", folder, *SIZE, "--device", "cpu")
    assert code == 1 and "does not fit into 90 %" in printed


def test_plan_counts_the_terms_of_a_reward(run, tmp_path):
    files = [tmp_path / "with.json", tmp_path / "without.json"]
    reward = ("--reward", "count + classifier")
    for file, given in zip(files, (reward, ()), strict=True):
        code, printed, _ = run("plan", "--device", "cpu", "--json", file, *given)
        assert code == 0
        assert ("classifier: a call" in printed) == bool(given)
    found, plain = (json.loads(file.read_text()) for file in files)
    assert [*found["rewards"]] == ["count", "classifier"] and plain["rewards"] == {}
    assert all(cost["batch"] == max(map(int, found["batches"])) for cost in found["rewards"].values())
    held = (*_trained().parameters(), *_trained().buffers())
    assert found["rewards"]["classifier"]["resident"] == sum(one.nbytes for one in held)
    assert found["rewards"]["classifier"]["call"] > 64 * 3 * 64 * 64 and found["rewards"]["count"]["seconds"] > 0
    code, _, complaint = run("plan", "--device", "cpu", "--reward", "pickscore")
    assert (
        code == 2
        and "the reward pickscore needs the model" in complaint
        and "laion/" in complaint
        and len(complaint.splitlines()) == 1
    )


def test_plan_of_the_built_in_model(run):
    code, printed, complaint = run("plan", "--device", "cpu")
    assert (code, complaint) == (0, "") and "FluxPipeline on cpu in float32, 64x64" in printed
    assert printed.startswith("64x64 is taken, the model's own size: --height and --width choose another\n")
    one_line(run("plan", "--device", "cpu", "--frames", 5), "frames=5", "makes images")


def test_tensors_are_counted_while_they_live():
    x = torch.ones(1000)
    with measuring.Alive() as alive:
        y = x + 1  # 4000 bytes
        z = y.view(10, 100) * 2  # 4000 more; a view is none
        assert (alive.now, alive.peak) == (8000, 8000)
        del y
        assert (alive.now, alive.peak) == (4000, 8000)
        w = z + 1
        x.add_(1)  # was there before
        assert (alive.now, alive.peak) == (8000, 8000)
        del z, w
    assert alive.now == 0


def test_parts_that_share_weights_count_once():
    class Pipeline:
        def __init__(self):
            first, second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            second.weight = first.weight
            self.components = {"first": first, "second": second, "tokenizer": None}

    assert measuring.parts(Pipeline()) == {"first": 256, "second": 0}


def test_attention_is_counted_on_a_cpu():
    def make(rows):
        q = torch.ones(rows, 2, 16, 8)
        return lambda: nn.functional.scaled_dot_product_attention(q, q, q)

    assert measuring._cost(make, CPU).flops == 2 * (2 * 2 * 16 * 16 * 8)


# Benchmarks.


def test_throughput_of_a_pipeline(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("rollflow.bench.measure.LEAST_SECONDS", 0.01)
    monkeypatch.setattr(throughput, "SIZES", (1, 2))
    file = tmp_path / "throughput.json"
    options = {"method": "bon", "nfe": 10, "steps": 3, "prompts": (2,), "repetitions": 1, "reward": "brightness"}
    Throughput(str(folder), json=file, device="cpu", **CLIP, **options)()
    rows = json.loads(file.read_text())["rows"]
    searches = {row["contender"]: row for row in rows if "prompts" in row}
    assert list(searches) == ["diffusers", "engine", "engine, bon"]
    assert searches["diffusers"]["committed_nfe"] == 18 and searches["engine, bon"]["committed_nfe"] == 20
    assert all(row["efficiency"] > 0 and row["nfe_per_second"] > 0 for row in searches.values())
    assert {row["contender"] for row in rows if "bucket" in row} == {"bare transformer", "bare decode", "bare reward"}
    assert "diffusers" in capsys.readouterr().out


def test_best_of_n_by_a_pipeline_is_the_brightest_of_its_own():
    tiny = IMAGE["StableDiffusion3Pipeline"]
    pipeline, size = tiny.build(), Size(tiny.height, tiny.width)
    found = pipeline_bon(pipeline, ["a cat", "a dog"], rewards.make(brightness), 7, 2, 2, size)
    assert (found.committed_nfe, found.images, found.decodes) == (12, 2, 6)
    generator, most = torch.Generator("cpu").manual_seed(0), []
    for prompt in ("a cat", "a dog"):
        scores = []
        for count in (2, 1):
            made = pipeline([prompt] * count, height=size.height, width=size.width, num_inference_steps=2,
                            generator=generator, output_type="pt").images  # fmt: skip
            scores += ((made * 255).round() / 255).flatten(1).mean(1).tolist()
        most.append(max(scores))
    assert found.rewards == pytest.approx(most, abs=1e-3)
    with pytest.raises(RequestError, match="nfe=1"):
        pipeline_bon(pipeline, ["a cat"], rewards.make(brightness), 1, 2, 1, size)
