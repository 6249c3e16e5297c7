"""Files and images: atomic writes, grids, animations."""
