"""Accuracies: what optimizer, learning rate, size and pretraining do for a network's."""
