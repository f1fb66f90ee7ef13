"""The code that every version folder holds a copy of. It imports nothing else of npair."""
