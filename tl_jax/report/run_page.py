"""report.html of one run."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tl_jax.report import domains, plots, runs, scores, teachers, views
from tl_jax.report.markup import (
    caption,
    cards,
    columns,
    details,
    escape,
    facts,
    legend,
    notes,
    preformatted,
    section,
    stacked,
    table,
    write_text,
)
from tl_jax.report.page import document
from tl_jax.report.runs import Predictions, Run

PLAIN = ('accuracy', 'loss', 'macro_f1', 'balanced_accuracy')
NEIGHBOURS = 500
MISTAKES = 24
DIVERGED = 3


def write_run_report(workdir: str | Path) -> Path:
    """Write report.html into a run directory, from its files alone. Returns the path.

    Whatever is missing is named on the page. Raises UserError if the directory is no run.
    """
    run = runs.read_run(workdir)
    split = main_split(run)
    predictions, problems = runs.read_predictions(run.path / f'predictions/{split}.npz') if split else (None, [])
    compared, unusable = domains.domain_sections(run)
    taught, lost = teachers.teacher_sections(run, split)
    problems = dict.fromkeys([*_notes(run), *problems, *unusable, *lost, *_disagreement(run, split, predictions)])
    name = str(run.summary.get('name') or run.path.name)
    body = '\n'.join(
        (
            header(run, name),
            notes(problems),
            key_figures(run, split, predictions),
            section('Figures', figures_table(run)),
            section('Learning curves', learning_curves(run)),
            section('Adaptation', inner_curves(run)),
            section('Privacy', privacy_curve(run)),
            *taught,
            *compared,
            *(split_sections(split, predictions) if predictions else ()),
            section('What was run', provenance(run)),
        )
    )
    footer = f'Made by tl_jax from the files in {run.path}; `python -m tl_jax.report {run.path}` makes it again.'
    return write_text(run.path / 'report.html', document(f'{name} · tl_jax run', body, footer))


def main_split(run: Run) -> str | None:
    """The split that the page looks at: `test`, or `target`, else the one that selected the checkpoint, else the first."""
    selector = str(run.summary.get('select_by', '')).partition('/')[0]
    for split in ('test', 'target', selector):
        if split in run.splits:
            return split
    return run.splits[0] if run.splits else None


def selection(run: Run) -> str:
    """How the reported checkpoint was chosen, as a sentence."""
    rule, step = run.summary.get('select_by'), runs.number(run.summary, 'selected_step')
    if rule is None:
        return 'The selection rule is not recorded.'
    at = f' (step {step:,.0f})' if step is not None else ''
    return f'Checkpoint: the last one{at}.' if rule == 'last' else f'Checkpoint: the best by {rule}{at}.'


def header(run: Run, name: str) -> str:
    """Title, and one line of what, when, where."""
    summary = run.summary
    seed = runs.number(summary, 'seed')
    parts = [f'seed {seed:.0f}' if seed is not None else None, summary.get('started'), summary.get('device')]
    line = ' · '.join(str(part) for part in parts if part)
    return f'<h1>{escape(name)}</h1><p class="lead">{escape(line)}</p><p>{escape(selection(run))}</p>\n'


def key_figures(run: Run, split: str | None, predictions: Predictions | None) -> str:
    """The handful of numbers a reader wants first."""
    metric = lambda key: runs.number(run.summary, 'metrics', key)
    figures = []
    for part in dict.fromkeys([split or 'test', *_measured_splits(run)]):
        accuracy = metric(f'{part}/accuracy')
        if accuracy is not None:
            within = ''
            if part == split and predictions:
                low, high = scores.wilson_interval(accuracy, len(predictions.label))
                within = f'{100 * low:.1f}–{100 * high:.1f} (95 %), n = {len(predictions.label):,}'
            figures.append((f'{part} accuracy', f'{100 * accuracy:.2f} %', within))
    f1, loss = metric(f'{split}/macro_f1'), metric(f'{split}/loss')
    if f1 is not None:
        figures.append((f'{split} macro-F1', f'{100 * f1:.2f} %', 'mean over classes'))
    if loss is not None:
        figures.append((f'{split} loss', f'{loss:.4f}', 'nats per example'))
    if predictions:
        error = views.calibration_of(predictions).error
        figures.append(('calibration error', f'{100 * error:.2f} %', 'ECE, 15 bins'))
    trainable = runs.integers(run.summary, 'parameters', 'trainable')
    total = runs.number(run.summary, 'parameters', 'total')
    if trainable:
        of = f'of {total:,.0f} parameters' if total is not None else 'parameters'
        stages = ' → '.join(map(compact, trainable))
        figures.append(('trained', stages, of + (', by stage' if len(trainable) > 1 else '')))
    epsilon = metric('privacy/epsilon')
    if epsilon is not None:
        delta = _delta(run)
        figures.append(('privacy spent', f'ε = {epsilon:.3g}', 'δ not recorded' if delta is None else f'δ = {delta:g}'))
    seconds, steps = runs.number(run.summary, 'seconds'), runs.number(run.summary, 'steps')
    if seconds is not None:
        figures.append(('time', duration(seconds), f'{steps:,.0f} steps' if steps is not None else ''))
    return cards(figures)


def figures_table(run: Run) -> str:
    """Every figure of the summary that is more than a plain classification's: per task, retrieval, errors, and so on.

    `name_ci95` stands beside `name`; figures after a number of inner steps are drawn by `inner_curves` instead.
    """
    found = {key: value for key in _metrics(run) if (value := runs.number(run.summary, 'metrics', key)) is not None}
    named = {key: key.partition('/') for key in found if '_step' not in key and not key.endswith('_ci95')}
    named = {key: (split, name) for key, (split, _, name) in named.items() if split != 'privacy'}
    names = list(dict.fromkeys(name for _, name in named.values()))
    splits = list(dict.fromkeys(split for split, _ in named.values()))
    if set(names) <= set(PLAIN) and 'accuracy' in names:
        return ''
    # What is not plain, such as a task's own accuracy, comes first.
    names.sort(key=lambda name: name in PLAIN)

    def cell(split: str, name: str) -> str:
        value, half = found.get(f'{split}/{name}'), found.get(f'{split}/{name}_ci95')
        return '–' if value is None else f'{value:.4f}' + (f' ± {half:.4f}' if half is not None else '')

    half_said = '±: half the 95 % interval.' if any(key.endswith('_ci95') for key in found) else ''
    rows = [[escape(name), *(cell(split, name) for split in splits)] for name in names]
    return table(['figure', *splits], rows) + (caption(half_said) if half_said else '') if rows else ''


def inner_curves(run: Run) -> str:
    """Figures after k steps of an inner loop, `<split>/<name>_step<k>`, over k, with their 95 % intervals."""
    curves: dict[str, dict[str, dict[int, str]]] = {}
    for key in _metrics(run):
        match = re.fullmatch(r'(.+?)/(.+)_step(\d+)', key)
        if match and runs.number(run.summary, 'metrics', key) is not None:
            split, name, step = match.groups()
            curves.setdefault(name, {}).setdefault(split, {})[int(step)] = key
    splits = list(dict.fromkeys(split for by_split in curves.values() for split in by_split))
    panels = []
    for name, by_split in curves.items():
        lines = []
        for split, keys in by_split.items():
            steps = sorted(keys)
            values = np.array([runs.number(run.summary, 'metrics', keys[k]) for k in steps])
            half = np.array([runs.number(run.summary, 'metrics', keys[k] + '_ci95') or 0.0 for k in steps])
            # More steps than were trained for may diverge; drawn, they would flatten all that came before.
            shown = np.cumsum(values > DIVERGED * values[0]) == 0 if name != 'accuracy' else values >= 0
            values, half = values[shown], half[shown]
            color = plots.color_of(splits.index(split))
            lines.append(plots.Series(np.array(steps)[shown], values, color, values - half, values + half))
        panels.append(plots.Panel(name, lines, percent=name == 'accuracy', xlabel='inner step'))
    if not panels:
        return ''
    rows = [plots.learning_curves(panels[i : i + 3], [], 'Figures over inner steps') for i in range(0, len(panels), 3)]
    keys = legend((plots.color_of(i), '▬', split) for i, split in enumerate(splits))
    said = caption(
        'Mean over tasks after so many steps on the support set; band: its 95 % interval. A curve ends where it has '
        f'diverged, {DIVERGED} times above its start.'
    )
    return f'<div class="wide">{"".join(rows)}</div>{keys}{said}'


def privacy_curve(run: Run) -> str:
    """The ε spent over the steps."""
    steps, values = plots.thinned(*runs.curve(run.records, 'privacy/epsilon'))
    if not len(steps):
        return ''
    panel = plots.Panel('ε spent', [plots.Series(steps, values, plots.color_of(0))])
    delta = _delta(run)
    said = f'(ε, δ)-differential privacy of one training example{f", δ = {delta:g}" if delta is not None else ""}.'
    return plots.learning_curves([panel], [], 'ε over the training step') + caption(said)


def learning_curves(run: Run) -> str:
    """Loss, accuracy and learning rate over the step: training against every evaluation split."""
    names = runs.keys(run.records)
    metrics = _drawn_metrics(run)
    # Players and tasks have lines of their own: `train/discriminator/loss`, `val/left/accuracy`.
    drawn = [key.rpartition('/') for key in names]
    splits = {split for split, _, name in drawn if split and name in dict(metrics)}
    splits = sorted(splits, key=lambda s: (not s.startswith('train'), s))
    panels = []
    for metric, title in metrics:
        lines = []
        for position, split in enumerate(splits):
            steps, values = plots.thinned(*runs.curve(run.records, f'{split}/{metric}'))
            if len(steps):
                lines.append(plots.Series(steps, values, _split_color(position), thin=split.startswith('train')))
        if lines:
            panels.append(plots.Panel(title, lines, percent=metric == 'accuracy', log=metric == 'loss'))
    rates = [name for name in names if name == 'lr' or name.startswith('lr/')]
    if rates:
        series = [
            plots.Series(*plots.thinned(*runs.curve(run.records, name)), plots.color_of(3 + i), dashed=i % 2 == 1)
            for i, name in enumerate(rates)
        ]
        panels.append(plots.Panel('Learning rate', series))
    if not panels:
        return ''
    stages = runs.stage_starts(run.records)
    chart = plots.learning_curves(panels, stages, f'Learning curves over {runs.last_step(run.records)} steps')
    keys = [(_split_color(i), '▬', split) for i, split in enumerate(splits)]
    keys += [(plots.color_of(3 + i), '▬', name) for i, name in enumerate(rates)]
    said = 'Loss on a logarithmic scale.' + (' Dotted: the end of a stage.' if stages else '')
    return f'<div class="wide">{chart}</div>{legend(keys)}{caption(said)}'


def split_sections(split: str, predictions: Predictions) -> list[str]:
    """Everything that follows from one split's predictions."""
    matrix_said = 'Rows are true classes, columns predictions; strength is the share of the row.'
    mistakes_said = 'Wrong and most confident: what was predicted, then what it is.'
    features_said = (
        'Features before the head; colour is the true class, ringed points are mistakes. '
        'PCA: the shares of the variance that its two axes hold.'
    )
    calibration_said = (
        'Bar: accuracy within a fifteenth of the confidence scale; tick: mean confidence there; orange: '
        'overconfidence. The error is the mean distance of the two over examples (Guo et al. 2017).'
    )
    confused = views.confused_view(predictions)
    beside = columns if len(predictions.class_names) <= 20 else stacked
    pictures = views.mistakes_view(predictions, MISTAKES)
    features = views.embedding_view(predictions, NEIGHBOURS, linear=True)
    reliability = plots.reliability(views.calibration_of(predictions)) + caption(calibration_said)
    return [
        section(
            f'Confusion on {split}',
            caption(matrix_said),
            beside(views.confusion_view(predictions), confused and f'<h3>Most confused</h3>{confused}'),
        ),
        section('Worst mistakes', pictures and caption(mistakes_said), pictures),
        section('Classes and calibration', columns(views.classes_view(predictions), reliability)),
        section(
            'Features',
            features and caption(features_said) + features + views.class_legend(predictions.class_names),
        ),
    ]


def provenance(run: Run) -> str:
    """Command, commit, environment, loaded weights and the resolved config."""
    summary = run.summary
    versions = summary.get('versions')
    optimizer = runs.integers(summary, 'parameters', 'bytes_optimizer')
    listed = facts(
        [
            ('directory', run.path),
            ('started', summary.get('started')),
            ('device', summary.get('device')),
            ('commit', summary.get('commit')),
            ('optimizer state', ' → '.join(f'{count:,} bytes' for count in optimizer)),
            (
                'versions',
                ', '.join(f'{k} {v}' for k, v in sorted(versions.items())) if _is_map(versions) else None,
            ),
        ]
    )
    command, account = summary.get('command'), summary.get('pretrained')
    return ''.join(
        (
            preformatted(str(command)) if command else '',
            listed,
            details('Loaded weights', preformatted(str(account))) if account else '',
            details('Resolved config', preformatted(json.dumps(run.config, indent=2))) if run.config else '',
        )
    )


def compact(count: float) -> str:
    """A count to three digits: 650, 61.7k, 25.6M."""
    for size, unit in ((1e9, 'G'), (1e6, 'M'), (1e4, 'k')):
        if count >= size:
            return f'{count / min(size, 1e9 if unit == "G" else size if unit == "M" else 1e3):.3g}{unit}'
    return f'{count:,.0f}'


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 120:
        return f'{seconds:.1f} s'
    minutes, seconds = divmod(round(seconds), 60)
    return f'{minutes} min {seconds} s' if minutes < 120 else f'{minutes // 60} h {minutes % 60} min'


def _metrics(run: Run) -> list[str]:
    metrics = run.summary.get('metrics')
    return list(metrics) if _is_map(metrics) else []


def _measured_splits(run: Run) -> list[str]:
    return sorted(key.removesuffix('/accuracy') for key in _metrics(run) if key.endswith('/accuracy'))


def _notes(run: Run) -> list[str]:
    """The notes on a run's files; a finished run with figures of its own kind need not store predictions."""
    other = run.finished and figures_table(run)
    return [note for note in run.notes if not (other and note.startswith('predictions/ holds no'))]


def _delta(run: Run) -> float | None:
    """The δ of (ε, δ)-privacy, as measured or else as configured."""
    measured = runs.number(run.summary, 'metrics', 'privacy/delta')
    return runs.number(run.config, 'gradient', 'delta') if measured is None else measured


def _drawn_metrics(run: Run) -> list[tuple[str, str]]:
    """(metric, title) of the learning curves: loss, and accuracy or the first figure that the evaluations have instead."""
    names = [key.partition('/')[2] for key in _metrics(run) if key in set(runs.keys(run.records))]
    other = [name for name in names if not name.startswith(('loss', 'epsilon', 'delta')) and '_' not in name]
    recorded = any(key.endswith('/accuracy') for key in runs.keys(run.records))
    if recorded or not other:
        return [('loss', 'Loss (nats)'), ('accuracy', 'Accuracy')]
    return [('loss', 'Loss'), (other[0], other[0])]


def _disagreement(run: Run, split: str | None, predictions: Predictions | None) -> list[str]:
    """A note if the summary's accuracy is not that of the stored predictions."""
    stated = runs.number(run.summary, 'metrics', f'{split}/accuracy')
    if predictions is None or stated is None:
        return []
    counted = float(np.mean(predictions.predicted == predictions.label))
    if abs(counted - stated) < 5e-6:
        return []
    return [f'summary.json says {split}/accuracy {stated:.6f}; the stored predictions give {counted:.6f}.']


def _split_color(position: int) -> str:
    return (plots.PALETTE[8], plots.PALETTE[0], plots.PALETTE[5], plots.PALETTE[2])[position % 4]


def _is_map(value: object) -> bool:
    return isinstance(value, Mapping)
