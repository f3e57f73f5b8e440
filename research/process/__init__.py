"""A program and its surroundings: command line, signals, memory, machine, terminal."""
