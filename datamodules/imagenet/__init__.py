"""Parts of ImageNet for few-shot learning, in the forms in which they are passed around."""
