"""What a network makes of two or more domains: how far apart their features lie, and what it mistakes in each."""

import itertools
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from tl_jax.report import embedding, plots, runs, views
from tl_jax.report.markup import caption, columns, escape, legend, section, table
from tl_jax.report.runs import Predictions, Run

EMBEDDED = 400
MEASURED = 2000

Domains = Mapping[str, Predictions]


def domain_sections(run: Run) -> tuple[list[str], list[str]]:
    """The page's sections on a run's domains, none where it has fewer than two; and notes on files that are unusable."""
    names = domain_names(run)
    after, problems = read_domains(run, names)
    if len(after) < 2:
        return [], problems
    before, lost = read_domains(run, names, 'before') if (run.path / 'predictions/before').is_dir() else ({}, [])
    before = before if before.keys() == after.keys() else {}
    featured = all(p.features is not None for p in after.values())
    drawn = embedding_view(before, after) if featured else ''
    said = 'A square each: rows are true classes, columns predictions; strength is the share of the row.'
    confusions = [
        f'<h3>{escape(name)}, {100 * _accuracy(p):.2f} %</h3>{views.confusion_view(p, 400, tips=False)}'
        for name, p in after.items()
    ]
    return [
        section('Domains', distances_view(before, after) if featured else '', drawn),
        section('Confusion by domain', caption(said), columns(*confusions)),
    ], [*problems, *lost]


def domain_names(run: Run) -> list[str]:
    """The splits that are domains: the test splits if there are several, else the split of each training stream.

    A stream's split has its name, or begins with it: `source_val` is of `source`.
    """
    data = run.config.get('data')
    data = data if isinstance(data, Mapping) else {}
    train, val, test = (_names(data.get(field)) for field in ('train', 'eval', 'test'))
    tested = [name for name in test if name in run.splits]
    if len(tested) > 1:
        return tested
    held_out = [name for name in [*test, *val] if name in run.splits]
    of = lambda stream: (name for name in held_out if name == stream or name.startswith(f'{stream}_'))
    return [name for stream in train if (name := next(of(stream), None))]


def read_domains(run: Run, names: Sequence[str], folder: str = '') -> tuple[dict[str, Predictions], list[str]]:
    """The domains' predictions, as far as they are usable and of one kind, and a note for each that is not."""
    found, problems = {}, []
    for name in names:
        predictions, notes = runs.read_predictions(run.path / 'predictions' / folder / f'{name}.npz')
        problems += notes
        first = next(iter(found.values()), predictions)
        if predictions is None:
            continue
        if predictions.class_names == first.class_names and _width(predictions) == _width(first):
            found[name] = predictions
        else:
            problems.append(f'{name}.npz: other classes or features than {next(iter(found))}.npz; not compared.')
    return found, problems


def a_distance(
    one: Float[np.ndarray, 'example feature'], other: Float[np.ndarray, 'example feature'], *, seed: int = 0
) -> float:
    """Proxy A-distance 2 (1 − 2 ε) of two samples (Ben-David et al. 2007, NIPS 19, sec. 4).

    ε is the held-out error of a linear classifier (logistic regression on standardised features) that tells which sample
    an example is of: each half is learnt from once and judged once. 0 where it cannot tell, 2 where it always can; an
    estimate from few examples may fall a little below 0. At most MEASURED examples of each, equally many.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    random, count = np.random.default_rng(seed), min(len(one), len(other), MEASURED) // 2 * 2
    drawn = [side[random.permutation(len(side))[:count]].astype(np.float64) for side in (one, other)]
    halves = [np.concatenate([side[start::2] for side in drawn]) for start in (0, 1)]
    domain = np.repeat([0, 1], count // 2)
    errors = []
    for learnt, judged in (halves, halves[::-1]):
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
        with threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # an unfinished fit still is a classifier, and its error is measured
            errors.append(np.mean(classifier.fit(learnt, domain).predict(judged) != domain))
    return float(2 * (1 - 2 * np.mean(errors)))


def distances_view(before: Domains, after: Domains) -> str:
    """The proxy A-distance of every pair of domains, and the accuracy on each, before and after."""
    states = [state for state in (before, after) if state]
    heads = ['before', 'after'] if before else ['']
    pairs = [
        [f'{escape(a)} – {escape(b)}', *(f'{a_distance(s[a].features, s[b].features):.2f}' for s in states)]
        for a, b in itertools.combinations(after, 2)
    ]
    rows = [
        [escape(name), f'{len(after[name].label):,}', *(f'{100 * _accuracy(state[name]):.2f}' for state in states)]
        for name in after
    ]
    said = (
        'Proxy A-distance 2 (1 − 2 ε): ε is the held-out error of a linear classifier that tells the domains by their '
        'features (Ben-David et al. 2007). 0: it cannot; 2: it never errs.'
    )
    if before:
        said += ' Before: when the last stage began.'
    of = lambda what: [f'{what} {head}'.strip() for head in heads]
    shown = columns(
        table(['domains', *of('A-distance')], pairs), table(['domain', 'examples', *of('accuracy %')], rows)
    )
    return shown + caption(said)


def embedding_view(before: Domains, after: Domains) -> str:
    """All domains in one plane: principal components and t-SNE by domain, t-SNE by class; before beside after."""
    names, class_names = list(after), next(iter(after.values())).class_names
    states = {'before': before, 'after': after} if before else {'': after}
    drawn = {state: _panels(predictions, state) for state, predictions in states.items()}
    rows = [columns(*row) for row in zip(*drawn.values(), strict=True)] if before else [columns(*drawn[''])]
    keys = [(plots.color_of(i), '●', name) for i, name in enumerate(names)]
    shapes = [('currentColor', plots.GLYPHS[i % len(plots.GLYPHS)], name) for i, name in enumerate(names)]
    said = f'Equally many examples of each domain in one embedding; {len(class_names)} classes.'
    return ''.join(
        (
            legend(keys),
            *rows,
            caption(f'By class, the shape is the domain; names stand where the classes of {names[0]} lie.'),
            legend(shapes),
            caption(said),
        )
    )


def _panels(predictions: Domains, state: str) -> list[str]:
    features, domain, label = _joined(predictions)
    flat, share = embedding.pca(features)
    near = embedding.tsne(features, steps=400)
    lead = f'{state}: ' if state else ''
    class_names = next(iter(predictions.values())).class_names
    one = np.zeros_like(domain)
    linear = f'{lead}PCA {100 * share[0]:.2g} + {100 * share[1]:.2g} %, by domain'
    return [
        plots.domains(flat, domain, one, (), linear),
        plots.domains(near, domain, one, (), f'{lead}t-SNE, by domain'),
        plots.domains(near, label, domain, class_names, f'{lead}t-SNE, by class'),
    ]


def _joined(
    predictions: Domains,
) -> tuple[Float[np.ndarray, 'example feature'], Int[np.ndarray, 'example'], Int[np.ndarray, 'example']]:
    """Features, domain and label of equally many examples of each domain, EMBEDDED in all."""
    count = min(EMBEDDED // len(predictions), *(len(p.label) for p in predictions.values()))
    kept = [views.evenly(len(p.label), count) for p in predictions.values()]
    features = np.concatenate([p.features[k] for p, k in zip(predictions.values(), kept, strict=True)])
    label = np.concatenate([p.label[k] for p, k in zip(predictions.values(), kept, strict=True)])
    return features, np.repeat(np.arange(len(predictions)), count), label


def _names(given: object) -> list[str]:
    """The names of a config's several sources; none where it has one."""
    return list(given) if isinstance(given, Mapping) and 'spec' not in given else []


def _width(predictions: Predictions) -> int | None:
    return None if predictions.features is None else predictions.features.shape[1]


def _accuracy(predictions: Predictions) -> float:
    return float(np.mean(predictions.predicted == predictions.label))
