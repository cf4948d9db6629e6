"""Ways into other people's code, one file per library."""
