"""Scripts that tests start in several processes: see tests/torchrun.py."""
