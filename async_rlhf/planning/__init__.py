"""A model of the pipeline that runs ahead of it: throughput, idle shares and staleness for numbers of members nobody has tried yet.

rates.py      how fast each stage is: measured, or given     lengths.py   how long completions are
engine.py     continuous batching, seat by seat              generator.py what is around an engine: room, groups that gather
pipeline.py   the simulation, around the real replay queue   cores.py     processes that share cores; signals.py wakes them
model.py      run: what it predicts, and rates that fit a run
prediction.py what it says                                   plans.py     plans compared; plot.py draws them
"""
