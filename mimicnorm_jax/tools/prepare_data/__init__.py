"""Prepares a data set for training, or says what is missing; imports images that are there."""
