import json
import math
import shutil

import pytest

from tl_jax.errors import UserError
from tl_jax.report import compare, format_table, tables


def by_name(comparison):
    return {row.strategy: row for row in comparison.rows}


def test_figures_by_closed_form(sweep):
    comparison = compare(sweep)
    full, scratch = by_name(comparison)['full'], by_name(comparison)['scratch']
    assert [row.strategy for row in comparison.rows] == ['scratch', 'full']
    assert full.accuracy.mean == pytest.approx(0.85) and full.accuracy.std == pytest.approx(0.05)
    assert scratch.accuracy.mean == pytest.approx(0.6) and scratch.accuracy.std == pytest.approx(0.1)
    assert full.macro_f1.mean == pytest.approx(0.8)
    # Paired differences 30, 25, 20 points: mean 25, sample deviation 5.
    assert full.gain.points == pytest.approx(25) and full.gain.paired
    assert full.gain.error == pytest.approx(5 / math.sqrt(3))
    assert scratch.gain is None
    assert full.seconds.mean == pytest.approx(3) and full.trainable == (850, 61706) and full.seeds == (0, 1, 2)


def test_unpaired_gain_where_a_seed_is_missing(sweep):
    (sweep / 'full/seed2/summary.json').unlink()
    full = by_name(compare(sweep))['full']
    assert full.gain.points == pytest.approx(22.5) and not full.gain.paired
    variance = 2 * 2.5**2  # of 80 and 85, in points
    assert full.gain.error == pytest.approx(math.sqrt(variance / 2 + 100 / 3))


def test_one_seed_has_no_deviation(tmp_path, make_run):
    make_run(tmp_path / 'full/seed0')
    comparison = compare(tmp_path)
    assert by_name(comparison)['full'].accuracy.std is None
    text = format_table(comparison)
    assert '75.00 ' in text and '75.00 ±' not in text and 'No gain' in text


def test_missing_runs_are_listed_with_the_reason(sweep):
    (sweep / 'full/seed1/summary.json').unlink()
    shutil.rmtree(sweep / 'scratch/seed2')
    (sweep / 'probe/seed0').mkdir(parents=True)
    missing = {(m.strategy, m.seed): m.reason for m in compare(sweep).missing}
    assert missing['full', 1] == 'not finished; its last record is of step 40'
    assert 'no run directory' in missing['scratch', 2]
    assert {('probe', seed) for seed in range(3)} < missing.keys() and len(missing) == 5
    assert format_table(compare(sweep)).count('MISSING') == 5


def test_a_summary_without_the_accuracy_is_missing_not_dropped(sweep):
    path = sweep / 'full/seed0/summary.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'metrics': {}}))
    assert compare(sweep).missing[0].reason == 'summary.json has no test/accuracy'


def test_published_figures_stand_beside_ours(sweep):
    published = {'full': {'accuracy': 0.84, 'source': 'Kumar et al. 2022, Table 1', 'tolerance': 0.02}, 'scratch': 0.9}
    text = format_table(compare(sweep, published))
    assert '84.00 (+1.00) ✓' in text and '90.00 (-30.00)' in text and 'Kumar et al. 2022, Table 1' in text


def test_selection_is_printed_and_flagged_where_it_is_the_reported_split(tmp_path, make_run):
    make_run(tmp_path / 'a/seed0', select_by='test/accuracy')
    assert 'optimistic' in format_table(compare(tmp_path))
    make_run(tmp_path / 'b/seed0', select_by='last')
    assert 'last (1 runs)' in compare(tmp_path).selection
    make_run(tmp_path / 'sweep/c/seed0', select_by='oracle: test/accuracy, chosen on the test labels')
    assert 'optimistic' in compare(tmp_path / 'sweep').selection


def test_plain_and_markdown_are_aligned(sweep):
    plain, markdown = (format_table(compare(sweep), style).splitlines() for style in ('plain', 'markdown'))
    assert len({len(line) for line in plain[:4]}) == 1
    assert len({len(line) for line in markdown[:4]}) == 1 and markdown[1].startswith('| ---')
    assert '85.00 ± 5.00' in plain[3] and '+25.00 ± 2.89' in plain[3] and '850 → 61,706' in plain[3]
    with pytest.raises(UserError, match='style'):
        format_table(compare(sweep), 'latex')


def test_a_hostile_directory_name_stays_text(tmp_path, make_run):
    make_run(tmp_path / 'a|b<i>\x1b[2J/seed0')
    plain, markdown = (format_table(compare(tmp_path), style) for style in ('plain', 'markdown'))
    assert '\x1b' not in plain + markdown and 'a\\|b\\<i\\>' in markdown


def test_as_json_is_plain_and_complete(sweep):
    value = json.loads(json.dumps(tables.as_json(compare(sweep))))
    assert value['baseline'] == 'scratch' and value['rows'][1]['accuracy']['values'] == [0.8, 0.85, 0.9]
    assert value['rows'][1]['gain']['paired'] is True and value['commits'] == ['abcdef0123456789']
