"""Short trainings of several networks and methods, in a time that is given."""
