"""What a person watching the terminal sees."""

import sys
import time
from collections.abc import Mapping

import jax


def say(text: str, end: str = '\n') -> None:
    """Prints on the first process only."""
    if jax.process_index() == 0:
        print(text, end=end, flush=True)


class Progress:
    """The progress line of one stage: step, figures, rate, time to go."""

    def __init__(self, stage: str, first_step: int, end: int, batch_size: int):
        self._stage, self._first, self._end, self._batch = stage, first_step, end, batch_size
        self._mark = None  # (step, time) once the first step, which compiles, is done
        self._rewrite = sys.stdout.isatty()

    def rate(self, step: int) -> float:
        """Examples a second since the first step of this process; 0 until there is something to measure."""
        now = time.perf_counter()
        if self._mark is None:
            self._mark = (step, now)
        passed = step - self._mark[0]
        return passed * self._batch / (now - self._mark[1]) if passed else 0.0

    def show(self, step: int, values: Mapping[str, float], *, keep: bool = False) -> None:
        """Rewrites the line, or starts a new one where the output is a file or `keep` is set."""
        rate = self.rate(step)
        shown = '  '.join(
            f'{k} {v:.4g}' for k, v in values.items() if k.endswith(('loss', 'accuracy', 'mse', 'recall@1', 'epsilon'))
        )
        left = (self._end - step) * self._batch / rate if rate else 0.0
        eta = (
            f'  {rate:.0f} examples/s  ETA {int(left // 60)}:{int(left % 60):02d}' if rate and step < self._end else ''
        )
        line = f'{self._stage}  step {step - self._first}/{self._end - self._first}  {shown}{eta}'
        say(f'\r\033[K{line}' if self._rewrite else line, end='\n' if keep or not self._rewrite else '')
