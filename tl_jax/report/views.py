"""HTML views of one split's predictions: confusion, classes, calibration, embedding, mistakes."""

from collections.abc import Sequence

import numpy as np

from tl_jax.report import embedding, plots, scores
from tl_jax.report.markup import bar, caption, columns, escape, legend, picture, shorten, table
from tl_jax.report.runs import Predictions

MAX_CLASSES = 100
SCATTERED = 1500


def confusion_of(predictions: Predictions) -> np.ndarray:
    """Counts [true, predicted]."""
    return scores.confusion_matrix(predictions.label, predictions.predicted, len(predictions.class_names))


def confusion_view(predictions: Predictions, width: int = 560, tips: bool = True) -> str:
    """The confusion matrix; beyond 100 classes, only the 40 classes with the most mistakes."""
    matrix, names = confusion_of(predictions), predictions.class_names
    said = ''
    if len(matrix) > MAX_CLASSES:
        wrong = matrix.sum(1) + matrix.sum(0) - 2 * np.diag(matrix)
        kept = np.sort(np.argsort(-wrong, kind='stable')[:40])
        said = caption(f'The 40 of {len(matrix)} classes with the most mistakes, among each other.')
        matrix, names = matrix[np.ix_(kept, kept)], [names[i] for i in kept]
    return f'<div class="wide">{plots.confusion(matrix, names, width, tips)}</div>{said}'


def confused_view(predictions: Predictions, most: int = 8) -> str:
    """The commonest mistakes as a table."""
    matrix, names = confusion_of(predictions), predictions.class_names
    rows = [
        [escape(names[t]), escape(names[p]), str(count), f'{100 * count / matrix[t].sum():.1f}']
        for t, p, count in scores.most_confused(matrix, most)
    ]
    return table(['true', 'predicted', 'examples', '% of the class'], rows, texts=2) if rows else ''


def classes_view(predictions: Predictions) -> str:
    """Precision, recall, F1 and support of every class."""
    found = scores.class_scores(confusion_of(predictions))
    percent = lambda value: '–' if np.isnan(value) else f'{100 * value:.1f}'
    rows = [
        [escape(shorten(name, 60)), percent(p), percent(r), percent(f), bar(f), str(support)]
        for name, p, r, f, support in zip(predictions.class_names, *found, strict=True)
    ]
    return table(['class', 'precision %', 'recall %', 'F1 %', '', 'examples'], rows)


def calibration_of(predictions: Predictions) -> scores.Calibration:
    """Reliability of the predicted class's probability, 15 bins."""
    return scores.calibration(predictions.confidence, predictions.predicted == predictions.label)


def mistakes_view(predictions: Predictions, most: int) -> str:
    """The stored worst mistakes as pictures, with their true and predicted class and the confidence."""
    if predictions.worst_images is None or not len(predictions.worst_images):
        return ''
    place = {int(index): row for row, index in enumerate(predictions.index)}
    figures = [
        _mistake(predictions, place.get(int(index)), int(index), pixels)
        for index, pixels in zip(predictions.worst_index[:most], predictions.worst_images[:most], strict=True)
    ]
    kind = 'gallery photos' if max(predictions.worst_images.shape[1:3]) > 64 else 'gallery'
    return f'<div class="{kind}">{"".join(figures)}</div>'


def _mistake(predictions: Predictions, row: int | None, index: int, pixels: np.ndarray) -> str:
    if row is None:
        return f'<figure>{picture(pixels, f"example {index}")}<figcaption>example {index}</figcaption></figure>'
    names = predictions.class_names
    true, predicted = names[predictions.label[row]], names[predictions.probabilities[row].argmax()]
    confidence = predictions.probabilities[row].max()
    return (
        f'<figure>{picture(pixels, f"example {index}: {true}, taken for {predicted}")}<figcaption>'
        f'<span class="miss">{escape(shorten(predicted, 40))}</span> {100 * confidence:.1f} %<br>'
        f'is {escape(shorten(true, 40))} <span class="quiet">#{index}</span></figcaption></figure>'
    )


def embedding_view(predictions: Predictions, neighbours: int, linear: bool, size: float = 4.6) -> str:
    """Features in two dimensions: t-SNE of at most `neighbours` examples; before it, if `linear`, PCA.

    Examples beyond the limits are left out evenly, in file order; the titles give the counts.
    """
    if predictions.features is None or len(predictions.label) < 5:
        return ''
    wrong = predictions.predicted != predictions.label
    drawn = []
    if linear:
        kept = evenly(len(wrong), SCATTERED)
        points, share = embedding.pca(predictions.features[kept])
        title = f'PCA {100 * share[0]:.2g} + {100 * share[1]:.2g} %'
        drawn.append(_scatter(predictions, kept, points, wrong, title, size))
    kept = evenly(len(wrong), neighbours)
    points = embedding.tsne(predictions.features[kept], steps=400)
    drawn.append(_scatter(predictions, kept, points, wrong, 't-SNE', size))
    return columns(*drawn)


def class_legend(class_names: Sequence[str], most: int = 100) -> str:
    """Colour and marker of every class in the embedding plots."""
    entries = [
        (plots.color_of(i), plots.GLYPHS[i // len(plots.PALETTE) % len(plots.GLYPHS)], name)
        for i, name in enumerate(class_names[:most])
    ]
    return legend(entries)


def _scatter(
    predictions: Predictions, kept: np.ndarray, points: np.ndarray, wrong: np.ndarray, title: str, size: float
) -> str:
    of = f' of {len(wrong)}' if len(kept) < len(wrong) else ''
    title = f'{title} · n = {len(kept)}{of}'
    return plots.embedding(points, predictions.label[kept], wrong[kept], predictions.class_names, title, size)


def evenly(count: int, most: int) -> np.ndarray:
    """At most `most` row numbers of `count`, evenly spaced."""
    return np.arange(count) if count <= most else np.linspace(0, count - 1, most).round().astype(int)
