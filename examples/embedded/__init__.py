"""The embedded default: a small world of dialogues, and the backbone and data made from it (``make.py``)."""
