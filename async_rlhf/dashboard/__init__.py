"""The live page about runs: `reading` and `table` take in a run folder's files, `folder` and `catalogue` know runs, `flow`, `views`
and `samples` say what the page shows, `server` hands it out, and `static/` is the page itself. All of it only reads.
"""
