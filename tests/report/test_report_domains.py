import json
import re

import numpy as np
import pytest
from scipy.stats import norm

from tl_jax.report import domains, runs, write_run_report
from tl_jax.report.domains import a_distance

CLASSES = ('cat', 'dog', 'eel')


def write_predictions(path, *, shift=0.0, accuracy=1.0, count=60, width=6, seed=0, names=CLASSES):
    """Classes lie 4 apart on the first axes; a domain lies `shift` along the last."""
    random = np.random.default_rng(seed)
    label = np.arange(count) % len(names)
    features = random.normal(size=(count, width))
    features[np.arange(count), label] += 4
    features[:, -1] += shift
    predicted = np.where(np.arange(count) < round(accuracy * count), label, (label + 1) % len(names))
    probabilities = np.full((count, len(names)), 0.2 / (len(names) - 1), np.float32)
    probabilities[np.arange(count), predicted] = 0.8
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {'index': np.arange(count), 'label': label, 'probabilities': probabilities}
    np.savez(path, **columns, features=features.astype(np.float16), class_names=np.array(names))


def write_adapted(path, *, data=None, before=True):
    """A run with source and target, far apart before and near after."""
    data = data or {'train': {'source': 's', 'target': 't'}, 'test': {'target': 't', 'source': 's'}}
    for folder, shift, accuracy in (('before/', 5.0, 0.5), ('', 0.3, 0.8)) if before else (('', 0.3, 0.8),):
        write_predictions(path / f'predictions/{folder}source.npz', accuracy=0.9)
        write_predictions(path / f'predictions/{folder}target.npz', shift=shift, accuracy=accuracy, seed=1)
    (path / 'config.json').write_text(json.dumps({'data': data}))
    (path / 'metrics.jsonl').write_text(json.dumps({'step': 1, 'stage': 0, 'train/loss': 1.0, 'lr': 0.1}) + '\n')
    metrics = {'target/accuracy': 0.8, 'target/loss': 0.5, 'source/accuracy': 0.9, 'source/loss': 0.5}
    (path / 'summary.json').write_text(json.dumps({'metrics': metrics, 'name': 'M → U', 'select_by': 'last'}))
    return path


def write_figures(path, metrics, records=()):
    """A run without predictions."""
    path.mkdir()
    (path / 'config.json').write_text('{}')
    (path / 'metrics.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
    (path / 'summary.json').write_text(json.dumps({'metrics': metrics, 'name': 'figures', 'select_by': 'last'}))
    return path


def page_of(path):
    return write_run_report(path).read_text()


@pytest.mark.parametrize('gap', [0.5, 1.5, 3.0])
def test_a_distance_of_two_gaussians_is_that_of_the_best_linear_classifier(gap):
    # The Bayes error between N(0, I) and N(gap · u, I), |u| = 1, is Φ(−gap / 2), reached by a linear rule.
    random = np.random.default_rng(0)
    direction = random.normal(size=8)
    one, other = random.normal(size=(2, 2000, 8)) + np.array([0, gap])[:, None, None] * direction / np.linalg.norm(
        direction
    )
    expected = 2 * (1 - 2 * norm.cdf(-gap / 2))
    assert a_distance(one, other) == pytest.approx(expected, abs=0.06)


def test_a_distance_is_held_out_seeded_and_blind_to_scale_and_numbers():
    random = np.random.default_rng(0)
    # More features than examples: any classifier fits the half it learns from, only held-out error tells the truth.
    assert abs(a_distance(random.normal(size=(60, 400)), random.normal(size=(60, 400)))) < 0.5
    one, other = random.normal(size=(300, 4)), random.normal(size=(150, 4)) + 1
    scale = np.array([1, 1e3, 1e-3, 7])
    assert a_distance(one, other) == a_distance(one, other)
    assert a_distance(one * scale, other * scale) == pytest.approx(a_distance(one, other), abs=1e-9)
    # Twenty times as many examples of one domain do not let "always the larger" look like knowledge.
    assert abs(a_distance(random.normal(size=(2000, 3)), random.normal(size=(100, 3)))) < 0.45


def test_the_page_shows_domains_before_and_after(tmp_path):
    text = page_of(write_adapted(tmp_path / 'run'))
    figures = re.search(r'target – source</td><td class=n>([\d.-]+)</td><td class=n>([\d.-]+)</td>', text)
    before, after = map(float, figures.groups())
    assert before > 1.8 and abs(after) < 0.6
    for said in (
        'before: t-SNE, by domain',
        'after: t-SNE, by class',
        'after: PCA',
        '<h3>source, 90.00 %</h3>',
        '<h3>target, 80.00 %</h3>',
    ):
        assert said in text
    assert '<td>target</td><td class=n>60</td><td class=n>50.00</td><td class=n>80.00</td>' in text
    assert text.count('class="confusion"') == 3  # of both domains, and of the split that the page looks at
    assert 'Confusion on target' in text and 'class="notes"' not in text


def test_without_a_before_there_is_one_column(tmp_path):
    text = page_of(write_adapted(tmp_path / 'run', before=False))
    assert 'before:' not in text and '>A-distance<' in text and 't-SNE, by class' in text


@pytest.mark.parametrize(
    'data, expected',
    [
        ({'train': {'source': 's', 'target': 't'}, 'test': {'target': 't', 'source': 's'}}, ['target', 'source']),
        (
            {'train': {'source': 's', 'target': 't'}, 'eval': {'source_val': 's'}, 'test': {'target': 't'}},
            ['source_val', 'target'],
        ),
        ({'train': {'spec': 's', 'shots': 5}, 'eval': 's', 'test': 's'}, []),
        ({'train': {'target': 't'}, 'test': {'target': 't'}}, ['target']),
        ({'train': 's', 'test': {'clean': 's', 'noisy': 's', 'absent': 's'}}, ['clean', 'noisy']),
        ({}, []),
        (None, []),
        (7, []),
    ],
)
def test_domains_are_test_splits_or_streams(data, expected):
    run = runs.Run(
        None, {'data': data}, [], {}, ('clean', 'noisy', 'source', 'source_val', 'target', 'test', 'val'), ()
    )
    assert domains.domain_names(run) == expected


def test_domains_of_another_kind_or_damaged_are_named_and_left_out(tmp_path):
    run = write_adapted(tmp_path / 'run', before=False)
    write_predictions(run / 'predictions/target.npz', names=('cat', 'dog'), accuracy=0.8)
    text = page_of(run)
    assert 'other classes or features' in text and 'A-distance' not in text
    (run / 'predictions/source.npz').write_bytes(b'no archive')
    text = page_of(run)
    assert 'source.npz cannot be used' in text and 'A-distance' not in text


def test_domains_without_features_still_show_their_confusion(tmp_path):
    run = write_adapted(tmp_path / 'run', before=False)
    for name in ('source', 'target'):
        path = run / f'predictions/{name}.npz'
        with np.load(path) as stored:
            kept = {k: stored[k] for k in stored.files if k != 'features'}
        np.savez(path, **kept)
    text = page_of(run)
    assert 'A-distance' not in text and '<h3>source, 90.00 %</h3>' in text


def test_equally_many_of_each_domain_are_embedded():
    keep = {}
    for name, count in (('a', 1000), ('b', 40)):
        label = np.arange(count) % 3
        keep[name] = runs.Predictions(
            label, label, np.eye(3)[label], CLASSES, np.full((count, 2), count, np.float32), None, None
        )
    features, domain, label = domains._joined(keep)
    assert np.bincount(domain).tolist() == [40, 40] and features.shape == (80, 2) and len(label) == 80
    assert (features[domain == 0] == 1000).all() and (features[domain == 1] == 40).all()


def test_inner_loop_curves_are_drawn_and_not_listed(tmp_path):
    metrics = {f'test/mse_step{k}': 3.0 / (1 + k) for k in range(11)}
    metrics |= {f'test/mse_step{k}_ci95': 0.1 for k in range(11)} | {'test/mse': 0.2727, 'test/mse_ci95': 0.1}
    metrics |= {f'test_20/mse_step{k}': 2.0 / (1 + k) for k in range(11)}
    text = page_of(write_figures(tmp_path / 'run', metrics))
    assert '>Adaptation<' in text and 'inner step' in text and 'mse_step' not in text
    assert '<td>mse</td><td class=n>0.2727 ± 0.1000</td>' in text
    assert 'holds no predictions' not in text


def test_the_order_of_inner_steps_is_numeric(tmp_path, monkeypatch):
    from tl_jax.report import plots, run_page

    drawn = []
    monkeypatch.setattr(plots, 'learning_curves', lambda panels, *_: drawn.extend(panels) or '')
    run = runs.read_run(write_figures(tmp_path / 'run', {f'val/accuracy_step{k}': k / 10 for k in (10, 2, 0)}))
    run_page.inner_curves(run)
    (panel,) = drawn
    assert panel.percent and panel.series[0].steps.tolist() == [0, 2, 10]
    assert panel.series[0].values.tolist() == [0.0, 0.2, 1.0]


def test_the_privacy_spent_is_a_card_and_a_curve(tmp_path):
    records = [{'step': s, 'stage': 0, 'privacy/epsilon': s / 100, 'val/accuracy': 0.9} for s in (50, 100)]
    metrics = {'privacy/epsilon': 1.1634, 'privacy/delta': 1e-5, 'test/accuracy': 0.95, 'test/loss': 0.2}
    text = page_of(write_figures(tmp_path / 'run', metrics, records))
    assert 'ε = 1.16' in text and 'δ = 1e-05' in text and 'ε spent' in text
    assert '>Figures<' not in text  # otherwise a plain classification


def test_figures_of_tasks_and_of_retrieval_are_listed(tmp_path):
    metrics = {'test/accuracy': 0.9, 'test/loss': 0.3, 'test/left/accuracy': 0.95, 'test/accuracy_right': 0.85}
    metrics |= {'val/to_text_recall@1': 0.5, 'val/to_text_recall@5': 0.75, 'test/to_text_recall@1': 0.25}
    text = page_of(write_figures(tmp_path / 'run', metrics))
    assert '<td>left/accuracy</td><td class=n>0.9500</td><td class=n>–</td>' in text
    assert '<td>accuracy_right</td><td class=n>0.8500</td>' in text
    assert '<td>to_text_recall@1</td><td class=n>0.2500</td><td class=n>0.5000</td>' in text


def test_a_page_of_domains_is_the_same_from_the_same_files(tmp_path):
    run = write_adapted(tmp_path / 'run', before=False)
    assert page_of(run) == page_of(run)
