"""From a data file to batches: files -> Row, formats -> Example, render -> Sample, batches -> Batch.

Beside that path: audit (what is wrong with the rows), fix (a cleaned copy), canonical (any format as JSONL), and split
(what is held out).
"""
