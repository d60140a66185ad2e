"""`python -m tl_jax.report DIRECTORY`: make the page of a run or of a sweep again from its files."""

import sys
from pathlib import Path

from tl_jax.errors import UserError
from tl_jax.report import compare, format_table, write_run_report, write_sweep_report
from tl_jax.report.runs import is_run


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print('usage: python -m tl_jax.report DIRECTORY', file=sys.stderr)
        return 2
    try:
        if is_run(Path(arguments[0])):
            print(write_run_report(arguments[0]))
        else:
            path = write_sweep_report(arguments[0])
            print(format_table(compare(arguments[0])) + f'\n{path}')
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
