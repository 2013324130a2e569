"""A page of tables, figures and samples for each run folder: RUN/report.html.

    python examples/report.py RUN [RUN ...] [--baseline NAME] [--embed [ENCODER]]

The page can be written at any time, also while the run goes on. It needs: pip install 'selfevo[report]'.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from program import program

from selfevo.evaluation.folder import stage_names
from selfevo.evaluation.report import write_report
from selfevo.evaluation.report.analysis import Embed, hidden_state_embedder, sentence_embedder
from selfevo.evolve import BackboneSettings, load_backbone, read_settings

BACKBONE = "the run's backbone"


def embedder(run: Path, source: str) -> Embed:
    """Embeddings by the backbone that a run started from, or by a sentence encoder."""
    if source == BACKBONE:
        return hidden_state_embedder(*load_backbone(read_settings(run, BackboneSettings)))
    return sentence_embedder(source)


@program(memory="leave --embed out, or take a smaller encoder")
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder of examples/iterate.py")
    parser.add_argument(
        "--embed", nargs="?", const=BACKBONE, metavar="ENCODER",
        help="compare pairs by embeddings too, not by words alone: of an encoder, a folder or a hub id that "
        "sentence-transformers can load (pip install 'selfevo[embed]'), or without one by mean hidden states of the "
        "run's backbone",
    )  # fmt: skip
    parser.add_argument(
        "--baseline", default="", metavar="NAME",
        help="the model that every other one is compared with (default: the first row, vanilla where it is there)",
    )  # fmt: skip
    given = parser.parse_args()
    for run in given.runs:
        stage_names(run)  # raises for what is no run, before anything is loaded
        embed = embedder(run, given.embed) if given.embed else None
        name = "mean hidden states" if given.embed == BACKBONE else f"embeddings of {given.embed}"
        print(write_report(run, embed=embed, embed_name=name, baseline=given.baseline))
    return 0


if __name__ == "__main__":
    sys.exit(main())
