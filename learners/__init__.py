"""The learner side: one DeepSpeed Learner, one small objective per algorithm, one group of ranks."""
