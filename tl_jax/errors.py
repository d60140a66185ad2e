"""The one exception whose message is written for the user, and name suggestions for it."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: a config field, a path, a checkpoint, data.

    The message is one line that names the field, file or leaf and what would fix it. `launch.py` prints it
    without a traceback and exits with status 2.
    """


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """A clause for an error message: the known names closest to `name`, or all of them if there are few."""
    known = sorted(set(known))
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    if close:
        return 'did you mean ' + ' or '.join(repr(c) for c in close) + '?'
    shown = ', '.join(known[:12]) + (f', … ({len(known)} in all)' if len(known) > 12 else '')
    return f'known: {shown}' if known else 'nothing is known here'
