"""mini-ImageNet, in the forms in which it is passed around."""
