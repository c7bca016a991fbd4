import json
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model
from tokenizer_helper import tiny_clip_tokenizer
from transformers import AutoProcessor, CLIPTokenizer, pipeline

from diffclip_hf import DiffCLIPImageProcessorPil, DiffCLIPProcessor
from diffclip_hf.model.processing_diffclip import DiffCLIPTokenizer, check_text


START, END = 512, 513
LONG = "a" * 115  # 117 tokens, with those of start and end
TOKENIZERS = [CLIPTokenizer, DiffCLIPTokenizer]


def tiny_processor(tokenizer_class=CLIPTokenizer, **kwargs) -> DiffCLIPProcessor:
    return DiffCLIPProcessor(
        DiffCLIPImageProcessorPil(size=32, crop_size=32), tiny_clip_tokenizer(tokenizer_class, **kwargs)
    )


@pytest.mark.parametrize("tokenizer_class", TOKENIZERS)
def test_texts_and_images(tokenizer_class):
    processor = tiny_processor(tokenizer_class)
    image = Image.new("RGB", (50, 40), "red")
    inputs = processor(text=["ab", "a"], images=[image] * 3, return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    # Bytes' symbols start with "!" to "~" as 0 to 93, and 256 more is the variant that ends a word.
    a, b, end_of_word = ord("a") - ord("!"), ord("b") - ord("!"), 256
    assert inputs["input_ids"].tolist() == [[START, a, b + end_of_word, END], [START, a + end_of_word, END, END]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert inputs["pixel_values"].shape == (3, 3, 32, 32)
    expected = processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(inputs["pixel_values"][2], expected)
    assert set(processor(text="a")) == {"input_ids", "attention_mask"}
    assert set(processor(images=image)) == {"pixel_values"}
    assert processor(image, "a", return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)
    assert set(processor.model_input_names) == {"input_ids", "attention_mask", "pixel_values"}
    assert processor.decode(inputs["input_ids"][1], skip_special_tokens=True) == "a"
    assert processor.batch_decode(inputs["input_ids"], skip_special_tokens=True) == ["ab", "a"]


@pytest.mark.parametrize("tokenizer_class", TOKENIZERS)
def test_long_texts_are_cut_with_one_warning_and_keep_the_end(tokenizer_class):
    processor = tiny_processor(tokenizer_class)
    with pytest.warns(UserWarning, match=r"117 tokens .*model_max_length=77") as warned:
        input_ids = processor(text=[LONG, "b", LONG], return_tensors="pt")["input_ids"]
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert input_ids.shape == (3, 77)
    assert input_ids[:, 0].tolist() == [START] * 3
    assert input_ids[:, -1].tolist() == [END] * 3
    assert (input_ids[0] == END).sum() == 1
    # 75 symbols, the start and the end are just not too many.
    assert processor(text="a" * 75, return_tensors="pt")["input_ids"].shape == (1, 77)


@pytest.mark.parametrize("tokenizer_class", TOKENIZERS)
@pytest.mark.parametrize(
    ("kwargs", "length"),
    [
        ({"truncation": True}, 77),
        ({"text_kwargs": {"truncation": True}}, 77),
        ({"max_length": 20}, 20),
        ({"text_kwargs": {"max_length": 20, "padding": "max_length"}}, 20),
        ({"truncation": False}, 117),
    ],
)
def test_asking_for_a_length_cuts_without_a_warning(tokenizer_class, kwargs, length):
    input_ids = tiny_processor(tokenizer_class)(text=[LONG, "b"], return_tensors="pt", **kwargs)["input_ids"]
    assert input_ids.shape == (2, length)
    assert input_ids[0, -1] == END


@pytest.mark.parametrize("tokenizer_class", TOKENIZERS)
def test_padding_can_be_chosen(tokenizer_class):
    processor = tiny_processor(tokenizer_class)
    assert processor(text=["ab", "b"], padding="max_length", return_tensors="pt")["input_ids"].shape == (2, 77)
    assert [len(row) for row in processor(text=["ab", "b"], padding=False)["input_ids"]] == [4, 3]


def test_a_tokenizer_without_a_limit_gets_clips():
    endless = tiny_clip_tokenizer(model_max_length=None)
    assert endless.model_max_length > 10**6
    assert DiffCLIPProcessor(DiffCLIPImageProcessorPil(), endless).tokenizer.model_max_length == 77
    assert DiffCLIPTokenizer().model_max_length == 77
    assert tiny_processor(model_max_length=16).tokenizer.model_max_length == 16


OPTIONS = [
    {"padding": padding, "truncation": truncation, "max_length": length, "add_special_tokens": special, **others}
    for padding, truncation, length, special, others in product(
        (False, True, "max_length"),
        (False, True),
        (None, 5, 100),
        (True, False),
        (
            {},
            {"padding_side": "left", "return_attention_mask": False},
            {"stride": 1, "return_overflowing_tokens": True, "return_length": True},
            {"return_offsets_mapping": True, "return_special_tokens_mask": True, "return_token_type_ids": True},
        ),
    )
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("text", ["ab", "", [LONG, "b", ""], "a b " * 40, "\U0001f600 <|endoftext|>"], ids=repr)
def test_the_tokenizer_gives_what_clips_gives(text, side):
    clip, ours = (tiny_clip_tokenizer(one, truncation_side=side) for one in TOKENIZERS)
    for options in OPTIONS:
        expected, actual = clip(text, verbose=False, **options), ours(text, verbose=False, **options)
        assert actual.data == expected.data, options
        for one, other in zip(actual.encodings, expected.encodings, strict=True):
            assert (one.tokens, one.offsets, one.word_ids) == (other.tokens, other.offsets, other.word_ids)
            assert one.special_tokens_mask == other.special_tokens_mask
    padded = {"padding": True, "truncation": True, "return_tensors": "pt", "pad_to_multiple_of": 7}
    assert torch.equal(ours(text, **padded)["input_ids"], clip(text, **padded)["input_ids"])
    with pytest.raises(ValueError, match="max_length is 1; it must be at least 2"):
        ours(text, truncation=True, max_length=1)


@pytest.mark.parametrize("tokenizer_class", TOKENIZERS)
def test_threads_share_a_processor(tokenizer_class):
    processor = tiny_processor(tokenizer_class)
    texts = [["b", LONG], ["a"], ["ab " * 60]]
    calls = [
        (text, options)
        for text in texts
        for options in ({}, {"truncation": False}, {"padding": "max_length"}, {"padding": False, "max_length": 9})
    ]
    # What CLIP's tokenizer says when it is asked one at a time; cut at 77 and padded unless told otherwise.
    clip = tiny_clip_tokenizer()
    expected = [clip(text, **{"padding": True, "truncation": True, **options})["input_ids"] for text, options in calls]
    backend = processor.tokenizer.backend_tokenizer
    seen = []

    def call(index):
        text, options = calls[index % len(calls)]
        inputs = processor(text=text, **options)
        seen.append((backend.truncation, backend.padding))
        return inputs["input_ids"] == expected[index % len(calls)]

    with warnings.catch_warnings(), ThreadPoolExecutor(16) as pool:
        warnings.simplefilter("ignore")
        assert all(pool.map(call, range(600)))
    assert set(seen) == {(None, None)}


@pytest.mark.parametrize("tokenizer_class", TOKENIZERS)
def test_threads_share_a_processor_whatever_they_ask_of_it(tokenizer_class):
    """Pairs too, and what Transformers' tokenizers return beside the ids."""
    processor, clip = tiny_processor(tokenizer_class), tiny_clip_tokenizer()
    cut = {"padding": False, "truncation": True}
    calls = [
        (LONG, {**cut, "max_length": 9, "stride": 2, "return_overflowing_tokens": True}),
        ("ab", {**cut, "return_offsets_mapping": True}),
        (["a", "ab"], {"padding": True, "truncation": False, "return_special_tokens_mask": True}),
        (LONG, {**cut, "max_length": 20, "text_pair": "b", "padding": "max_length"}),
        (["b <|endoftext|>"], {**cut, "split_special_tokens": True}),
    ]
    expected = [clip(text, **options).data for text, options in calls]
    # Of a processor Transformers takes this one in text_kwargs alone.
    calls[-1] = (calls[-1][0], {**cut, "text_kwargs": {"split_special_tokens": True}})
    backend = processor.tokenizer.backend_tokenizer
    seen = set()

    def call(index):
        text, options = calls[index % len(calls)]
        inputs = processor(text=text, **options)
        seen.add((backend.truncation, backend.padding, backend.encode_special_tokens))
        return inputs.data == expected[index % len(calls)]

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(call, range(300)))
    assert seen == {(None, None, False)}
    ours = tiny_clip_tokenizer(DiffCLIPTokenizer)
    for text, options in ((LONG, {"text_pair": "b", "truncation": True}), ("a", {"padding": "max_length"})):
        assert ours.encode(text, **options, max_length=7) == clip.encode(text, **options, max_length=7)
    assert ours.encode(LONG) == clip.encode(LONG, verbose=False)
    assert ours.backend_tokenizer.truncation is ours.backend_tokenizer.padding is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "a", "truncaton": True}, "takes no truncaton; did you mean truncation?"),
        ({"text": "a", "text_kwargs": {"paddin": True}}, "takes no paddin; did you mean padding?"),
        ({"images": Image.new("RGB", (9, 9)), "do_rezise": False}, "takes no do_rezise; did you mean do_resize?"),
        ({"images": Image.new("RGB", (9, 9)), "images_kwargs": {"sise": 3}}, "takes no sise; did you mean size?"),
        ({"text": "a", "audio": [1]}, "takes no audio"),
    ],
)
def test_options_without_effect_are_refused(options, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        tiny_processor()(**options)


def test_settings_in_a_tokenizers_file_are_not_the_calls(tmp_path):
    clip = tiny_clip_tokenizer()
    clip.backend_tokenizer.enable_truncation(3)
    clip.backend_tokenizer.enable_padding(length=50)
    clip.save_pretrained(tmp_path)
    tokenizer = DiffCLIPTokenizer.from_pretrained(tmp_path)
    assert tokenizer.backend_tokenizer.truncation is None
    assert [len(ids) for ids in tokenizer(["a b", "a"])["input_ids"]] == [4, 3]


HALF_AN_EMOJI = "a pizza \ud83c"


@pytest.mark.parametrize("tokenizer_class", TOKENIZERS)
def test_texts_with_half_a_character_are_named(tokenizer_class):
    processor = tiny_processor(tokenizer_class)
    for text in (HALF_AN_EMOJI, ["a", HALF_AN_EMOJI]):
        with pytest.raises(ValueError, match=r"The text 'a pizza \\ud83c' has half a character at place 8"):
            processor(text=text)
    tokenizer = tiny_clip_tokenizer(DiffCLIPTokenizer)
    for call in (
        lambda: tokenizer([["a", HALF_AN_EMOJI]], is_split_into_words=True),
        lambda: tokenizer("a", HALF_AN_EMOJI),
        lambda: tokenizer.encode(HALF_AN_EMOJI),
        lambda: tokenizer.encode("a", HALF_AN_EMOJI),
        lambda: tokenizer(text_target=HALF_AN_EMOJI),
        lambda: tokenizer.tokenize(HALF_AN_EMOJI),
    ):
        with pytest.raises(ValueError, match="half a character"):
            call()
    check_text("a pizza \U0001f355")
    check_text(HALF_AN_EMOJI.encode(errors="replace").decode())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"images": "a photo of a dog"}, r"no file 'a photo of a dog'.* A text is passed as text="),
        ({"images": "a dog", "text": Image.new("RGB", (9, 9))}, "text is of type Image; pass images as images="),
        ({"text": torch.zeros(3, 9, 9)}, "text is of type Tensor; pass images as images="),
        ({"text": ["a", None]}, "A text is of type NoneType; it must be a string"),
        ({"text": [5]}, "A text is of type int"),
        ({"text": []}, "text is empty; there must be at least one text"),
        ({"images": torch.full((3, 9, 9), -1.5)}, "already normalised go to the model as pixel_values="),
        ({"images": [np.zeros((9, 9, 3), np.uint8), "nowhere.png"]}, "no file 'nowhere.png'"),
    ],
)
def test_what_is_mixed_up_gets_one_line(inputs, message):
    with pytest.raises(ValueError, match=message) as raised:
        tiny_processor()(**inputs)
    assert "\n" not in str(raised.value)


def test_both_parts_are_needed():
    with pytest.raises(ValueError, match="tokenizer is None"):
        DiffCLIPProcessor(DiffCLIPImageProcessorPil())
    with pytest.raises(ValueError, match="image_processor is None"):
        DiffCLIPProcessor(tokenizer=tiny_clip_tokenizer())
    with pytest.raises(ValueError, match="at least one"):
        tiny_processor()()


def test_the_tokenizer_cuts_by_itself():
    tokenizer = tiny_clip_tokenizer(DiffCLIPTokenizer)
    with pytest.warns(UserWarning, match="117 tokens") as warned:
        encoded = tokenizer([LONG, "b"], padding=True, return_tensors="pt")
    assert len(warned) == 1
    assert encoded["input_ids"].shape == (2, 77)
    assert encoded["input_ids"][0, -1] == END
    assert len(tokenizer(LONG, truncation=True)["input_ids"]) == 77
    assert len(tokenizer(LONG, max_length=9)["input_ids"]) == 9
    assert len(tokenizer(LONG, truncation=False, return_tensors="pt")["input_ids"][0]) == 117
    assert len(tokenizer(LONG)["input_ids"]) == 117  # a list is for no model
    clip = tiny_clip_tokenizer()
    for text in ("ab c", ["ab", "c"], [["ab", "c"]]):
        split = isinstance(text[0], list)
        assert tokenizer(text, is_split_into_words=split).data == clip(text, is_split_into_words=split).data


@pytest.mark.parametrize("tokenizer_class", TOKENIZERS)
def test_saves_and_loads(tokenizer_class, tmp_path):
    processor = tiny_processor(tokenizer_class)
    tiny_model().config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["processor_class"] == "DiffCLIPProcessor"
    assert saved["image_processor"]["image_processor_type"] == "DiffCLIPImageProcessor"
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 77

    loaded = AutoProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(loaded) is DiffCLIPProcessor
    assert type(loaded.image_processor) is DiffCLIPImageProcessorPil
    image = Image.new("RGB", (50, 40), "red")
    expected = processor(text=["ab", "a"], images=image, return_tensors="pt")
    actual = loaded(text=["ab", "a"], images=image, return_tensors="pt")
    for name in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(actual[name], expected[name])
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "processor_config.json").read_text()) == saved
    # DiffCLIP's folder opens as CLIP's tokenizer too.
    assert CLIPTokenizer.from_pretrained(tmp_path)(["ab"])["input_ids"] == expected["input_ids"][:1].tolist()


def test_zero_shot_pipeline_takes_a_long_label():
    model = tiny_model(text={"vocab_size": 514, "bos_token_id": START, "eos_token_id": END})
    processor = tiny_processor(DiffCLIPTokenizer)
    pipe = pipeline(
        "zero-shot-image-classification",
        model=model,
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
    )
    image = Image.new("RGB", (50, 40), "red")
    with pytest.warns(UserWarning, match="117 tokens"):
        answers = pipe(image, candidate_labels=["b", LONG], hypothesis_template="{}")
    with torch.no_grad():
        inputs = processor(text=["b", LONG], images=image, truncation=True, return_tensors="pt")
        expected = model(**inputs).logits_per_image.softmax(dim=-1)[0]
    scores = {answer["label"]: answer["score"] for answer in answers}
    assert [scores["b"], scores[LONG]] == pytest.approx(expected.tolist(), abs=1e-6)
