"""Sampling replies: the decoder and its settings."""

from selfevo.generate.decoder import generate
from selfevo.generate.replies import Reply, sample_replies
from selfevo.generate.sampling import Sampling

__all__ = ["Reply", "Sampling", "generate", "sample_replies"]
