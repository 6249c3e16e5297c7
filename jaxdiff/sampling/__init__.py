"""From noise to images: solvers, guidance and the one sampling loop."""
