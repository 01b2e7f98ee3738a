"""python -m inference.serve --checkpoint DIR: what it does is in command.py.

Each process that decodes media imports the program's main file once more (multiprocessing), so
nothing else is imported here before the command begins: what the server needs takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code."""
    from data_pipeline.imports import uncollected

    with uncollected():
        from inference.serve.command import main as serve

    return serve(argv)


if __name__ == "__main__":
    raise SystemExit(main())
