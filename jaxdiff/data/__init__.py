"""Sources of captioned images, tokenizers, transforms, shards, and the input pipeline."""
