"""Does a run survive what machines do to it? Faults by a seed, and the losses of a quiet run."""
