"""The maker of the conformance vectors: exact references, the cases, and the files they become.

`python -m tests.oracle.generate`, from the root of the repository, makes the files.
"""
