"""selfevo: personalised emotional support learnt from self-reflection, in pure PyTorch.

Importing this package loads nothing heavy; import what you need, e.g. ``from selfevo.losses import dpo_sft_loss``.
"""

__version__ = "0.1.0"
