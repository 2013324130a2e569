"""A page of tables, figures and samples for each run folder: RUN/report.html.

    python examples/report.py RUN [RUN ...] [--embed]

The page can be written at any time, also while the run goes on. It needs: pip install 'selfevo[report]'.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from selfevo.evaluation.report import write_report
from selfevo.evaluation.report.analysis import Embed, hidden_state_embedder
from selfevo.evolve import BackboneSettings, load_backbone, read_settings


def backbone_embedder(run: Path) -> Embed:
    """Embeddings by the backbone that a run started from."""
    return hidden_state_embedder(*load_backbone(read_settings(run, BackboneSettings)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder of examples/iterate.py")
    parser.add_argument(
        "--embed",
        action="store_true",
        help="compare pairs by the backbone's mean hidden states too, not by words alone",
    )
    given = parser.parse_args()
    try:
        for run in given.runs:
            print(write_report(run, embed=backbone_embedder(run) if given.embed else None))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
