"""Sources of captioned images, the tokenizer, the transforms, and the input pipeline."""
