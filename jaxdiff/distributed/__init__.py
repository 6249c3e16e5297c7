"""Device meshes, sharding rules, process start-up and compiler flags."""
