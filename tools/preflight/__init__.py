"""Checks whether all machines of a job are fit for it, in a minute, before hours are lost."""
