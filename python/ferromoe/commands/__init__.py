"""The commands, one file per group with a function `register(app)`; found by listing.

These files import nothing heavy at the top: `ferromoe --help` works without torch.
"""
