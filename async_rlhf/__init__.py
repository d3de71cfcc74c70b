"""async-rlhf: asynchronous reinforcement learning from human or verifiable feedback.

This package is the core: messages, configuration, staleness arithmetic, replay buffer, losses, batching, tasks and the
command line. It imports neither ray, vllm nor deepspeed; those live in the sibling packages `actors` and `learners`.
"""

__version__ = "0.1.0"
