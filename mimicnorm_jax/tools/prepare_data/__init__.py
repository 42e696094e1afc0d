"""Prepares a data set for training, or says what is missing."""
