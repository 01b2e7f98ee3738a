"""Takes the first held-out clip with a narration out of a toy world, and prints what happens."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

from data_pipeline.commands import CommandParser, report_error
from data_pipeline.seconds import clock
from data_pipeline.toy.build import STAGES
from data_pipeline.toy.stream import NARRATE

Sentences = list[tuple[int, str]]  # seconds, and what is said in them


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line."""
    parser = CommandParser("python -m tools.demo.narrate", description=__doc__)
    parser.add_argument("world", type=Path, metavar="WORLD", help="folder of data_pipeline.toy")
    parser.add_argument("clip", type=Path, metavar="CLIP", help="MP4 file to write")
    options = parser.parse_args(arguments)
    try:
        truth = sentences_of(held_out_clip(options.world, options.clip))
    except ValueError as error:
        return report_error(parser.prog, error)
    print(f"What happens in {options.clip}, which no training has seen:")
    print("\n".join(f"{clock(second)}  {words}" for second, words in truth))
    return 0


def held_out_clip(world: Path, out: Path) -> str:
    """Writes the first held-out clip with a narration to `out`; returns the narration's turn."""
    for shard in sorted((world / STAGES[-1] / "heldout/video").glob("*.tar")):
        with tarfile.open(shard) as tar:
            members = {member.name: member for member in tar}
            for name in sorted(members):
                if not name.endswith(".json"):
                    continue
                messages = json.loads(_read(tar, members[name]))["messages"]
                if messages[0]["content"] == NARRATE:
                    out.write_bytes(_read(tar, members[name.replace(".json", ".0.mp4")]))
                    return str(messages[1]["content"])
    raise ValueError(f"{world} has no held-out clip with a narration")


def sentences_of(content: str) -> Sentences:
    """The sentences of a sample's turn, each with the second in which it begins."""
    found: Sentences = []
    goes_on = False
    for second, piece in enumerate(content.split("<|video|>")[1:]):
        words, silence, _ = piece.partition("<|silence|>")
        if words and goes_on:
            found[-1] = (found[-1][0], found[-1][1] + words)
        elif words:
            found.append((second, words))
        goes_on = bool(words) and not silence
    return found


def spoken(events: Path) -> Sentences:
    """The sentences of the streaming command, from its `--jsonl` file."""
    began: dict[str, int] = {}
    found: Sentences = []
    for event in map(json.loads, events.read_text().splitlines()):
        if event["type"] == "response.created":
            began[event["response_id"]] = int(event["t_media"])
        elif event["type"] == "response.done":
            found.append((began[event["response_id"]], event["text"]))
    return found


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


if __name__ == "__main__":
    sys.exit(main())
