"""Scores, significance, judge and tables over a folder of replies."""

from selfevo.evaluation.columns import score_replies
from selfevo.evaluation.significance import bootstrap_interval, compare, pearson

__all__ = ["bootstrap_interval", "compare", "pearson", "score_replies"]
