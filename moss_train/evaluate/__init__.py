"""What a trained model says and when: generation, scores, baselines. In one process."""
