"""Where arrays live: the mesh of devices, the rules that lay a train state out, and the hosts."""
