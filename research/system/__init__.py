"""Services of the machine: devices, hosts, signals, memory and terminal."""
