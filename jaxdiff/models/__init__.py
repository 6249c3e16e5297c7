"""Networks in Flax NNX; no sharding and no training code is in them."""
