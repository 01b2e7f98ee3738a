"""Runs the Python blocks of a page of docs/, in their order and one namespace: blocks.py PAGE.

Before each block its number is printed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def main(page: Path) -> None:
    namespace = {"__name__": "__main__"}
    for number, block in enumerate(BLOCK.findall(page.read_text())):
        print(f"--- {number}", flush=True)
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
