"""A run as one page of tables, figures and samples."""

from selfevo.evaluation.report.page import write_report
from selfevo.evaluation.report.score_tables import add_table

__all__ = ["add_table", "write_report"]
