"""The toy world: coloured shapes that move, whose story is known exactly."""
