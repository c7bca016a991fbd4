"""The measures of an evaluation against cases worked out by hand, and against scikit-learn on the same embeddings."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score
from sklearn.neighbors import NearestCentroid
from torch.nn.functional import normalize

from diffclip_hf.data.ranks import label_ranks
from diffclip_hf.data.retrieval_metrics import recall_at_k
from diffclip_hf.evaluation.metrics import (
    classification_metrics,
    few_shot_accuracies,
    linear_probe,
    mean_by_group,
    mean_per_class,
    nearest_prototype,
    pair_matches,
    sweep_costs,
)


def embeds(rows: int, width: int = 8, seed: int = 0) -> torch.Tensor:
    return normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def clusters(per_class: int, spread: float, seed: int, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Features about one centre a class, the same for every seed, and their labels, in a mixed order."""
    centres = np.random.default_rng(100).normal(size=(classes, 6))
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.repeat(np.arange(classes), per_class))
    features = centres[labels] + spread * generator.normal(size=(len(labels), 6))
    return torch.from_numpy(features).float(), torch.from_numpy(labels)


def test_ranks_by_hand():
    labels = torch.eye(3)
    images = torch.tensor([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.2, 0.7, 0.7], [0.2, 0.7, 0.7]])
    # The first of two that are equal comes first.
    assert label_ranks(images, labels, torch.tensor([0, 2, 1, 2])).tolist() == [0, 2, 0, 1]
    # NaN is wrong for any K.
    assert label_ranks(torch.full((1, 3), math.nan), labels, torch.tensor([0])).item() > 5
    labels[1] = math.nan
    assert label_ranks(images[:1], labels, torch.tensor([0])).tolist() == [1]


@pytest.mark.parametrize("block_size", [7, 4096])
def test_accuracy_against_scikit_learn(block_size):
    images, names = embeds(200), embeds(12, seed=1)
    # A class without images.
    labels = torch.randint(0, 11, (200,), generator=torch.Generator().manual_seed(2))
    ranks = label_ranks(images, names, labels, block_size)
    scores = (images @ names.t()).numpy()
    for k in (1, 3, 5):
        expected = top_k_accuracy_score(labels.numpy(), scores, k=k, labels=range(12))
        assert (ranks < k).double().mean().item() == pytest.approx(expected)
    predictions = scores.argmax(1)
    predictions[predictions == 11] = 0  # it warns of a class that has no images
    found = classification_metrics(torch.from_numpy(predictions) == labels, labels)
    assert found["mean_per_class"] == pytest.approx(balanced_accuracy_score(labels.numpy(), predictions))
    assert found["accuracy"] == pytest.approx((predictions == labels.numpy()).mean())


def test_mean_per_class_by_hand():
    correct = torch.tensor([True, True, False, True, False])
    # 2 of 3 of class 0, 1 of 2 of class 3; classes 1 and 2 have no images.
    assert mean_per_class(correct, torch.tensor([0, 0, 0, 3, 3])) == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_costs_by_hand():
    tried = []

    def score(cost: float) -> float:
        tried.append(round(math.log10(cost), 3))
        return -abs(math.log10(cost) - 0.7)

    scores = sweep_costs(score)
    # Around 0, then 1, then 0.5, then 0.75.
    assert tried == [-6, -4, -2, 0, 2, 4, 6, -1, 1, 0.5, 1.5, 0.25, 0.75, 0.625, 0.875]
    assert list(scores) == sorted(scores)
    assert max(scores, key=scores.__getitem__) == pytest.approx(10**0.75)


def test_the_smallest_of_equal_costs_is_taken_within_the_range():
    scores = sweep_costs(lambda cost: 0.5)
    assert min(scores) == pytest.approx(1e-6)
    assert max(scores, key=scores.__getitem__) == pytest.approx(1e-6)
    assert max(sweep_costs(math.log10)) == pytest.approx(1e6)


@pytest.mark.parametrize("metric", ["accuracy", "mean_per_class"])
def test_probe_against_scikit_learn(metric):
    train, validation, test = clusters(20, 1.5, 0), clusters(8, 1.5, 1), clusters(15, 1.5, 2)
    found = linear_probe(train, validation, test[0], metric)
    both = np.concatenate([train[0], validation[0]]), np.concatenate([train[1], validation[1]])
    expected = LogisticRegression(C=found.cost, max_iter=1000).fit(*both)
    assert found.predictions.tolist() == expected.predict(test[0].numpy()).tolist()
    assert found.converged
    for cost, score in found.validation.items():
        alone = LogisticRegression(C=cost, max_iter=5000).fit(train[0].numpy(), train[1].numpy())
        if cost <= 1:  # weaker regularisation may not converge alike
            assert score == pytest.approx(alone.score(validation[0].numpy(), validation[1].numpy()))
    assert found.validation[found.cost] == max(found.validation.values())


def test_prototypes_by_hand():
    # The support's mean is (1, 1). Less the mean, class 0 has (2, 0) and (0, 2), class 1 (-2, 0) and (0, -2): the
    # prototypes are (0.5, 0.5) and (-0.5, -0.5).
    support = torch.tensor([[[3.0, 1.0], [1.0, 3.0]], [[-1.0, 1.0], [1.0, -1.0]]])
    queries = torch.tensor([[1.5, 1.0], [1.0, 0.9], [-5.0, 6.5], [-5.0, 8.0]])
    assert nearest_prototype(support, queries).tolist() == [0, 1, 1, 0]


def test_all_classes_and_images_against_scikit_learn():
    """With every image drawn there is nothing to draw."""
    train, test = clusters(6, 1.5, 0), clusters(10, 1.5, 1)
    found = few_shot_accuracies(train, test, ways=None, shots=6, queries=None, episodes=2)
    mean = train[0].mean(0)
    centred = [normalize(features - mean, dim=-1).numpy() for features, _ in (train, test)]
    expected = NearestCentroid().fit(centred[0], train[1].numpy()).score(centred[1], test[1].numpy())
    assert 0.5 < expected < 1
    assert found.tolist() == pytest.approx([expected] * 2)


def test_episodes_depend_on_the_seed_alone():
    train, test = clusters(8, 3.0, 0), clusters(10, 3.0, 1)
    options = {"ways": 3, "shots": 2, "queries": 4, "episodes": 50}
    found = few_shot_accuracies(train, test, **options, seed=1)
    assert torch.equal(found, few_shot_accuracies(train, test, **options, seed=1))
    assert not torch.equal(found, few_shot_accuracies(train, test, **options, seed=2))
    # Of 3 · 4 queries each.
    assert ((found * 12 - (found * 12).round()).abs() < 1e-9).all()
    assert 0.4 < found.mean() < 1


def test_features_without_information_are_worth_chance():
    generator = torch.Generator().manual_seed(0)
    parts = [(torch.randn(400, 5, generator=generator), torch.arange(400) % 8) for _ in range(2)]
    found = few_shot_accuracies(*parts, ways=4, episodes=1000)
    assert found.mean().item() == pytest.approx(1 / 4, abs=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 5}, "ways is 5; there are 4 classes"),
        ({"ways": 2, "shots": 9}, "shots is 9; 4 classes have fewer training images, the class 0 8"),
        ({"ways": 0}, "ways is 0"),
        ({"ways": 2, "episodes": 0}, "episodes is 0"),
        ({"ways": 2, "queries": 0}, "queries is 0"),
    ],
)
def test_episodes_that_cannot_be_drawn(options, message):
    with pytest.raises(ValueError, match=message):
        few_shot_accuracies(clusters(8, 1.0, 0), clusters(8, 1.0, 1), **options)


def test_pairs_by_hand():
    """Rows are images, columns texts: both ways right; only the texts; only the images; a tie."""
    scores = torch.tensor(
        [
            [[0.9, 0.1], [0.2, 0.8]],
            [[0.5, 0.6], [0.1, 0.7]],
            [[0.5, 0.1], [0.6, 0.7]],
            [[0.5, 0.5], [0.5, 0.9]],
        ]
    )
    # With unit vectors as texts, of which each pair has its own two, an image's row is its scores.
    texts = torch.eye(8)
    images = torch.zeros(8, 8)
    for pair in range(4):
        images[2 * pair : 2 * pair + 2, 2 * pair : 2 * pair + 2] = scores[pair]
    found = pair_matches(images, texts)
    assert found["text_to_image"].tolist() == [True, True, False, False]
    assert found["image_to_text"].tolist() == [True, False, True, False]
    assert not pair_matches(images * math.nan, texts)["text_to_image"].any()


def test_groups_by_hand():
    found = mean_by_group(torch.tensor([True, False, True, True]), ["b", "a", "b", "a"])
    assert found == {"b": 1.0, "a": 0.5}
    assert list(found) == ["b", "a"]


def test_retrieval_against_scikit_learn_and_a_count():
    images, texts = embeds(30, 16), embeds(90, 16, seed=1)
    own = torch.arange(90) % 30
    texts = normalize(texts + 0.5 * images[own], dim=-1)
    found = recall_at_k(texts, images, own)
    scores = (texts @ images.t()).numpy()
    for k in (1, 5, 10):
        expected = top_k_accuracy_score(own.numpy(), scores, k=k, labels=range(30))
        assert found[f"text_to_image_recall@{k}"] == pytest.approx(expected)
        best = np.argsort(-scores.T, axis=1)[:, :k]
        hits = [image in own.numpy()[best[image]] for image in range(30)]
        assert found[f"image_to_text_recall@{k}"] == pytest.approx(np.mean(hits))
