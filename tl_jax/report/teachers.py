"""A student beside its teachers: where they agree, how well each knows what it knows, how large and how fast they are."""

from collections.abc import Mapping, Sequence

import numpy as np

from tl_jax.report import plots, runs, scores, views
from tl_jax.report.markup import bar, caption, columns, escape, section, shorten, table
from tl_jax.report.runs import Predictions, Run

STUDENT = 'student'
COMMONEST = 8

# The student and its teachers, by role.
Networks = Mapping[str, Predictions]


def teacher_sections(run: Run, split: str | None) -> tuple[list[str], list[str]]:
    """The page's sections on a run's teachers, none where it has nothing of them; and notes on files that are unusable."""
    roles, told, problems = teacher_roles(run), {}, []
    for name in run.splits if roles else ():
        told[name], notes = read_networks(run, name, roles)
        problems += notes
    told = {name: networks for name, networks in told.items() if len(networks) > 1}
    judged = told.get(split, {})
    return [
        section('Student and teacher', networks_view(run, split, judged)),
        section('Agreement', agreement_view(told), outcomes_view(judged)),
        section('Calibration of student and teacher', calibration_view(judged)),
    ], problems


def teacher_roles(run: Run) -> list[str]:
    """The networks of which the run stored predictions beside the student's: `teacher`, `teacher2`, …"""
    folders = [path.name for path in (run.path / 'predictions').glob('[!.]*') if path.is_dir()]
    return sorted((name for name in folders if name != 'before'), key=lambda name: (len(name), name))


def read_networks(run: Run, split: str, roles: Sequence[str]) -> tuple[Networks, list[str]]:
    """What the student and each teacher say of a split, as far as it is usable, and a note for each file that is not."""
    student, _ = runs.read_predictions(run.path / f'predictions/{split}.npz')
    if student is None:
        return {}, []
    found, problems = {STUDENT: student}, []
    for role in roles:
        teacher, notes = runs.read_predictions(run.path / f'predictions/{role}/{split}.npz')
        problems += notes
        if teacher and comparable(student, teacher):
            found[role] = teacher
        elif teacher:
            problems.append(f'{role}/{split}.npz: other examples, labels or classes than {split}.npz; not compared.')
    return found, problems


def comparable(one: Predictions, other: Predictions) -> bool:
    """Whether both are of the same examples, labels and classes."""
    pairs = ((one.index, other.index), (one.label, other.label))
    return one.class_names == other.class_names and all(np.array_equal(*pair) for pair in pairs)


def networks_view(run: Run, split: str | None, judged: Networks) -> str:
    """Accuracy, calibration, size and speed of the student and of each teacher; sizes and speeds over the student's too."""
    measured = run.summary.get('networks')
    measured = measured if isinstance(measured, Mapping) else {}
    figure = lambda name, key: runs.number(measured, name, key)
    over_student = lambda name, key: _three_digits(_ratio(figure(name, key), figure(STUDENT, key)))
    rows = [
        [
            escape(name),
            *_judged(judged.get(name)),
            _shown(figure(name, 'parameters'), ',.0f'),
            over_student(name, 'parameters'),
            _three_digits(_ratio(figure(name, 'bytes'), 1e6)),
            _shown(figure(name, 'examples_per_second'), ',.0f'),
            over_student(name, 'examples_per_second'),
        ]
        for name in dict.fromkeys([*measured, *judged])
    ]
    if not rows:
        return ''
    accuracy = f'{split} accuracy %' if judged else 'accuracy %'
    shown = table(['network', accuracy, 'ECE %', 'parameters', '× student', 'MB', 'examples/s', '× student'], rows)
    batch = figure(STUDENT, 'batch')
    if batch is None:
        return shown
    said = f'Speed: predictions for a batch of {batch:,.0f} that lies on the device; median of calls in turns.'
    return shown + caption(said)


def agreement_view(told: Mapping[str, Networks]) -> str:
    """How often the student and each teacher name one class, and how far apart their probabilities are, by split."""
    rows = [
        [
            escape(split),
            escape(role),
            f'{len(teacher.label):,}',
            f'{100 * accuracy_of(networks[STUDENT]):.2f}',
            f'{100 * accuracy_of(teacher):.2f}',
            f'{100 * np.mean(networks[STUDENT].predicted == teacher.predicted):.2f}',
            f'{np.mean(scores.divergence(teacher.probabilities, networks[STUDENT].probabilities)):.4f}',
            f'{np.mean(scores.divergence(networks[STUDENT].probabilities, teacher.probabilities)):.4f}',
        ]
        for split, networks in told.items()
        for role, teacher in networks.items()
        if role != STUDENT
    ]
    if not rows:
        return ''
    head = ['split', 'teacher', 'examples', 'student %', 'teacher %', 'agreement %', 'KL(teacher ‖ student)']
    said = (
        'Agreement: both name one class, right or wrong (Stanton et al. 2021). KL: mean over examples, in nats; the first is '
        'large where the student rules out what the teacher holds possible, the second the other way round.'
    )
    return table([*head, 'KL(student ‖ teacher)'], rows, texts=2) + caption(said)


def outcomes_view(judged: Networks) -> str:
    """Where the student and each teacher disagree, and who is right."""
    return ''.join(
        columns(f'<h3>Student and {escape(role)}: who is right</h3>' + _outcomes(judged[STUDENT], teacher),
                _disputed(judged[STUDENT], teacher))
        for role, teacher in judged.items() if role != STUDENT
    )  # fmt: skip


def calibration_view(judged: Networks) -> str:
    """The reliability diagrams side by side."""
    drawn = [f'<h3>{escape(name)}</h3>{plots.reliability(views.calibration_of(said))}' for name, said in judged.items()]
    said = (
        'Bar: accuracy within a fifteenth of the confidence scale; tick: mean confidence there; orange: overconfidence '
        '(Guo et al. 2017).'
    )
    return columns(*drawn) + caption(said) if drawn else ''


def accuracy_of(predictions: Predictions) -> float:
    return float(np.mean(predictions.predicted == predictions.label))


def _outcomes(student: Predictions, teacher: Predictions) -> str:
    """How many examples end in each way, and how far apart the two are there."""
    found = scores.outcomes(student.label, student.predicted, teacher.predicted)
    apart = scores.divergence(teacher.probabilities, student.probabilities)
    rows = []
    for place, name in enumerate(scores.OUTCOMES):
        mine = found == place
        share, mean = np.mean(mine), f'{apart[mine].mean():.3f}' if mine.any() else '–'
        rows.append([escape(name), f'{mine.sum():,}', f'{100 * share:.2f}', bar(share), mean])
    return table(['right', 'examples', '%', '', 'KL(teacher ‖ student)'], rows)


def _disputed(student: Predictions, teacher: Predictions) -> str:
    """The pairs of classes that the two most often say of one example."""
    names, label = student.class_names, student.label
    pairs = scores.confusion_matrix(student.predicted, teacher.predicted, len(names))
    rows = []
    for mine, theirs, count in scores.most_confused(pairs, COMMONEST):
        there = label[(student.predicted == mine) & (teacher.predicted == theirs)]
        right = [str(int(np.sum(there == who))) for who in (mine, theirs)]
        rows.append([escape(shorten(names[mine], 40)), escape(shorten(names[theirs], 40)), str(count), *right])
    head = ['student says', 'teacher says', 'examples', 'student right', 'teacher right']
    return f'<h3>Commonest disagreements</h3>{table(head, rows, texts=2)}' if rows else ''


def _judged(said: Predictions | None) -> list[str]:
    """Accuracy and calibration error in percent."""
    figures = (accuracy_of(said), views.calibration_of(said).error) if said else (None, None)
    return [_shown(value, '.2f', 100) for value in figures]


def _three_digits(value: float | None) -> str:
    return _shown(value, '.3g' if value is not None and value < 999.5 else ',.0f')


def _shown(value: float | None, form: str, scale: float = 1) -> str:
    return '–' if value is None else format(scale * value, form)


def _ratio(value: float | None, of: float | None) -> float | None:
    return value / of if value is not None and of else None
