"""An actor for tests of where actors live; apart from them, so that its process imports nothing heavy."""

import os

import ray


class Guest:
    """Lives somewhere."""

    def gpus(self) -> tuple[list[int], str]:
        """Which ones it may use, as Ray and as CUDA know them."""
        return [int(number) for number in ray.get_gpu_ids()], os.environ["CUDA_VISIBLE_DEVICES"]
