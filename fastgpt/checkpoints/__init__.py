"""Other programs' checkpoints: names and orientation, configs, files. The door is fastgpt.checkpoints.weights."""
