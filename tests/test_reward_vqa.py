"""VQAScore: the probability of "Yes", against the library's own processors, models and `generate`."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny_text import gemma_tokenizer, llama_tokenizer, qwen2_5_vl, t5_tokenizer, tiny

from rollflow import rewards
from rollflow.errors import ModelError, RequestError
from rollflow.rewards import chat, patches, vision_language
from rollflow.rewards.vqa import QUESTION, VqaReward

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["a red apple", 'two dogs on "the" grass, of which one is asleep', "a cat", "x"]
SIZES = [(64, 64), (45, 91), (97, 33)]
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %} {{ part.text }}{% endif %}{% endfor %} {% endfor %}ASSISTANT:"
)


class WithoutVideos(transformers.Qwen2_5_VLProcessor):
    """The true processor, but for its part for videos, which torchvision makes."""

    def check_argument_for_proper_class(self, name, argument):
        return type(None) if argument is None else super().check_argument_for_proper_class(name, argument)


def pictures(height, width, count=4, seed=0):
    """8-bit pictures, and the same as a batch of tensors in [0, 1]."""
    noise = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)
    noise[:, : height // 2] //= 2
    return [Image.fromarray(one) for one in noise], torch.from_numpy(noise).permute(0, 3, 1, 2) / 255


def tower(kind, size=28, **more):
    given = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    return kind(**given, image_size=size, patch_size=14, **more).to_dict()


def text(kind, vocabulary, **more):
    given = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    given |= {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": vocabulary, "initializer_range": 0.3}
    return kind(**given, pad_token_id=0, **more).to_dict()


def looks(kind, size=28, **more):
    return kind(size={"height": size, "width": size}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25], **more)


def qwen(folder):
    """Qwen2.5-VL."""
    tokenizer, model = qwen2_5_vl(template=QUESTION)
    tokenizer.chat_template = QWEN_TEMPLATE
    size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 12}
    processor = WithoutVideos(transformers.Qwen2VLImageProcessorPil(size=size), tokenizer, None)
    for part in (model, tokenizer, processor.image_processor):
        part.save_pretrained(folder)
    return (
        model,
        processor,
        lambda question: tokenizer.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
            tokenize=False,
        ),
    )


def llava(folder):
    """LLaVA, whose processor resizes, crops and normalises."""
    tokenizer = llama_tokenizer(QUESTION)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image = transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = transformers.LlavaProcessor(
        image, tokenizer, patch_size=14, vision_feature_select_strategy="default", chat_template=CHAT_TEMPLATE
    )
    processor.num_additional_image_tokens = 1
    config = transformers.LlavaConfig(
        vision_config=tower(transformers.CLIPVisionConfig),
        text_config=text(transformers.LlamaConfig, len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = tiny(transformers.LlavaForConditionalGeneration, config)
    model.save_pretrained(folder), processor.save_pretrained(folder)
    return model, processor, lambda question: f"USER: <image> {question} ASSISTANT:"


def paligemma(folder):
    """PaliGemma, which has no chat template."""
    tokenizer = gemma_tokenizer(QUESTION)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image = looks(transformers.SiglipImageProcessorPil)
    image.image_seq_length = 4
    processor = transformers.PaliGemmaProcessor(image, tokenizer)
    config = transformers.PaliGemmaConfig(
        vision_config=tower(transformers.SiglipVisionConfig, projection_dim=16),
        text_config=text(transformers.GemmaConfig, len(processor.tokenizer)),
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=16,
        hidden_size=16,
    )
    model = tiny(transformers.PaliGemmaForConditionalGeneration, config)
    model.save_pretrained(folder), processor.save_pretrained(folder)
    return model, processor, lambda question: f"<image>{question}"


def idefics(folder):
    """Idefics3, whose processor cuts an image into several."""
    tokenizer = llama_tokenizer(QUESTION)
    marks = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    marks += [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    image = transformers.Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    processor = transformers.Idefics3Processor(image, tokenizer, image_seq_len=1, chat_template=CHAT_TEMPLATE)
    config = transformers.Idefics3Config(
        vision_config=tower(transformers.Idefics3VisionConfig),
        text_config=text(transformers.LlamaConfig, len(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    model = tiny(transformers.Idefics3ForConditionalGeneration, config)
    model.save_pretrained(folder), processor.save_pretrained(folder)
    return model, processor, lambda question: f"USER: <image> {question} ASSISTANT:"


KINDS = {"qwen": qwen, "llava": llava, "paligemma": paligemma, "idefics": idefics}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By kind: a folder with a tiny model, the model, its processor, and what makes the whole text of a question."""
    made = {}
    for name, build in KINDS.items():
        folder = tmp_path_factory.mktemp(name)
        made[name] = folder, *build(folder)
    return made


@pytest.fixture(params=KINDS)
def built(request, folders):
    """One of them."""
    return folders[request.param]


@torch.no_grad()
def usual(model, processor, whole, picture, question, answer="Yes"):
    """The probability of the answer as the library has it: of one picture, by `generate`."""
    given = processor(text=[whole(question)], images=[[picture]], return_tensors="pt")
    first = model.generate(
        **given, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
    ).logits[0]
    return first.softmax(-1)[0, processor.tokenizer.encode(answer, add_special_tokens=False)[0]].item()


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_it_is_the_probability_of_yes(built, height, width):
    folder, model, processor, whole = built
    reward = rewards.make(f"vqa:model={folder}")
    given, images = pictures(height, width)
    asked = [QUESTION.format(prompt) for prompt in PROMPTS]
    wanted = [usual(model, processor, whole, *row) for row in zip(given, asked, strict=True)]
    scores = reward(images, PROMPTS)
    assert scores.dtype == torch.float32
    assert len({round(score, 6) for score in wanted}) == len(PROMPTS)  # it depends on images and prompts
    torch.testing.assert_close(scores, torch.tensor(wanted), rtol=1e-4, atol=1e-8)
    alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(len(PROMPTS))])
    torch.testing.assert_close(scores, alone, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(("height", "width"), [*SIZES, (28, 28), (20, 300), (300, 20), (150, 130)])
def test_patches_are_what_the_processor_of_qwen_makes(folders, height, width):
    folder, model, processor, whole = folders["qwen"]
    looks = transformers.AutoImageProcessor.from_pretrained(folder)
    inputs = patches.PatchedInputs(folder, looks, model.config)
    given, images = pictures(height, width, 2)
    ours = inputs(images, PROMPTS[:2])
    theirs = processor(
        text=[whole(prompt) for prompt in PROMPTS[:2]],
        images=given,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=0, atol=1e-5)


def test_images_stay_tensors_where_the_processor_can_be_described(folders, monkeypatch):
    """Neither a picture nor a processor is made once the questions are known."""
    _, images = pictures(64, 48)
    calls = {"llava": transformers.LlavaProcessor, "paligemma": transformers.PaliGemmaProcessor}
    for name, processor in {**calls, "idefics": transformers.Idefics3Processor}.items():
        reward = rewards.make(f"vqa:model={folders[name][0]}")
        before = reward(images, PROMPTS)

        def refuse(*_, **__):
            raise AssertionError("the processor was called")

        with monkeypatch.context() as patch:
            patch.setattr(processor, "__call__", refuse)
            if name == "idefics":
                with pytest.raises(AssertionError, match="was called"):
                    reward(images, PROMPTS)
            else:
                torch.testing.assert_close(reward(images, PROMPTS), before)


def test_a_processor_that_treats_tensors_otherwise_is_refused(folders, monkeypatch):
    usual = vision_language._alike
    monkeypatch.setattr(vision_language, "_alike", lambda ours, usually, processor: usual(ours + 1, usually, processor))
    with pytest.raises(ModelError, match="Idefics3Processor makes something else of a tensor"):
        vision_language.VisionLanguage("vqa", folders["idefics"][0], torch.device("cpu"), torch.float32)


def test_special_tokens_of_a_prompt_are_left_out(folders):
    _, images = pictures(64, 48, 1)
    for name, text in {"qwen": "a <|image_pad|><|im_end|>cat", "llava": "a <image></s>cat"}.items():
        reward = rewards.make(f"vqa:model={folders[name][0]}")
        assert reward(images, [text]) == reward(images, ["a   cat"])


def test_question_and_answer_can_be_chosen(folders):
    _, images = pictures(64, 48, 1)
    folder = str(folders["qwen"][0])
    reward = rewards.make(f"vqa:model={folder},answer=No,question='Is {{}} here?'")
    same = VqaReward(model=folder, question="Is a {dog} here?", answer="No")
    assert (reward.question, reward.answer) == ("Is {} here?", "No")
    assert reward(images, ["a {dog}"]) == same(images, ["no matter"])
    assert reward(images, ["a {dog}"]) != rewards.make(f"vqa:model={folder}")(images, ["a {dog}"])
    with pytest.raises(RequestError, match="must not be empty"):
        rewards.make("vqa:answer=' '")


def test_clips_are_judged_by_their_frames(folders):
    _, images = pictures(64, 48, 6)
    reward = rewards.make(f"vqa:model={folders['llava'][0]},frames=min")
    clips = images.unflatten(0, (2, 3))
    each = rewards.make(f"vqa:model={folders['llava'][0]}")(images, ["a"] * 3 + ["b"] * 3)
    torch.testing.assert_close(reward(clips, ["a", "b"]), each.view(2, 3).amin(1))


def test_missing_weights_are_named(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for spec in ("vqa", "vqa:model=zhiqiulin/clip-flant5-xxl"):
        with pytest.raises(RequestError, match=r"put (its|their) files \(.*\) into DIR") as error:
            rewards.make(spec).check("a cat")
        assert "\n" not in str(error.value)


def test_a_folder_without_such_a_model_is_refused(tmp_path):
    tiny(
        transformers.CLIPVisionModel, transformers.CLIPVisionConfig(**tower(transformers.CLIPVisionConfig))
    ).save_pretrained(tmp_path)
    _, images = pictures(64, 48, 1)
    with pytest.raises(ModelError, match="the reward vqa cannot load") as error:
        rewards.make(f"vqa:model={tmp_path}")(images, ["a cat"])
    assert "\n" not in str(error.value)


def test_a_template_of_a_file_of_its_own_is_found(tmp_path):
    assert chat.template(tmp_path) is None
    (tmp_path / "chat_template.jinja").write_text("new")
    assert chat.template(tmp_path) == "new"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "old"}))
    assert chat.template(tmp_path) == "old"


# CLIP-FlanT5
# -----------


@pytest.fixture(scope="module")
def flant5(tmp_path_factory):
    """A folder as the authors publish it, with a tokenizer, and what is in it: tokenizer, processor, tower, T5."""
    folder = tmp_path_factory.mktemp("clip-flant5")
    tokenizer = t5_tokenizer()
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=len(tokenizer) + 28, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    t5 = tiny(transformers.T5ForConditionalGeneration, config)
    eyes = tiny(transformers.CLIPVisionModel, transformers.CLIPVisionConfig(**tower(transformers.CLIPVisionConfig)))
    through = tiny(lambda: torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 16)))
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    eyes.config.save_pretrained(folder / "eyes"), processor.save_pretrained(folder / "eyes")
    tensors = {f"vision_tower.vision_tower.vision_model.{name}": one for name, one in eyes.state_dict().items()}
    tensors |= {f"mm_projector.{name}": one for name, one in through.state_dict().items()}
    tensors |= {**t5.state_dict(), "embed_tokens.weight": t5.shared.weight.detach()}
    names = [*tensors]
    torch.save({name: tensors[name] for name in names[::2]}, folder / "pytorch_model-00001-of-00002.bin")
    torch.save({name: tensors[name] for name in names[1::2]}, folder / "pytorch_model-00002-of-00002.bin")
    torch.save({"not": print}, folder / "training_args.bin")  # lies beside them on the hub, and is no weights
    said = {**config.to_dict(), "architectures": ["CLIPT5ForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps({**said, "mm_vision_tower": str(folder / "eyes")}))
    tokenizer.save_pretrained(folder)
    return folder, tokenizer, processor, eyes, through, t5


@torch.no_grad()
def as_published(tokenizer, processor, eyes, through, t5, picture, question):
    """The authors' procedure, for one picture."""
    side, around = max(picture.size), tuple(int(255 * mean) for mean in processor.image_mean)
    square = Image.new("RGB", (side, side), around)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    pixels = processor(square, return_tensors="pt")["pixel_values"]
    seen = through(eyes(pixels, output_hidden_states=True).hidden_states[-2][:, 1:])
    system = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    system += "detailed, and polite answers to the user's questions."
    before, after = f"{system} USER: <image>\n{question} ASSISTANT: ".split("<image>")
    words = [t5.shared(tokenizer(part, return_tensors="pt").input_ids) for part in (before, after)]
    labels = tokenizer("Yes", return_tensors="pt").input_ids
    logits = t5(inputs_embeds=torch.cat([words[0], seen, words[1]], 1), labels=labels).logits
    return (-torch.nn.functional.cross_entropy(logits[0, :, : len(tokenizer)], labels[0])).exp().item()


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_clip_flant5_is_as_its_authors_have_it(flant5, height, width):
    folder, *parts = flant5
    reward = rewards.make(f"vqa:model={folder}")
    reward.check("a cat")
    given, images = pictures(height, width)
    asked = [QUESTION.format(prompt) for prompt in PROMPTS]
    wanted = torch.tensor([as_published(*parts, *row) for row in zip(given, asked, strict=True)])
    scores = reward(images, PROMPTS)
    assert wanted.unique().numel() == len(PROMPTS)
    torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=0)
    alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(len(PROMPTS))])
    torch.testing.assert_close(scores, alone, rtol=1e-4, atol=0)


def test_clip_flant5_cuts_long_prompts(flant5):
    _, images = pictures(64, 64, 2)
    reward = rewards.make(f"vqa:model={flant5[0]}")
    scores = reward(images, ["a cat " * 1000, "a cat"])
    assert scores.isfinite().all()
    torch.testing.assert_close(scores[1:], reward(images[1:], ["a cat"]), rtol=1e-4, atol=0)


def test_clip_flant5_without_its_tower_is_refused(flant5, tmp_path):
    folder, _, *_, t5 = flant5
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    flant5[1].save_pretrained(tmp_path)
    torch.save(t5.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="holds no CLIP-FlanT5"):
        rewards.make(f"vqa:model={tmp_path}")(pictures(64, 64, 1)[1], ["a cat"])
