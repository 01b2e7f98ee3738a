"""The end of the demo: the real-time model is exported and tells a held-out clip, live."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

from data_pipeline.toy.stream import NARRATE


def held_out_clip(world: Path, out: Path) -> str:
    """Writes the first held-out clip that is to be narrated to `out`; what there is to say."""
    for shard in sorted((world / "realtime_sft/heldout/video").glob("*.tar")):
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


def told(content: str) -> list[tuple[int, str]]:
    """What a sample's turn says: seconds and words, a sentence in the second in which it begins."""
    found: list[tuple[int, str]] = []
    goes_on = False
    for second, piece in enumerate(content.split("<|video|>")[1:]):
        words, silence, _ = piece.partition("<|silence|>")
        if words and goes_on:
            found[-1] = (found[-1][0], found[-1][1] + words)
        elif words:
            found.append((second, words))
        goes_on = bool(words) and not silence
    return found


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()
