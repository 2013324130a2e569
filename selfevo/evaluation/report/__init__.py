"""A run as one page of tables, figures and samples."""

from selfevo.evaluation.report.page import write_report

__all__ = ["write_report"]
