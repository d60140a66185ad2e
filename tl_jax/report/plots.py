"""Charts as inline SVG. Ink is `currentColor`, so one picture serves a light and a dark page.

matplotlib is imported inside the functions (a second), and never through pyplot: no window system, no global
figure list. Equal data give equal bytes.
"""

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from tl_jax.report import scores
from tl_jax.report.markup import clean, escape, shorten

# Petroff's ten colours, chosen by survey to be told apart, also by the colour-blind (arXiv:2107.02270).
PALETTE = (
    '#3f90da', '#ffa90e', '#bd1f01', '#832db6', '#a96b59',
    '#e76300', '#b9ac70', '#92dadd', '#717581', '#94a4a2',
)  # fmt: skip
MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X', '<', '>', 'p')
GLYPHS = ('●', '■', '▲', '◆', '▼', '✚', '✖', '◀', '▶', '⬟')
# Stand-ins that `_svg` replaces by the page's own colours.
INK = '#010203'
PLATE = '#fefdfc'
MAX_POINTS = 400


class Series(NamedTuple):
    """One line; `low` and `high` bound a band around it. Thin lines are context behind the thick ones."""

    steps: np.ndarray
    values: np.ndarray
    color: str
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    thin: bool = False
    dashed: bool = False


class Panel(NamedTuple):
    """One set of axes of a row of learning curves."""

    title: str
    series: Sequence[Series]
    percent: bool = False
    log: bool = False
    xlabel: str = 'step'


def color_of(position: int) -> str:
    """The colour of the n-th class or strategy."""
    return PALETTE[position % len(PALETTE)]


def thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_POINTS points: means over equal blocks of consecutive records."""
    block = -(-len(steps) // MAX_POINTS)
    if block <= 1:
        return steps, values
    starts = np.arange(0, len(steps), block)
    sizes = np.diff(np.append(starts, len(steps)))
    return np.add.reduceat(steps, starts) / sizes, np.add.reduceat(values, starts) / sizes


def learning_curves(panels: Sequence[Panel], stages: Sequence[float], alt: str) -> str:
    """Panels side by side over the training step; dotted verticals where a stage ends."""
    width = 11.2 if len(panels) > 1 else 6
    with _figure(width, 3.1) as figure:
        margins = _margins(width, 3.1, wspace=0.2)
        axes = figure.subplots(1, len(panels), squeeze=False, gridspec_kw=margins)[0]
        for ax, panel in zip(axes, panels, strict=True):
            _panel(ax, panel, stages)
        return _svg(figure, alt)


def _panel(ax: Any, panel: Panel, stages: Sequence[float]) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter

    for line in panel.series:
        if line.low is not None:
            ax.fill_between(line.steps, line.low, line.high, color=line.color, alpha=0.18, linewidth=0)
        ax.plot(
            line.steps,
            line.values,
            color=line.color,
            linewidth=0.8 if line.thin else 1.8,
            alpha=0.45 if line.thin else 1,
            linestyle=(0, (4, 2)) if line.dashed else '-',
            marker='o' if len(line.steps) == 1 else None,
            markersize=4,
        )
    for step in stages:
        ax.axvline(step, color=INK, alpha=0.5, linewidth=1, linestyle=':')
    _title(ax, panel.title)
    ax.set_xlabel(panel.xlabel)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if panel.log and any((line.values > 0).any() for line in panel.series):
        ax.set_yscale('log')
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        ax.yaxis.set_major_formatter('{x:g}')
        ax.yaxis.set_minor_formatter(NullFormatter())
    if panel.percent:
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        ax.set_ylim(top=min(1.02, ax.get_ylim()[1]))
    _frame(ax)


def embedding(
    points: Float[np.ndarray, 'example 2'],
    label: Int[np.ndarray, 'example'],
    wrong: Bool[np.ndarray, 'example'],
    class_names: Sequence[str],
    title: str,
    size: float = 4.6,
) -> str:
    """Scatter by true class; mistakes are ringed. Up to 20 class names are written at their centres."""
    with _figure(size, size) as figure:
        ax = figure.add_axes((0.01, 0.01, 0.98, 0.92))
        for cls in np.unique(label):
            shape = MARKERS[cls // len(PALETTE) % len(MARKERS)]
            right, mistaken = points[(label == cls) & ~wrong].T, points[(label == cls) & wrong].T
            ax.scatter(*right, s=13, color=color_of(cls), marker=shape, alpha=0.75, linewidths=0, rasterized=True)
            ring = {'edgecolors': INK, 'linewidths': 0.9, 'zorder': 3, 'rasterized': int(wrong.sum()) > 300}
            ax.scatter(*mistaken, s=24, color=color_of(cls), marker=shape, **ring)
        if len(class_names) <= 20:
            _name_classes(ax, points, label, class_names)
        _bare(ax, title)
        return _svg(figure, f'{title}: {len(points)} examples by class, {int(wrong.sum())} mistakes ringed')


def domains(
    points: Float[np.ndarray, 'example 2'],
    color: Int[np.ndarray, 'example'],
    shape: Int[np.ndarray, 'example'],
    names: Sequence[str],
    title: str,
    size: float = 4.2,
) -> str:
    """Scatter by two numbers, in a mixed order so that none hides another; `names` label the first shape's colours."""
    with _figure(size, size) as figure:
        ax = figure.add_axes((0.01, 0.01, 0.98, 0.92))
        order = np.random.default_rng(0).permutation(len(points))
        for kind in np.unique(shape):
            mine = order[shape[order] == kind]
            colors = [color_of(number) for number in color[mine]]
            marker = MARKERS[kind % len(MARKERS)]
            ax.scatter(*points[mine].T, s=13, c=colors, marker=marker, alpha=0.7, linewidths=0, rasterized=True)
        if 0 < len(names) <= 20:
            first = shape == shape.min()
            _name_classes(ax, points[first], color[first], names)
        _bare(ax, title)
        return _svg(figure, f'{title}: {len(points)} examples')


def _bare(ax: Any, title: str) -> None:
    """Axes whose coordinates mean nothing."""
    _title(ax, title)
    ax.set(xticks=[], yticks=[])
    ax.margins(0.06)
    for spine in ax.spines.values():
        spine.set(color=INK, alpha=0.2)


def _name_classes(ax: Any, points: np.ndarray, label: np.ndarray, names: Sequence[str]) -> None:
    for cls in np.unique(label):
        x, y = np.median(points[label == cls], 0)
        plate = {'boxstyle': 'round,pad=0.18', 'facecolor': PLATE, 'edgecolor': 'none', 'alpha': 0.72}
        name = clean(shorten(names[cls], 16))
        ax.text(x, y, name, ha='center', va='center', fontsize=9.5, fontweight='bold', zorder=5, bbox=plate)


def reliability(calibration: scores.Calibration) -> str:
    """Accuracy against confidence over bins, overconfidence shaded, and how many examples each bin holds."""
    from matplotlib.ticker import PercentFormatter

    filled = calibration.count > 0
    left, width = calibration.edges[:-1], np.diff(calibration.edges) * 0.92
    accuracy, confidence = calibration.accuracy[filled], calibration.confidence[filled]
    with _figure(4.2, 4.2) as figure:
        margins = _margins(4.2, 4.2, hspace=0.12, height_ratios=[3, 1])
        top, bottom = figure.subplots(2, 1, sharex=True, gridspec_kw=margins)
        place = {'x': left[filled], 'width': width[filled], 'align': 'edge', 'linewidth': 0}
        top.bar(height=accuracy, color=PALETTE[0], **place)
        top.bar(height=np.maximum(confidence - accuracy, 0), bottom=accuracy, color=PALETTE[5], alpha=0.4, **place)
        top.hlines(confidence, left[filled], (left + width)[filled], color=INK, linewidth=1.4)
        top.plot([0, 1], [0, 1], color=INK, alpha=0.6, linewidth=1, linestyle=(0, (4, 3)))
        top.set(xlim=(0, 1), ylim=(0, 1.01), ylabel='accuracy')
        top.yaxis.set_major_formatter(PercentFormatter(1))
        title = f'Expected calibration error {100 * calibration.error:.2f} %'
        _title(top, title)
        bottom.bar(left, calibration.count, width, align='edge', color=PALETTE[8], linewidth=0)
        bottom.set(xlabel='confidence of the predicted class', ylabel='examples')
        bottom.xaxis.set_major_formatter(PercentFormatter(1))
        for ax in (top, bottom):
            _frame(ax)
        return _svg(figure, f'Reliability diagram. {title}')


def dots(names: Sequence[str], values: Sequence[np.ndarray], label: str) -> str:
    """One line a strategy: a dot a seed, a tick at their mean."""
    from matplotlib.ticker import PercentFormatter

    names = [clean(shorten(name, 28)) for name in names]
    height = 0.6 + 0.34 * len(names)
    with _figure(11.2, height) as figure:
        margins = _margins(11.2, height, left=0.15 + 0.085 * max(map(len, names)), top=0.08)
        ax = figure.subplots(gridspec_kw=margins)
        for row, mine in enumerate(values):
            ax.plot([mine.min(), mine.max()], [row, row], color=color_of(row), alpha=0.35, linewidth=3)
            ax.scatter(mine, np.full(len(mine), row), s=26, color=color_of(row), alpha=0.8, linewidths=0, zorder=3)
            ax.plot([mine.mean()] * 2, [row - 0.3, row + 0.3], color=INK, linewidth=1.6, zorder=4)
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        ax.set_xlabel(f'{clean(label)}: a dot a seed, a tick at their mean')
        _frame(ax, 'x')
        return _svg(figure, f'{label} of every strategy by seed')


def against_published(
    names: Sequence[str],
    values: Sequence[np.ndarray],
    published: Sequence[float | None],
    accepted: Sequence[tuple[float | None, float | None] | None],
    unit: str,
) -> str:
    """One line a figure: our seeds as dots with a tick at their mean, the paper's figure, the accepted range as a band."""
    names = [clean(shorten(name, 40)) for name in names]
    height = 0.65 + 0.27 * len(names)
    ends = [end for band in accepted for end in band or ()]
    shown = np.array([x for x in [*np.concatenate(values), *published, *ends] if x is not None], float)
    room = 0.08 * max(np.ptp(shown), 0.02 * np.abs(shown).max(), 1e-9)
    limits = shown.min() - room, shown.max() + room
    with _figure(11.2, height) as figure:
        margins = _margins(11.2, height, left=0.15 + 0.085 * max(map(len, names)), top=0.08)
        ax = figure.subplots(gridspec_kw=margins)
        for row, (mine, theirs, band) in enumerate(zip(values, published, accepted, strict=True)):
            if band is not None:
                low, high = (limits[i] if end is None else end for i, end in enumerate(band))
                ax.barh(row, high - low, left=low, height=0.72, color=PALETTE[8], alpha=0.22, linewidth=0)
            if theirs is not None:
                ax.scatter(theirs, row, s=30, marker='D', facecolors='none', edgecolors=INK, linewidths=1.1, zorder=3)
            if len(mine):
                good = band is None or low <= mine.mean() <= high
                color = PALETTE[0] if good else PALETTE[5]
                ax.scatter(mine, np.full(len(mine), row), s=22, color=color, alpha=0.8, linewidths=0, zorder=4)
                ax.plot([mine.mean()] * 2, [row - 0.32, row + 0.32], color=color, linewidth=2, zorder=5)
        ax.set_yticks(range(len(names)), names)
        ax.set(ylim=(len(names) - 0.4, -0.6), xlim=limits, xlabel=clean(unit))
        _frame(ax, 'x')
        return _svg(figure, f'Our figures against the published ones, {unit}')


def confusion(
    matrix: Int[np.ndarray, 'true predicted'], class_names: Sequence[str], width: int = 560, tips: bool = True
) -> str:
    """Confusion matrix, rows true. A cell's strength is its share of the row: blue right, orange wrong.

    Counts are written into the cells up to 20 classes. Drawn by hand: 10 000 cells take matplotlib seconds.
    """
    classes = len(matrix)
    cell = min(max(width / classes, 8), 52 if classes > 5 else 84)
    font = min(max(cell * 0.36, 6.5), 13)
    names = [shorten(name, 14) for name in class_names]
    longest = 0.62 * font * max(map(len, names))
    upright, margin = longest > cell, 18 + longest
    head = margin if upright else font + 22
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    parts = []
    for row, column in np.argwhere(matrix):
        count, share = int(matrix[row, column]), shares[row, column]
        x, y = margin + column * cell, head + row * cell
        tip = f'{class_names[row]} → {class_names[column]}: {count} ({100 * share:.1f} % of the row)' if tips else ''
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{cell - 1:.1f}" height="{cell - 1:.1f}" '
            f'class="{"hit" if row == column else "miss"}" fill-opacity="{0.1 + 0.9 * share:.2f}">'
            + (f'<title>{escape(tip)}</title>' if tip else '')
            + '</rect>'
        )
        if classes <= 20:
            strong = ' class="on"' if share > 0.5 else ''
            parts.append(f'<text{strong} x="{x + cell / 2:.1f}" y="{y + cell / 2:.1f}">{count}</text>')
    for i, name in enumerate(names):
        centre = (i + 0.5) * cell
        parts.append(f'<text class="row" x="{margin - 6:.1f}" y="{head + centre:.1f}">{escape(name)}</text>')
        x, y = margin + centre, head - 8
        turned = f' class="up" transform="rotate(-90 {x:.1f} {y:.1f})"' if upright else ''
        parts.append(f'<text{turned} x="{x:.1f}" y="{y:.1f}">{escape(name)}</text>')
    side = classes * cell
    width, height = margin + side + 1, head + side + 1
    grid = f'x="{margin - 0.5:.1f}" y="{head - 0.5:.1f}" width="{side:.1f}" height="{side:.1f}"'
    return (
        f'<svg class="confusion" role="img" aria-label="Confusion matrix of {classes} classes" '
        f'font-size="{font:.1f}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'style="max-width:{width:.0f}px;min-width:{min(width, 46 * classes):.0f}px">'
        f'<rect class="grid" {grid}/>{"".join(parts)}</svg>'
    )


def _margins(width: float, height: float, left: float = 0.6, top: float = 0.3, **more: Any) -> dict[str, Any]:
    """Room around the axes, in inches; matplotlib's own layout draws everything twice to find it."""
    return {'left': left / width, 'right': 1 - 0.2 / width, 'bottom': 0.5 / height, 'top': 1 - top / height, **more}


def _title(ax: Any, text: str) -> None:
    ax.set_title(text, loc='left', fontsize=10.5, fontweight='bold')


def _frame(ax: Any, grid: str = 'y') -> None:
    ax.spines[['top', 'right']].set_visible(False)
    ax.spines[['left', 'bottom']].set(color=INK, alpha=0.35)
    ax.grid(True, axis=grid, color=INK, alpha=0.1, linewidth=0.8)
    ax.set_axisbelow(True)


@contextlib.contextmanager
def _figure(width: float, height: float) -> Iterator[Any]:
    """A figure of the given inches under the report's style; foreign text is never parsed as mathematics."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        'svg.fonttype': 'none',
        'svg.hashsalt': 'tl_jax',
        'text.parse_math': False,
        'font.size': 9.5,
        'axes.labelsize': 9.5,
        **dict.fromkeys(('text.color', 'axes.labelcolor', 'xtick.color', 'ytick.color'), INK),
        **dict.fromkeys(('xtick.major.size', 'ytick.major.size', 'ytick.minor.size'), 0),
    }
    with matplotlib.rc_context(style):
        yield Figure(figsize=(width, height), facecolor='none')


def _svg(figure: Any, alt: str) -> str:
    """The figure as an <svg> element to place in HTML, scalable, without ids that could clash on the page."""
    for ax in figure.axes:
        ax.set_facecolor('none')
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # Glyphs that matplotlib's font lacks only make its estimate of widths worse; the browser has them.
        warnings.filterwarnings('ignore', message='.*[Gg]lyph.*')
        figure.savefig(buffer, format='svg', metadata={'Date': None}, dpi=180)
    svg = buffer.getvalue()
    body = svg[svg.index('>', svg.index('<svg')) + 1 :]
    body = re.sub(r'\s*<metadata>.*?</metadata>', '', body, flags=re.S)
    body = re.sub(r'<g id="[^"]*"', '<g', body).replace(INK, 'currentColor').replace(PLATE, 'var(--paper)')
    width, height = (72 * side for side in figure.get_size_inches())
    return (
        f'<svg class="plot" role="img" aria-label="{escape(alt)}" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{1.3 * width:.0f}px">{body}'
    )
