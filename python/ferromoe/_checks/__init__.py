"""What the compiled kernels refuse, said of calls that run in plain PyTorch instead.

There torch would answer with a text of its own, or broadcast a wrong shape into wrong numbers. One
function per operator takes the operator's arguments; `tests/test_errors.py` holds each of them to
what its kernel refuses. Shapes and dtypes are looked at everywhere, values only where reading them
does not wait for a GPU. The files are named as those of `reference` are.
"""
