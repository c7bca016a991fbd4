"""The measures of zero-shot classification, few-shot classification, linear probes and MMVP, from embeddings."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import normalize


# Radford et al. 2021, appendix A.3: every second decade, then half the step around the best, down to 8 steps a decade.
COARSE_EXPONENTS = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)
FINE_STEPS = (1.0, 0.5, 0.25, 0.125)
PROBE_ITERATIONS = 1000
QUERIES_AT_ONCE = 4096


def mean_per_class(correct: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the mean of every class's share of correct images, in 0..1; classes without images don't count.

    Args:
        correct: Which images are, (images,), bool.
        labels: Their classes, (images,), int64.
    """
    counts = torch.bincount(labels)
    hits = torch.bincount(labels, weights=correct.double())
    return (hits[counts > 0] / counts[counts > 0]).mean().item()


def classification_metrics(correct: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Return the accuracy and the mean of every class's, `{"accuracy": …, "mean_per_class": …}`, in 0..1.

    The arguments are those of `mean_per_class`.
    """
    return {"accuracy": correct.double().mean().item(), "mean_per_class": mean_per_class(correct, labels)}


# Linear probe -------------------------------------------------------------------------------------------------------


@dataclass
class Probe:
    """A linear probe's result.

    Args:
        predictions: The test images' labels, (images,), int64.
        cost: The regularisation chosen, scikit-learn's C: the inverse of the L2 penalty's weight.
        validation: Each cost that was tried, with its metric on the validation images.
        converged: Whether the last fit ended before `PROBE_ITERATIONS` iterations.
    """

    predictions: torch.Tensor
    cost: float
    validation: dict[float, float]
    converged: bool


def sweep_costs(score: Callable[[float], float]) -> dict[float, float]:
    """Try the costs from 1e-6 to 1e6, ever closer to the best, and return each one's score.

    Every second decade comes first; then a decade, a half, a quarter and an eighth of one on either side of the best
    so far. Of equal scores the smaller cost is the better.

    Args:
        score: Returns a cost's score.

    Source: Radford et al. 2021 (CLIP), appendix A.3, which El Banani et al. 2023 follow.
    """
    scores = {exponent: score(10.0**exponent) for exponent in COARSE_EXPONENTS}
    for step in FINE_STEPS:
        best = max(sorted(scores), key=scores.__getitem__)
        for exponent in (best - step, best + step):
            if COARSE_EXPONENTS[0] <= exponent <= COARSE_EXPONENTS[-1] and exponent not in scores:
                scores[exponent] = score(10.0**exponent)
    return {10.0**exponent: scores[exponent] for exponent in sorted(scores)}


def linear_probe(
    train: tuple[torch.Tensor, torch.Tensor],
    validation: tuple[torch.Tensor, torch.Tensor],
    test_features: torch.Tensor,
    metric: str = "accuracy",
) -> Probe:
    """Fit scikit-learn's logistic regression (L-BFGS, L2) and label the test images.

    The regularisation is chosen by `sweep_costs` on the validation images; the last fit is on both parts.

    Args:
        train: Features, float32, (images, width), and labels, int64, (images,).
        validation: Likewise.
        test_features: Likewise, (test images, width).
        metric: What of `classification_metrics` is best on the validation images.

    Source: El Banani et al. 2023 (Learning Visual Representations via Language-Guided Sampling), linear probe.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    def fit(features: torch.Tensor, labels: torch.Tensor, cost: float) -> LogisticRegression:
        classifier = LogisticRegression(C=cost, solver="lbfgs", max_iter=PROBE_ITERATIONS)
        with warnings.catch_warnings():
            # `Probe.converged` says so of the last fit; in the sweep, weak regularisation often doesn't.
            warnings.simplefilter("ignore", ConvergenceWarning)
            return classifier.fit(features.numpy(), labels.numpy())

    def score(cost: float) -> float:
        predictions = torch.from_numpy(fit(*train, cost).predict(validation[0].numpy()))
        return classification_metrics(predictions == validation[1], validation[1])[metric]

    scores = sweep_costs(score)
    cost = max(scores, key=scores.__getitem__)
    both = [torch.cat(parts) for parts in zip(train, validation, strict=True)]
    classifier = fit(both[0], both[1], cost)
    predictions = torch.from_numpy(classifier.predict(test_features.numpy()))
    return Probe(predictions, cost, scores, bool(max(classifier.n_iter_) < PROBE_ITERATIONS))


# Few-shot classification --------------------------------------------------------------------------------------------


def nearest_prototype(support: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Return the index of the class whose prototype is nearest to each query, (queries,), int64.

    The mean of all support images is subtracted from both, all are L2-normalised, and a class's prototype is the mean
    of its support images, which isn't normalised again. Distances are Euclidean.

    Args:
        support: (classes, shots, width), float32.
        queries: (queries, width), float32.

    Source: Wang et al. 2019 (SimpleShot), as El Banani et al. 2023 use it.
    """
    mean = support.flatten(0, 1).mean(0)
    prototypes = normalize(support - mean, dim=-1).mean(1)
    # In blocks, for an episode may be the whole task.
    found = [
        torch.cdist(normalize(some - mean, dim=-1), prototypes).argmin(1) for some in queries.split(QUERIES_AT_ONCE)
    ]
    return torch.cat(found)


def few_shot_rows(
    train_labels: torch.Tensor,
    test_labels: torch.Tensor,
    ways: int | None,
    shots: int,
    queries: int | None,
    episodes: int,
    seed: int = 0,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the rows of each class that both parts have, in the training part and in the test part.

    The arguments are those of `few_shot_accuracies`.

    Raises:
        ValueError: A number is too small, or there are fewer classes or images than asked for.
    """
    for name, value, least in (
        ("ways", ways, 2),
        ("shots", shots, 1),
        ("queries", queries, 1),
        ("episodes", episodes, 1),
        ("seed", seed, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}.")
    classes = sorted(set(train_labels.tolist()) & set(test_labels.tolist()))
    rows = [tuple(np.flatnonzero(labels.numpy() == c) for labels in (train_labels, test_labels)) for c in classes]
    if (2 if ways is None else ways) > len(classes):
        raise ValueError(
            f"ways is {'all' if ways is None else ways}; there are {len(classes)} classes with images in both parts."
        )
    if few := [index for index, (in_train, _) in enumerate(rows) if len(in_train) < shots]:
        raise ValueError(
            f"shots is {shots}; {len(few)} classes have fewer training images, the class {classes[few[0]]} "
            f"{len(rows[few[0]][0])}."
        )
    return rows  # type: ignore[return-value]


def few_shot_accuracies(
    train: tuple[torch.Tensor, torch.Tensor],
    test: tuple[torch.Tensor, torch.Tensor],
    *,
    ways: int | None = 5,
    shots: int = 5,
    queries: int | None = 6,
    episodes: int = 5000,
    seed: int = 0,
) -> torch.Tensor:
    """Return each episode's accuracy, (episodes,), float64, in 0..1.

    An episode draws classes, of each some support images of the training part and some query images of the test part,
    all without replacement, and labels the queries by `nearest_prototype`.

    Args:
        train: Features, float32, (images, width), and labels, int64, (images,).
        test: Likewise.
        ways: Classes in an episode; None for all, so that each episode is the whole task from another seed.
        shots: Support images a class.
        queries: Query images a class; None for all. Of a class that has fewer, all are taken.
        episodes: How many there are.
        seed: Of what is drawn.

    Raises:
        ValueError: As `few_shot_rows` raises.
    """
    rows = few_shot_rows(train[1], test[1], ways, shots, queries, episodes, seed)
    ways = len(rows) if ways is None else ways
    generator = np.random.default_rng(seed)
    accuracies = torch.empty(episodes, dtype=torch.float64)
    for episode in range(episodes):
        drawn = generator.choice(len(rows), ways, replace=False)
        support, asked = [], []
        for index in drawn:
            in_train, in_test = rows[index]
            support.append(generator.choice(in_train, shots, replace=False))
            count = len(in_test) if queries is None else min(queries, len(in_test))
            asked.append(generator.choice(in_test, count, replace=False))
        own = torch.arange(ways).repeat_interleave(torch.tensor([len(part) for part in asked]))
        found = nearest_prototype(train[0][np.stack(support)], test[0][np.concatenate(asked)])
        accuracies[episode] = (found == own).double().mean()
    return accuracies


# MMVP ---------------------------------------------------------------------------------------------------------------


def pair_matches(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return which pairs are told apart, (pairs,), bool, in two ways.

    `text_to_image`: each of the two texts is more similar to its own image than to the other, as the authors' script
    has it. `image_to_text`: each image is more similar to its own text. Ties and NaN count as wrong.

    Args:
        image_embeds: L2-normalised, (2 · pairs, width); two rows are a pair.
        text_embeds: Likewise; row i belongs to image i.

    Source: Tong et al. 2024 (Eyes Wide Shut), MMVP-VLM; `scripts/evaluate_vlm.py` of tsb0601/MMVP.
    """
    images, texts = (embeds.unflatten(0, (-1, 2)) for embeds in (image_embeds, text_embeds))
    scores = images @ texts.transpose(1, 2)
    own = scores.diagonal(dim1=1, dim2=2)
    return {
        "text_to_image": (own > scores.flip(1).diagonal(dim1=1, dim2=2)).all(1),
        "image_to_text": (own > scores.flip(2).diagonal(dim1=1, dim2=2)).all(1),
    }


def mean_by_group(correct: torch.Tensor, groups: Sequence[str]) -> dict[str, float]:
    """Return each group's share of what is correct, in 0..1, in the order in which the groups first appear."""
    return {
        group: correct[[index for index, other in enumerate(groups) if other == group]].double().mean().item()
        for group in dict.fromkeys(groups)
    }


__all__ = [
    "Probe",
    "classification_metrics",
    "few_shot_accuracies",
    "few_shot_rows",
    "linear_probe",
    "mean_by_group",
    "mean_per_class",
    "nearest_prototype",
    "pair_matches",
    "sweep_costs",
]
