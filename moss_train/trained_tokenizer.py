"""The tokenizer that a checkpoint was trained with, and what happens with another one.

run.json of a checkpoint and training.json of an export keep its identity (`tokenizer`). Another
tokenizer of as many tokens would fit the weights, and give every id another meaning.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline.tokenizer_identity import TokenizerIdentity, identify
from moss_train.config import ConfigError
from moss_train.log import log

KEY = "tokenizer"  # in run.json and training.json


def saved_identity(run: dict[str, Any], where: Path) -> TokenizerIdentity | None:
    """The tokenizer's identity in a run.json or training.json; None: an earlier version wrote the
    file, without one.

    Raises:
        ConfigError: it cannot be read.
    """
    saved = run.get(KEY)
    try:
        return None if saved is None else TokenizerIdentity.from_dict(saved)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError([f"{where}: {KEY}: cannot be read: {error!r}"]) from None


def check_tokenizer(
    run: dict[str, Any], checkpoint: Path, tokenizer: Path | str, named: str, mend: str
) -> None:
    """Refuses another tokenizer than that of the weights.

    Args:
        run: the run.json of `checkpoint`. Where it has no identity (an earlier version saved it, or
            it was imported without a tokenizer), any is taken, with a warning.
        named: how the user says `tokenizer`, as in `data.tokenizer=toy_world/tokenizer`.
        mend: what to do about another one.

    Raises:
        ConfigError: it is another one, or cannot be read.
    """
    saved, found = saved_identity(run, checkpoint), _identify(tokenizer, named)
    if saved is None:
        _warn_unknown(checkpoint, named)
    elif found.digest != saved.digest:
        raise ConfigError([_refusal(found, saved, checkpoint, named, mend)])


def check_start(
    run: dict[str, Any], checkpoint: Path, tokenizer: Path | str, named: str, changed: bool
) -> None:
    """`check_tokenizer` for a run that starts from weights: a tokenizer with more added tokens is
    taken, with a warning, and where `changed` (`data.new_tokenizer`) any other one, too."""
    saved, found = saved_identity(run, checkpoint), _identify(tokenizer, named)
    if saved is None:
        _warn_unknown(checkpoint, named)
    elif found.digest != saved.digest:
        if not changed and not found.extends(saved):
            mend = (
                "give the checkpoint's; where its embeddings are to learn this one, say so with "
                "data.new_tokenizer=true"
            )
            raise ConfigError([_refusal(found, saved, checkpoint, named, mend)])
        log.warning("%s", _refusal(found, saved, checkpoint, named, "it is taken"))


def check_llama(llama: Path, tokenizer: Path | str, named: str, changed: bool) -> None:
    """`check_start` for the weights of a text-only Llama, whose tokenizer lies beside them."""
    if (llama / "tokenizer.json").is_file():
        beside = identify(llama / "tokenizer.json").to_dict()
        check_start({KEY: beside}, llama, tokenizer, named, changed)


def _identify(tokenizer: Path | str, named: str) -> TokenizerIdentity:
    try:
        return identify(tokenizer)
    except ValueError as error:
        raise ConfigError([f"{named}: {error}"]) from None


def _refusal(
    found: TokenizerIdentity, saved: TokenizerIdentity, checkpoint: Path, named: str, mend: str
) -> str:
    return (
        f"{named}: is not the tokenizer that {checkpoint} was trained with "
        f"({found.differences(saved)}): {mend}"
    )


def _warn_unknown(checkpoint: Path, named: str) -> None:
    log.warning(
        "%s does not say which tokenizer it was trained with: make sure that %s is that one",
        checkpoint,
        named,
    )
