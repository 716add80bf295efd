"""The demo: fine-tune a small instruct model on four real tasks, then compare the training steps of three methods."""
