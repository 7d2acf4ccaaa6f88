"""The formats that `prepare` reads: each module here is one, and so is each `formats/*.py` in `--plugins DIR`.

    SUFFIXES = (".pipe",)          # the names it takes, without the .gz, .xz, .bz2, .zst of compression


    def documents(content):        # a `decoding.Content`; gives one str (or `decoding.NoText`) after another
        yield from content.text().split("\\n|||\\n")

One rank reads a file as a whole. Where `SHARED = True`, all ranks read it and each keeps every size-th document: for
files so large that one rank would take too long. `documents` must then give the same ones in the same order on every
rank; instead of a document it may give a function that makes it, which only the rank that keeps it calls.

The longest suffix decides; one of a plug-in goes before all of ours. `text` also takes what no other format does.
"""
