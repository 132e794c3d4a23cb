"""From a data file to batches: files -> Row, formats -> Example, render -> Sample, batches -> Batch.

Beside that path: audit (what is wrong with the rows) and split (what is held out).
"""
