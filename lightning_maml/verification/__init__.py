"""An independent check of a model: plain autograd on one of its batches."""
