import statistics

import pytest

from tl_jax.report.table_page import Claim, Line, PaperTable, format_paper_table, summary, write_paper_table

HOSTILE = '<script>alert(1)</script>|`*[x](http://y)\u202e'


def rows_of(text, start):
    """The cells of the markdown table whose header begins so."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(start))
    taken = []
    for line in lines[first:]:
        if not line.startswith('|'):
            break
        taken.append([cell.strip() for cell in line.strip('|').split('|')])
    return taken


LINES = (
    Line(
        'source',
        'M>U',
        '%',
        {0: 75.0, 1: 77.0, 2: 79.5},
        (),
        75.2,
        (71.2, 79.2),
        'ADDA, table 2',
        ('last',),
        ('aaa', 'bbb'),
    ),
    Line('source', 'U>M', '%', {0: 65.0}, (1, 2), 57.1, (53.1, 61.1), 'ADDA, table 2', ('last',), ('aaa',)),
    Line('ADDA', 'M>U', '%', {}, (0, 1, 2), 89.4, (86.4, 92.4), 'ADDA, table 2'),
    Line('ADDA', 'U>M', '%', {0: 90.0, 1: 91.0, 2: 92.0}, (), None, None, '', ('oracle: target/accuracy',), ('ccc',)),
)


def test_markdown_has_every_column_and_computes_each_figure():
    text = format_paper_table(PaperTable('digits', 'Digits', LINES))
    head, _, *body = rows_of(text, '|        |     ')
    assert head == ['', '', 'paper', 'ours', 'difference', 'accepted', '', 'seeds', 'selection', 'commit']
    values = [75.0, 77.0, 79.5]
    mean, std = statistics.fmean(values), statistics.stdev(values)
    ours, difference = f'{mean:.2f} ± {std:.2f}', f'{mean - 75.2:+.2f}'
    assert body[0] == ['source', 'M\\>U', '75.2', ours, difference, '± 4', '✓', '3', 'last', 'aaa, bbb']
    assert body[1] == ['source', 'U\\>M', '57.1', '65.00', '+7.90', '± 4', '✗', '1 of 3', 'last', 'aaa']
    assert body[2] == ['ADDA', 'M\\>U', '89.4', 'missing', '–', '± 3', '–', '0 of 3', '–', '–']
    assert body[3] == ['ADDA', 'U\\>M', '–', '91.00 ± 1.00', '–', '–', '–', '3', 'oracle: target/accuracy', 'ccc']


def test_the_grid_is_the_papers_and_left_out_where_it_says_nothing_more():
    text = format_paper_table(PaperTable('digits', 'Digits', LINES))
    head, _, source, adda = rows_of(text, '| ours (paper)')
    assert head[1:] == ['M\\>U', 'U\\>M']
    assert source == ['source', '77.17 (75.2) ✓', '65.00 (57.1) ✗'] and adda == ['ADDA', 'missing (89.4)', '91.00']
    for lines in (LINES[:1], LINES[:2], (*LINES, LINES[0]._replace(unit='MSE'))):
        assert 'ours (paper)' not in format_paper_table(PaperTable('digits', 'Digits', lines))


def test_the_summary_counts_what_is_missing_as_not_accepted():
    said = summary(
        PaperTable(
            'digits', 'Digits', LINES, (Claim('a > b', '', 1.0, 2.0, False), Claim('b > a', '', None, None, None))
        )
    )
    assert said[0] == 'Accepted: 1 of 3 figures.' and said[1] == 'Claims that hold: 0 of 2.'
    assert 'Missing: source/U>M seed 1, 2; ADDA/M>U seed 0, 1, 2.' in said
    assert 'Commits: aaa, bbb, ccc.' in said and any(line.startswith('oracle') for line in said)


@pytest.mark.parametrize(
    'value, accepted, verdict',
    [
        (79.2, (71.2, 79.2), True),  # the end belongs to it
        (79.21, (71.2, 79.2), False),
        (71.19, (71.2, 79.2), False),
        (0.1 + 0.2, (None, 0.3), True),  # as numbers are written, not as they are stored
        (99.0, (98.5, None), True),
        (98.0, (98.5, None), False),
        (98.0, None, None),
    ],
)
def test_reproduced(value, accepted, verdict):
    assert Line('a', 'x', '%', {0: value}, accepted=accepted).reproduced is verdict
    assert Line('a', 'x', '%', {}, accepted=accepted).reproduced is None


@pytest.mark.parametrize(
    'unit, values, ours',
    [
        ('%', {0: 5.0}, '5.00'),
        ('MSE', {0: 0.71234, 1: 0.71434}, '0.7133 ± 0.0014'),
        ('ε', {0: 1.16342}, '1.163'),
        ('errors', {0: 146.0, 1: 150.0}, '148.0 ± 2.8'),
        ('steps', {0: 70000.0}, '70000'),
        ('MSE', {0: 0.0}, '0.00'),
    ],
)
def test_digits_follow_the_unit_and_the_size(unit, values, ours):
    text = format_paper_table(PaperTable('t', 'T', (Line('a', 'x', unit, values),)))
    assert f'| {ours} |' in ' '.join(text.split())


def test_the_page_stands_alone_and_shows_foreign_text_as_text(tmp_path):
    line = Line(HOSTILE, HOSTILE, HOSTILE, {0: 1.0}, (1,), 1.1, (1.0, 1.2), HOSTILE, (HOSTILE,), (HOSTILE,))
    paper = PaperTable(HOSTILE, HOSTILE, (line, LINES[0]), (Claim(HOSTILE, HOSTILE, 1.0, 2.0, True),), (HOSTILE,))
    page = write_paper_table(paper, tmp_path / 'new').read_text()
    assert '<script' not in page and '\u202e' not in page and 'src=' not in page
    assert page.count('<section>') == page.count('</section>') >= 3
    text = (tmp_path / 'new/table.md').read_text()
    assert '<script>' not in text.replace('\\<script\\>', '') and '\u202e' not in text
    assert sorted(p.name for p in (tmp_path / 'new').iterdir()) == ['table.html', 'table.md']


def test_equal_results_give_equal_bytes(tmp_path):
    paper = PaperTable('digits', 'Digits', LINES)
    made = [write_paper_table(paper, tmp_path / name).read_bytes() for name in 'ab']
    assert made[0] == made[1]


def test_a_table_without_a_single_result_can_be_drawn(tmp_path):
    lines = tuple(line._replace(values={}, commits=(), selections=()) for line in LINES)
    assert 'missing' in write_paper_table(PaperTable('digits', 'Digits', lines), tmp_path).read_text()
