"""Where arrays live: the mesh of devices, and the rules that lay a train state out on it."""
