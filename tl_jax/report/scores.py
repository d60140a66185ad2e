"""Scores that a page needs and a summary lacks: confusion, per-class scores, calibration, intervals."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class ClassScores(NamedTuple):
    """Per class, 0 … 1; nan where undefined (a class neither present nor predicted)."""

    precision: Float[np.ndarray, 'class']
    recall: Float[np.ndarray, 'class']
    f1: Float[np.ndarray, 'class']
    support: Int[np.ndarray, 'class']


class Calibration(NamedTuple):
    """Confidence bins; `confidence` and `accuracy` are means within a bin, nan where it is empty."""

    edges: Float[np.ndarray, 'bin+1']
    count: Int[np.ndarray, 'bin']
    confidence: Float[np.ndarray, 'bin']
    accuracy: Float[np.ndarray, 'bin']
    error: float


def confusion_matrix(
    label: Int[np.ndarray, 'example'], predicted: Int[np.ndarray, 'example'], classes: int
) -> Int[np.ndarray, 'true predicted']:
    """Counts of examples by true class (row) and predicted class (column)."""
    flat = np.bincount(label * classes + predicted, minlength=classes * classes)
    return flat.reshape(classes, classes)


def class_scores(confusion: Int[np.ndarray, 'true predicted']) -> ClassScores:
    """Precision, recall and F1 of each class. F1 is 2 hits / (support + predicted), so 0 where nothing is right."""
    hits, support, predicted = np.diag(confusion).astype(float), confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid='ignore', divide='ignore'):
        return ClassScores(hits / predicted, hits / support, 2 * hits / (support + predicted), support)


def macro_f1(confusion: Int[np.ndarray, 'true predicted']) -> float:
    """Mean F1 over the classes that occur as a label or as a prediction, as scikit-learn's `f1_score` counts them."""
    return float(np.nanmean(class_scores(confusion).f1))


def most_confused(confusion: Int[np.ndarray, 'true predicted'], most: int) -> list[tuple[int, int, int]]:
    """(true, predicted, count) of the commonest mistakes, most frequent first, at most `most`."""
    mistakes = confusion - np.diag(np.diag(confusion))
    order = np.argsort(-mistakes, axis=None, kind='stable')[:most]
    pairs = zip(*np.unravel_index(order, mistakes.shape), strict=True)
    return [(int(t), int(p), int(mistakes[t, p])) for t, p in pairs if mistakes[t, p]]


def calibration(
    confidence: Float[np.ndarray, 'example'], correct: Int[np.ndarray, 'example'], bins: int = 15
) -> Calibration:
    """Reliability over equal-width bins (lower, upper] of confidence (Guo et al. 2017, arXiv:1706.04599, eq. 3).

    error = ECE = Σ_b count_b / N · |accuracy_b − confidence_b|, in 0 … 1.
    """
    edges = np.linspace(0, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side='left') - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid='ignore'):
        mean_confidence = np.bincount(place, confidence, bins) / count
        accuracy = np.bincount(place, correct, bins) / count
    gap = np.nan_to_num(np.abs(accuracy - mean_confidence))
    return Calibration(edges, count, mean_confidence, accuracy, float((gap * count).sum() / count.sum()))


def wilson_interval(rate: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927, JASA 22:209); sound at 0 and 1 and for small counts."""
    centre = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * np.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    return float(max(centre - half, 0)), float(min(centre + half, 1))


# Who is right about an example, in the order of `outcomes`.
OUTCOMES = (
    'both',
    'student alone',
    'teacher alone',
    'neither, same class',
    'neither, other classes',
)


def outcomes(
    label: Int[np.ndarray, 'example'], student: Int[np.ndarray, 'example'], teacher: Int[np.ndarray, 'example']
) -> Int[np.ndarray, 'example']:
    """The place in OUTCOMES of each example, by its label and the two predicted classes."""
    right, taught = student == label, teacher == label
    return np.select([right & taught, right, taught, student == teacher], [0, 1, 2, 3], 4)


def divergence(
    p: Float[np.ndarray, 'example class'], q: Float[np.ndarray, 'example class']
) -> Float[np.ndarray, 'example']:
    """KL(p ‖ q) = Σ_c p_c log(p_c / q_c) of each row, nats; 0 log 0 = 0.

    Probabilities are stored as float32: one that underflowed to 0 counts as the smallest normal number, e^-87.
    """
    least = np.finfo(np.float32).tiny
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    return np.sum(p * (np.log(np.maximum(p, least)) - np.log(np.maximum(q, least))), 1)
