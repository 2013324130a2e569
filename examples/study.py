"""People judge the models of a run: they talk to one and rate it, or to two at once and choose (Figures 3 and 4).

    python examples/study.py serve RUN --mode pointwise --models M0 M1 M2 --out STUDY
    python examples/study.py serve RUN --mode pairwise --models M0 M2 --out STUDY --port 8001
    python examples/study.py results STUDY

serve shows the pages on http://127.0.0.1:8000 until Ctrl-C; the same command goes on with a study that was begun. All
that participants do is in STUDY/study.db at once. What they read is in STUDY/texts, to be edited before the study
begins. Beyond this machine the pages belong behind a reverse proxy with TLS, see docs/study.md. results writes
tables, figures, CSV files and transcripts to STUDY/results, at any time. Needs: pip install 'selfevo[study]'.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from program import program

from selfevo.evaluation.folder import VANILLA, is_stage, stage_names
from selfevo.evolve import EvolveConfig, RunError, load_backbone, read_settings
from selfevo.files import file_hash, read_text, write_text
from selfevo.study import MODES, Store, StudySettings
from selfevo.study.plan import TURNS
from selfevo.study.results import write_results
from selfevo.study.texts import read_scenarios, read_texts


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="show the pages to participants", allow_abbrev=False)
    serve.add_argument("run", type=Path, metavar="RUN", help="run folder of examples/iterate.py")
    serve.add_argument("--mode", choices=MODES, required=True, help="one model that is rated, or two at every turn")
    serve.add_argument("--models", nargs="+", required=True, metavar="NAME", help="models of the run: vanilla, M0, ...")
    serve.add_argument("--out", type=Path, required=True, metavar="STUDY", help="folder of the study")
    serve.add_argument("--turns", type=int, help="least turns of a conversation (default: 8 pointwise, 10 pairwise)")
    serve.add_argument("--conversations", type=int, default=1, help="of a participant (default: 1)")
    serve.add_argument("--participants", type=int, default=50, help="so many may take part (default: 50)")
    serve.add_argument(
        "--invitations", action="store_true", help="only who has a link of STUDY/invitations.txt may take part"
    )
    serve.add_argument("--scenarios", type=Path, metavar="FILE", help="situations to talk about, a paragraph each")
    serve.add_argument("--seed", type=int, default=0, help="of the assignment, the sides and the draws (default: 0)")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    serve.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    serve.add_argument("--url", default="", help="address that participants open, if a proxy gives it another one")
    results = commands.add_parser("results", help="tables, figures, CSV files, transcripts", allow_abbrev=False)
    results.add_argument("study", type=Path, metavar="STUDY", help="folder of a study")
    parser.epilog = serve.format_help()
    return parser.parse_args()


def adapters_of(run: Path, names: Sequence[str]) -> dict[str, Path | None]:
    """The adapters of the models that were asked for; None for the bare backbone."""
    stages = [name for name in stage_names(run) if (run / name / "adapter_config.json").is_file()]
    known = [VANILLA, *filter(is_stage, stages)]
    if unknown := [name for name in names if name not in known]:
        raise RunError(f"{run}: has no model {', '.join(unknown)} to talk to; it has {', '.join(known)}")
    return {name: None if name == VANILLA else run / name for name in names}


def source_of(config: EvolveConfig, adapters: Mapping[str, Path | None]) -> str:
    """A hash of all that replies depend on besides the seed: it has to stay the same for the whole study."""
    weights = [file_hash(path / "adapter_model.safetensors") if path else "" for path in adapters.values()]
    backbone, replies = config.backbone, config.replies
    told = [backbone.source, backbone.revision, backbone.chat_format, replies.prompts.system, replies.max_new_tokens]
    return sha256(json.dumps([*told, vars(replies.sampling), weights]).encode()).hexdigest()


def serve(options: argparse.Namespace) -> None:
    """Shows the pages until Ctrl-C."""
    try:
        import uvicorn

        from selfevo.study.answer import Answerer, Models
        from selfevo.study.pages import Pages
    except ImportError as error:
        raise RunError(f"a study needs {error.name}; install it with: pip install 'selfevo[study]'") from error
    adapters = adapters_of(options.run, options.models)
    config = read_settings(options.run, EvolveConfig)
    if options.participants < 1:
        raise RunError(f"--participants should be at least 1, not {options.participants}")
    options.out.mkdir(mode=0o700, parents=True, exist_ok=True)  # what people write is for the researcher alone
    texts = read_texts(options.out / "texts")
    settings = StudySettings(
        options.mode, tuple(options.models), TURNS[options.mode] if options.turns is None else options.turns,
        tuple(texts.aspects), source_of(config, adapters), options.conversations, read_scenarios(options.scenarios),
        options.seed,
    )  # fmt: skip
    listener = listen(options.host, options.port)
    store = Store(options.out, settings)
    address = options.url.rstrip("/") or f"http://{options.host}:{listener.getsockname()[1]}"
    model, tokenizer = load_backbone(config.backbone)
    replies = config.replies.seeded(options.seed, "study")
    models = Models(model, tokenizer, adapters, replies, config.replies.prompts.system)
    answerer = Answerer(store, models.respond)
    pages = Pages(
        store, texts, answerer.wake, models.fits, is_open=not options.invitations, most=options.participants,
        url=address,
    )  # fmt: skip
    if options.invitations:
        write_invitations(store, options.out / "invitations.txt", options.participants, address)
    answerer.start()
    sys.setswitchinterval(0.001)  # seconds: a page does not wait long for the thread that decodes
    print(f"{options.mode} study of {', '.join(options.models)} in {options.out}: open {address}", flush=True)
    server = uvicorn.Server(
        uvicorn.Config(pages.app(), access_log=False, log_level="warning", server_header=False, proxy_headers=False)
    )
    try:
        server.run(sockets=[listener])
    finally:
        answerer.end()
        store.close()


def listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else "a port is a number up to 65535"
        raise RunError(
            f"{host}, port {port}: cannot be listened on ({reason}); give another --host or --port"
        ) from None


def write_invitations(store: Store, path: Path, number: int, address: str) -> None:
    """Adds the links that are still missing to a file, which the researcher hands out and then removes."""
    new = store.invite(max(0, number - store.invited()))
    if new:
        links = "".join(f"{address}/return/{token}\n" for token in new)
        write_text(path, (read_text(path) if path.exists() else "") + links)


@program(memory="lower --slots of the run, or take a smaller backbone", interrupted="the same command goes on")
def main() -> int:
    options = parse()
    if options.command == "serve":
        serve(options)
        return 0
    store = Store(options.study)
    folder, table = write_results(store)
    store.close()
    print(f"{table}\n\ntables, figures, CSV files and transcripts: {folder}, to look at: {folder / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
