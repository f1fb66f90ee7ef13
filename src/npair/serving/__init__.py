"""The code of a published version, as it stands in every version folder: nothing here imports the rest of npair."""
