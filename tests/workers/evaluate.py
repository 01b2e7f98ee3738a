"""`moss-eval` by the ranks of one start, several times: evaluate.py '[[ARGUMENT, ...], ...]'."""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist

from tools.evaluate.__main__ import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for arguments in json.loads(sys.argv[1]):
        if code := main(arguments):
            sys.exit(code)
    dist.barrier()
    dist.destroy_process_group()
