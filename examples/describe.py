"""Statistics of dialogue files (the paper's Table 1): a row for each file.

    python examples/describe.py ESConv.json ExTES.json ServeForEmo.json [--raw]

Files are read in any of the forms that iterate.py takes, and cleaned as it does: utterances of one speaker in a row are
joined, and what a supporter says before the seeker's first utterance is dropped. --raw counts them as they stand.
"""

from __future__ import annotations

import argparse
import sys

from program import program

from selfevo.datasets import load_dialogues
from selfevo.datasets.corpus import read_dialogues
from selfevo.datasets.statistics import describe_dialogues
from selfevo.evaluation.tables import markdown_table

HEAD = ("file", "sessions", "utterances a session", "words an utterance", "of seekers", "of supporters")


@program(memory="give fewer files at once")
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="dialogues: ESConv, ExTES, ServeForEmo, messages")
    parser.add_argument("--raw", action="store_true", help="count dialogues as they stand in the file")
    given = parser.parse_args()
    if len(set(given.files)) < len(given.files):
        raise ValueError("a file is given twice; give each once")
    read = load_dialogues if given.raw else read_dialogues
    found = {path: describe_dialogues(read(path)).values() for path in given.files}
    rows = {path: [f"{sessions:,}", *(f"{mean:.2f}" for mean in means)] for path, (sessions, *means) in found.items()}
    print(markdown_table(HEAD, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
