"""Tables, plots and the HTML page of a run or a sweep, made from its directory's files and nothing else."""

from tl_jax.report.run_page import write_run_report
from tl_jax.report.search_page import write_search_report
from tl_jax.report.sweep_page import write_sweep_report
from tl_jax.report.tables import Comparison, Published, compare, format_table

__all__ = [
    'Comparison',
    'Published',
    'compare',
    'format_table',
    'write_run_report',
    'write_search_report',
    'write_sweep_report',
]
