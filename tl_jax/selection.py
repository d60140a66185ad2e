"""Which checkpoint of a run counts: never implicit, printed with every number."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tl_jax.errors import UserError, nearest

METRICS = ('accuracy', 'loss', 'macro_f1', 'balanced_accuracy', 'mcc')


class Selection(NamedTuple):
    """How a checkpoint is chosen.

    Attributes:
      field: of the evaluation records, such as `val/accuracy`; empty for the last checkpoint.
      sign: 1 where higher is better, −1 where lower is.
      oracle: whether the test labels choose.
    """

    field: str
    sign: float
    oracle: bool

    def __str__(self) -> str:
        if not self.field:
            return 'last'
        return f'oracle: {self.field}, chosen on the test labels' if self.oracle else self.field

    def score(self, record: Mapping[str, Any]) -> float | None:
        """A record's rank, higher is better; None where it has no such field."""
        return self.sign * record[self.field] if self.field in record else None

    def best(self, records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
        """The record with the highest score, the earliest of equals; None where nothing is selected."""
        scored = [r for r in records if self.score(r) is not None]
        return max(scored, key=lambda r: (self.score(r), -r['step'])) if scored else None

    def exhausted(self, records: Sequence[Mapping[str, Any]], stage: int, patience: int) -> bool:
        """Whether the last `patience` evaluations of a stage brought nothing better than an earlier one of it."""
        scores = [s for r in records if r['stage'] == stage and (s := self.score(r)) is not None]
        return 0 < patience < len(scores) and max(scores[-patience:]) <= max(scores[:-patience])


def direction(metric: str) -> float:
    """-1 for a metric of which less is better, 1 for the others; a task's own stands after its name, `left/loss`."""
    return -1.0 if metric.rpartition('/')[2].startswith(('loss', 'mse', 'error', 'perplexity')) else 1.0


def selection_from(
    select_by: str,
    eval_splits: Sequence[str],
    test_splits: Sequence[str],
    *,
    metrics: Sequence[str] | None = METRICS,
    patience: int = 0,
) -> Selection:
    """Reads `config.select_by`: 'last', '<evaluation split>', '<evaluation split>/<metric>', or 'oracle[/<metric>]'.

    Args:
      select_by: the field.
      eval_splits: those of `config.data.eval`.
      test_splits: those of `config.data.test`.
      metrics: that there are; None where the objective has figures of its own, which are known once evaluated.
      patience: of the config, which goes by what is read here.
    """
    if select_by == 'last':
        if patience:
            raise UserError(
                "config.patience: waits for a better config.select_by, and that is 'last'; select by a split's metric, such "
                'as val/accuracy, or leave patience at 0'
            )
        return Selection('', 1.0, False)
    split, _, metric = select_by.partition('/')
    metric = metric or 'accuracy'
    if metrics is not None and metric not in metrics:
        raise UserError(f"config.select_by: unknown metric '{metric}'; {nearest(metric, metrics)}")
    sign = direction(metric)
    if split == 'oracle' and test_splits:
        return Selection(f'{test_splits[0]}/{metric}', sign, True)
    if split not in eval_splits:
        known = ['last', *eval_splits, *(['oracle'] if test_splits else [])]
        raise UserError(f"config.select_by: there is no evaluation split '{split}'; {nearest(split, known)}")
    return Selection(f'{split}/{metric}', sign, False)
