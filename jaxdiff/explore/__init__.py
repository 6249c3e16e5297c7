"""Maps of a data set: its images as points of a trained model's space, on axes with a meaning."""
