import html.parser
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tl_jax.errors import UserError
from tl_jax.report import write_run_report, write_sweep_report
from tl_jax.report.__main__ import main

HOSTILE = ('<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', '$\\frac{a & \u202egnp\x00')
VOID = {'meta', 'img', 'br', 'path', 'use', 'rect'}


class Reader(html.parser.HTMLParser):
    """Collects tags and attributes, and checks that every element is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID or tag in ('rect',):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in VOID or tag in ('rect',):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def check_self_contained(text):
    page = Reader(text)
    assert 'script' not in page.tags and 'link' not in page.tags and 'iframe' not in page.tags
    for name, value in page.attributes:
        assert not name.startswith('on')
        if name == 'src':
            assert value.startswith('data:image/')
        if name in ('href', 'xlink:href'):
            assert not value.startswith(('http', '//', 'javascript'))
    return page


@pytest.fixture
def run(tmp_path, make_run):
    return make_run(tmp_path / 'run')


def test_run_page_has_every_part(run):
    path = write_run_report(run)
    text = path.read_text()
    page = check_self_contained(text)
    words = ' '.join(page.text)
    assert path == run / 'report.html' and len(text) < 3e6
    for part in ('Learning curves', 'Confusion on test', 'Most confused', 'Worst mistakes', 'Classes and calibration',
                 'Features', 't-SNE', 'PCA', 'Resolved config', 'python launch.py --mode=train', 'jax 0.10.2',
                 'best by val/accuracy (step 40)', '75.00 %', 'Dotted: the end of a stage'):  # fmt: skip
        assert part in words, part
    # Confidence is 0.8 throughout and accuracy 0.75, so the calibration error is 5 points.
    assert 'Expected calibration error 5.00 %' in words
    assert page.tags.count('img') == 6 and all(value for name, value in page.attributes if name == 'alt')


def test_hostile_names_stay_text(tmp_path, make_run):
    run = make_run(tmp_path / 'run', class_names=HOSTILE, name='<b>x', command='</pre><script>', device='<i>')
    page = check_self_contained(write_run_report(run).read_text())
    assert not {'b', 'i'} & set(page.tags)
    words = ' '.join(page.text)
    assert HOSTILE[0] in words and '\u202e' not in words and '\x00' not in words


def test_hostile_names_in_a_sweep_stay_text(tmp_path, make_run):
    make_run(tmp_path / 'a"><img onerror=x $^&/seed0', class_names=HOSTILE)
    page = check_self_contained(write_sweep_report(tmp_path, {'a"><img onerror=x $^&': (0.5)}).read_text())
    assert 'a"><img onerror=x $^&' in ' '.join(page.text)


@pytest.mark.parametrize('present', ['config.json', 'metrics.jsonl', 'summary.json'])
def test_a_page_is_made_of_whatever_is_there(tmp_path, make_run, present):
    run = make_run(tmp_path / 'run')
    for path in [*run.glob('*.json*'), *run.glob('predictions/*')]:
        if path.name != present:
            path.unlink()
    words = ' '.join(check_self_contained(write_run_report(run).read_text()).text)
    assert 'predictions/ holds no predictions' in words
    assert 'is missing' in words


def test_predictions_without_features_or_images(run):
    path = run / 'predictions/test.npz'
    with np.load(path) as arrays:
        kept = {name: arrays[name] for name in ('label', 'probabilities')}
    np.savez(path, **kept)
    words = ' '.join(check_self_contained(write_run_report(run).read_text()).text)
    assert 'Confusion on test' in words and 'Features' not in words and 'Worst mistakes' not in words


def test_an_accuracy_that_the_predictions_contradict_is_named(run):
    summary = json.loads((run / 'summary.json').read_text())
    summary['metrics']['test/accuracy'] = 0.99
    (run / 'summary.json').write_text(json.dumps(summary))
    assert 'the stored predictions give 0.750000' in write_run_report(run).read_text()


def test_many_classes(tmp_path, make_run):
    run = make_run(tmp_path / 'run', class_names=tuple(f'class {i}' for i in range(120)), count=360)
    text = write_run_report(run).read_text()
    assert 'The 40 of 120 classes with the most mistakes' in text and len(text) < 3e6


def test_same_files_same_bytes(run, sweep):
    for make, path in ((write_run_report, run), (write_sweep_report, sweep)):
        first = make(path).read_bytes()
        assert make(path).read_bytes() == first


def test_a_failed_write_leaves_the_old_page_and_no_scraps(run, monkeypatch):
    write_run_report(run)
    old, files = (run / 'report.html').read_bytes(), sorted(run.iterdir())
    (run / 'metrics.jsonl').unlink()
    monkeypatch.setattr(os, 'replace', lambda *_: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError, match='disk full'):
        write_run_report(run)
    assert (run / 'report.html').read_bytes() == old
    assert sorted(run.iterdir()) == [path for path in files if path.name != 'metrics.jsonl']


def test_sweep_page(sweep):
    write_run_report(sweep / 'full/seed0')
    (sweep / 'scratch/seed1/summary.json').unlink()
    text = write_sweep_report(sweep, {'full': 0.9}).read_text()
    page = check_self_contained(text)
    words = ' '.join(page.text)
    assert ('href', 'full/seed0/report.html') in page.attributes and ('href', 'full/seed1/') in page.attributes
    assert 'scratch, seed 1: not finished; its last record is of step 40.' in words
    assert '85.00 ± 5.00' in words and '5 of 6 runs finished' in words and 'checkpoint by val/accuracy' in words
    assert text.count('class="confusion"') == 2 and text.count('t-SNE') >= 2
    table = json.loads((sweep / 'table.json').read_text())
    assert table['rows'][1]['published']['accuracy'] == 0.9
    assert '85.00 ± 5.00' in (sweep / 'table.md').read_text()


def test_a_sweep_where_nothing_has_finished(sweep):
    for path in sweep.glob('*/*/summary.json'):
        path.unlink()
    words = ' '.join(check_self_contained(write_sweep_report(sweep).read_text()).text)
    assert 'No run has finished' in words and '0 of 6 runs finished' in words


def test_command_line(run, sweep, tmp_path, capsys):
    assert main([str(run)]) == 0 and main([str(sweep)]) == 0
    assert '85.00 ± 5.00' in capsys.readouterr().out
    assert main([str(tmp_path / 'nothing')]) == 2
    assert 'not a sweep directory' in capsys.readouterr().err


def test_no_such_directory(tmp_path):
    with pytest.raises(UserError, match='nothing'):
        write_run_report(tmp_path / 'nothing')


def test_import_is_cheap():
    code = (
        'import tl_jax.report, sys; print(sorted({"matplotlib", "sklearn", "PIL", "jax", "flax"} & set(sys.modules)))'
    )
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout == '[]\n'
