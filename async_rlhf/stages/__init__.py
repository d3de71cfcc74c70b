"""What happens before reinforcement learning: supervised fine-tuning, a reward model, preferences labelled anew.

A stage is a `StageJob`; `stages.perform.perform` does it in whatever process it is called. All of them keep their work beside what
they make, go on from there after a kill, and leave a whole result or none (`stages.folder`).
"""
