"""The pictures and captions that the embedded model trains on, and how it is measured."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch


pytest.importorskip("emoji", reason="the emoji's names come from it, which the extra `dev` has")

EMBEDDED = Path(__file__).parent.parent / "embedded"
MODEL = EMBEDDED / "diffclip-emoji"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """The scripts import each other as from their own folder."""
    monkeypatch.syspath_prepend(str(EMBEDDED))


@pytest.fixture
def items():
    from emoji_data import Emoji

    rows = [("dog face", "Animals & Nature"), ("red apple", "Food & Drink"), ("Japan", "Flags"), ("plus", "Symbols")]
    return [Emoji(str(i), str(i), name, (), category) for i, (name, category) in enumerate(rows)]


def test_nouns_have_the_right_article_and_plural():
    from captions import article, plural

    nouns = ["dog", "apple", "unicorn", "hourglass", "grapes", "octopus", "bread", "wine glass", "one piece swimsuit"]
    expected = ["a dog", "an apple", "a unicorn", "an hourglass", "grapes", "an octopus", "bread", "a wine glass"]
    assert [article(noun) for noun in nouns] == [*expected, "a one piece swimsuit"]
    singular = ["rocket", "cherry", "monkey", "old man", "cut of glass", "box", "kitchen knife", "grapes", "fish"]
    several = [
        "rockets",
        "cherries",
        "monkeys",
        "old men",
        "cut of glasses",
        "boxes",
        "kitchen knives",
        "grapes",
        "fish",
    ]
    assert [plural(noun) for noun in singular] == several


def test_captions_say_what_is_there_and_where(items):
    """The drawing on the left is never said to be on the right, nor one above to be below."""
    from captions import CaptionWriter

    writer = CaptionWriter(items, [()] * len(items), np.random.default_rng(0))
    assert {writer.phrase(2) for _ in range(50)} == {
        "the flag of Japan", "flag of Japan", "the national flag of Japan"
    }  # fmt: skip
    assert {writer.several(1, 3).split(" ", 1)[1] for _ in range(20)} == {"red apples"}
    dogs, apples = ("dog", "puppy"), ("apple", "fruit")
    seen = {"left": 0, "right": 0, "above": 0, "below": 0}
    patterns = {
        "left": "left of",
        "right": "right of",
        "above": "above|over|on top of",
        "below": "below|under(neath)?",
    }
    for places, told in (([(-0.5, 0), (0.5, 0.1)], ("left", "right")), ([(0, -0.5), (0.1, 0.5)], ("above", "below"))):
        for _ in range(300):
            caption = writer.scene([0, 1], places, ["", ""], "")
            for word in told:
                if found := re.search(f" (on the |to the )?({patterns[word]}) ", caption):
                    before = caption[: found.start()]
                    first, second = (dogs, apples) if word == told[0] else (apples, dogs)
                    assert any(name in before for name in first), caption
                    assert not any(name in before for name in second), caption
                    seen[word] += 1
    assert min(seen.values()) > 5


@pytest.fixture
def collator(items, monkeypatch, tmp_path):
    """A collator of four drawings: a quarter of each is opaque, its middle, in a colour of its own."""
    import drawing_collator
    import scenes
    from transformers import AutoTokenizer

    drawings = np.zeros((4, 64, 64, 4), np.uint8)
    for drawing, colour in zip(drawings, ((255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)), strict=True):
        drawing[16:48, 16:48] = (*colour, 255)
    monkeypatch.setattr(drawing_collator, "load_drawings", lambda *args: (drawings, np.ones(4, bool)))
    monkeypatch.setattr(scenes, "load_keywords", lambda items, cache_dir: [()] * len(items))
    return scenes.SceneCollator(items, ("one",), tmp_path, AutoTokenizer.from_pretrained(MODEL), 0)


def test_drawings_are_where_and_as_large_as_planned(collator):
    from scenes import Picture

    picture = Picture([0, 1], [0, 0], [(-0.5, -0.25), (0.5, 0.25)], [0.6, 0.4])
    image = collator.draw([picture])[0]
    assert image.shape == (3, 48, 48)
    red, green = (1 - image[1]).clamp(0, 1), (1 - image[0]).clamp(0, 1)
    steps = (torch.arange(48) + 0.5) / 24 - 1
    for mask, (x, y), size in ((red, (-0.5, -0.25), 0.6), (green, (0.5, 0.25), 0.4)):
        weights = mask / mask.sum()
        assert (weights.sum(0) @ steps).item() == pytest.approx(x, abs=0.03)
        assert (weights.sum(1) @ steps).item() == pytest.approx(y, abs=0.03)
        # Half of the drawing's side is opaque.
        assert mask.sum().item() == pytest.approx((0.5 * size * 48) ** 2, rel=0.1)
    assert image[:, :4, 40:].min() == 1


def test_plans_are_of_every_kind_and_keep_to_the_others(collator):
    from scenes import GROUNDS, KINDS

    plans = [collator.plan(1, np.array([0, 3])) for _ in range(300)]
    assert {len(plan.indices) for plan in plans} == {1, 2, 3}
    assert {plan.ground for plan in plans} == set(GROUNDS)
    assert sum(KINDS.values()) == pytest.approx(1)
    assert sum(GROUNDS.values()) == pytest.approx(1)
    assert all(plan.indices[0] == 1 and {*plan.indices[1:]} <= {0, 1, 3} for plan in plans)
    assert all(len(plan.places) == len(plan.sizes) == len(plan.vendors) == len(plan.indices) for plan in plans)
    # Two in one place would hide each other.
    for plan in plans:
        for one, other in itertools.combinations(plan.places, 2):
            assert np.hypot(one[0] - other[0], one[1] - other[1]) > 0.3
    assert all(plan.caption for plan in plans)


def test_a_batch_fits_the_model(collator):
    batch = collator([0, 1])
    assert batch["pixel_values"].shape == (2, 3, 48, 48)
    assert batch["pixel_values"].isfinite().all()
    assert len(batch["input_ids"]) == 2
    assert batch["return_loss"] is True


def test_drawings_have_a_colour_where_most_of_them_has(collator):
    from scenes import main_colours

    drawing = np.full((1, 64, 64, 4), 255, np.uint8)
    drawing[:, :, :, :3] = (220, 40, 46)
    half = drawing.copy()
    half[:, :32, :, :3] = (77, 166, 64)
    assert main_colours(np.concatenate([drawing, half, np.zeros_like(drawing)])) == ["red", "", ""]


def test_the_phrases_are_forty_and_ask_for_the_pictures():
    from demo import PICTURES

    rows = json.loads((EMBEDDED / "phrases.json").read_text(encoding="utf-8"))["phrases"]
    assert len({phrase for _, phrase in rows}) == len(rows) == 40
    assert set(PICTURES.values()) <= {name for name, _ in rows}
    assert not {name for name, _ in rows} & {phrase for _, phrase in rows}


def test_a_phrase_is_right_above_those_of_other_pictures():
    """The first two phrases are of one picture, so neither can be wrong because of the other."""
    from evaluate import phrases_right

    scores = torch.tensor([[1.0, 9.0, 0.5], [1.0, 9.0, 0.5], [0.0, 3.0, 2.0]])
    own = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    assert phrases_right(scores, own) == pytest.approx(2 / 3)


def test_both_names_must_be_above_the_others():
    from evaluate import OTHERS, both_above

    scores = torch.zeros(3, OTHERS + 2)
    scores[0, [0, 1]] = 1.0
    scores[1, 0] = 1.0
    scores[2, [2, 3]] = torch.tensor([2.0, 1.0])
    pairs = torch.tensor([[0, 1], [0, 1], [3, 2]])
    assert both_above(scores, pairs, seed=0) == pytest.approx(2 / 3)


def test_training_may_begin_with_another_models_weights():
    """A token that the other doesn't have begins as the mean of those that spell it there."""
    from emoji_tokenizer import train_tokenizer
    from safetensors.torch import load_file
    from small_model import build_model
    from train import take_weights
    from transformers import AutoTokenizer

    texts = ["dog face", "zqzq"] * 20
    tokenizer = train_tokenizer(texts, 20, 32)
    model = build_model(len(tokenizer), "diffclip-dagger")
    take_weights(model, tokenizer, MODEL)
    stored = load_file(MODEL / "model.safetensors")
    key = "vision_model.encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(model.state_dict()[key], stored[key].float())
    theirs = AutoTokenizer.from_pretrained(MODEL)
    table = stored["text_model.embeddings.token_embedding.weight"].float()
    rows = model.text_model.embeddings.token_embedding.weight
    ids, known = tokenizer.get_vocab(), theirs.get_vocab()
    assert torch.equal(rows[ids["face</w>"]], table[known["face</w>"]])
    spelled = theirs("zqzq", add_special_tokens=False)["input_ids"]
    assert len(spelled) > 1
    torch.testing.assert_close(rows[ids["zqzq</w>"]], table[spelled].mean(0))
