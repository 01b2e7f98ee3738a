"""Are all machines of a job fit for it? A minute before a run, in place of hours of it."""
