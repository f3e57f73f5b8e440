"""The machine that a program runs on: devices, hosts, signals, memory, terminal."""
